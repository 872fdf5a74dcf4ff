#!/usr/bin/env python3
"""Random tiny token models of every family become byte models: layers, import, train step, export.

    python scripts/check/donors.py                    # five of each family
    python scripts/check/donors.py --seeds 1 --families llama olmo2

Of each are compared with transformers, in both packages, the outputs of the global transformer and
the gradients of its input and of every parameter: in float64 with norms and rotary tables, which
transformers computes in float32, replaced by float64 forms, and in float32 as transformers ships
them. Then it goes through `bytelm import`, a step of `bytelm train` and `bytelm export --format
hf`. Prints a row a donor with the largest errors; exit code 1 if one is beyond its bound.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import torch

from bytelm.tolerances import GRADIENTS, LOGITS
from parity_tests.donors import (
    FAMILIES,
    compare_layers,
    make_donor,
    make_exact,
    pass_through,
    save_donor,
)


def errors(family: str, seed: int, dtype: str, folder: Path) -> tuple[float, float]:
    """The largest errors of outputs and of gradients of one donor, which is left in `folder`."""
    model = make_donor(family, seed, getattr(torch, dtype))
    save_donor(model, folder)
    reference = make_exact(model) if dtype == "float64" else model
    output, gradient = 0.0, 0.0
    with jax.enable_x64(dtype == "float64"):
        for what, error in compare_layers(reference, folder, dtype):
            if "gradient" in what:
                gradient = max(gradient, error)
            else:
                output = max(output, error)
    return output, gradient


def check(family: str, seed: int) -> bool:
    """Prints a row about one donor; whether all is within its bound."""
    good, cells = True, [f"{family} {seed}"]
    with tempfile.TemporaryDirectory() as place:
        for dtype in ("float64", "float32"):
            output, gradient = errors(family, seed, dtype, Path(place) / dtype)
            good &= output <= LOGITS[dtype] and gradient <= GRADIENTS[dtype]
            cells += [f"{output:.1e}", f"{gradient:.1e}"]
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            pass_through(Path(place) / "float32", Path(place))
    print(f"| {' | '.join([*cells, 'yes' if good else 'NO'])} |", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="donors of each family")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    asked = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_num_threads(1)
    print("| donor | float64 output | gradients | float32 output | gradients | within bounds |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    results = [check(family, seed) for family in asked.families for seed in range(asked.seeds)]
    print(
        f"{sum(results)} of {len(results)} donors are within bounds, and were trained and exported"
    )
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
