"""The trainer's command; the recipe and its overrides are those of `bytelm train`.

python -m bytelm_torch.train RECIPE --steps 200 --run-dir runs/mine
torchrun --nproc-per-node 2 -m bytelm_torch.train recipe.json --run-dir runs/mine
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bytelm.arguments import take_flag, take_option
from bytelm.files import one_line
from bytelm.runs import DivergedError
from bytelm.storage.stores import require_local
from bytelm.train_options import HELP, RECIPES, RUN_DIR, read_options, take_recipe
from bytelm_torch.training.loop import train
from bytelm_torch.training.starting import read_config

__all__ = ["main", "train"]

_PROG = "python -m bytelm_torch.train"
_USAGE = f"usage: {_PROG} RECIPE [--data PATH …] [--run-dir DIR] [FIELDS]"

_MORE = ("  --compile to have torch.compile make one graph of model and loss, in the first step",)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Bad input: 2 and one line on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    description = "\n".join([_USAGE, "", *HELP, *_MORE, "", RECIPES])
    if not argv or argv[0] in ("-h", "--help"):
        print(description)
        return 0 if argv else 2
    try:
        named, rest = take_recipe(argv)
        compiled, rest = take_flag(rest, "compile")
        # Looked at for the run that it may hold, which is slow at an address.
        place, _ = take_option(rest, *RUN_DIR)
        require_local(Path(place or ""), "run_dir")
        recipe, run_dir, _ = read_options(named, rest, read_config, _PROG, description)
        outcome = train(recipe, run_dir, compiled)
    except DivergedError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"train: {one_line(error, limit=10_000)}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", 0)) == 0:
        how = "stopped" if outcome.interrupted else "done"
        print(f"{how}: step {outcome.step} is saved in {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
