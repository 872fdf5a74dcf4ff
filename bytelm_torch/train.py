"""`python -m bytelm_torch.train`: the trainer, under the name that people type."""

import sys

from bytelm_torch.training.loop import main, train

__all__ = ["main", "train"]

if __name__ == "__main__":
    sys.exit(main())
