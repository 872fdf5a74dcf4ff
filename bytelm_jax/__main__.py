"""`python -m bytelm_jax`: the `bytelm` command."""

import sys

from bytelm_jax.cli.main import main

sys.exit(main())
