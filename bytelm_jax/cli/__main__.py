"""`python -m bytelm_jax.cli`: the `bytelm` command."""

import sys

from bytelm_jax.cli.main import main

sys.exit(main())
