#!/usr/bin/env python3
"""Random tiny token models of every family become byte models: layers, import, train step, export.

    python scripts/check/donors.py --out donors.jsonl          # five of each family
    python scripts/check/donors.py --seeds 1 --families llama olmo2

Of each are compared with transformers, in both packages, the outputs of the global transformer and
the gradients of its input and of every parameter: in float64 with norms and rotary tables, which
transformers computes in float32, replaced by float64 forms, and in float32 as transformers ships
them. The donor in float32 goes through `bytelm import`, a step of `bytelm train` and `bytelm export
--format hf`; it is compared as it was imported, and again after the step, with the weights of the
export put back into transformers' model. A row a donor has the largest errors. With `--out FILE`
each is appended as a line of JSON, and what the file holds is not run again. Exit code 1 if an
error is beyond its bound.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of the time goes into compiling. XLA's own passes are those of every run; LLVM's are not.
    cheap = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        cheap += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{cheap} {os.environ.get('XLA_FLAGS', '')}"

import jax
import torch

import bytelm_torch
from bytelm.config import BLTConfig
from bytelm.tolerances import LOGITS
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.training import checkpoint
from parity_tests.donors import (
    FAMILIES,
    compare_layers,
    make_donor,
    make_exact,
    pass_through,
    put_back,
    read_layers,
    save_donor,
)

DTYPES = {"exact": "float64", "imported": "float32", "trained": "float32"}
"""What is compared with transformers → its dtype."""


def check(family: str, seed: int, folder: Path) -> dict[str, Any]:
    """The largest errors of outputs and of gradients of one donor; `folder` is empty."""
    exact, model = (make_donor(family, seed, dtype) for dtype in (torch.float64, torch.float32))
    save_donor(exact, folder / "exact")
    save_donor(model, folder / "donor")
    with jax.enable_x64(True):
        errors = {"exact": largest(make_exact(exact), *read_layers(folder / "exact"), "float64")}
    with contextlib.redirect_stdout(io.StringIO()):
        wrote = pass_through(folder / "donor", folder)
    recipe, imported, _ = checkpoint.load_run(wrote["imported"])
    assert isinstance(recipe.model, BLTConfig)
    errors["imported"] = largest(model, recipe.model, imported, "float32")
    trained = checkpoint.load_run(wrote["trained"])[1]
    moved = {name for name, value in trained.items() if (value != imported[name]).any()}
    exported = bytelm_torch.from_pretrained(wrote["exported"]).state_dict()
    same = all((exported[n].numpy() == value).all() for n, value in to_torch(trained).items())
    put_back(trained, recipe.model, model)
    errors["trained"] = largest(model, recipe.model, trained, "float32")
    good = all(max(errors[name]) <= LOGITS[dtype] for name, dtype in DTYPES.items())
    good &= moved == set(imported) and same
    return {"family": family, "seed": seed, **errors, "good": bool(good)}


def largest(model: Any, config: BLTConfig, params: Any, dtype: str) -> list[float]:
    """The largest errors of outputs and of gradients."""
    found = list(compare_layers(model, config, params, dtype))
    parts = [[e for what, e in found if ("gradient" in what) == part] for part in (False, True)]
    return [max(errors) for errors in parts]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="donors of each family")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, metavar="FILE", help="append here, skip what it holds")
    asked = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_num_threads(1)
    held = list[dict[str, Any]]()
    if asked.out and asked.out.exists():
        held = [json.loads(line) for line in asked.out.read_text("utf-8").splitlines()]
    known = {(row["family"], row["seed"]): row for row in held}
    results = list[bool]()
    with tempfile.TemporaryDirectory() as place:
        # Donors of a family share their programs.
        jax.config.update("jax_compilation_cache_dir", f"{place}/programs")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for family, seed in itertools.product(asked.families, range(asked.seeds)):
            row = known.get((family, seed))
            if row is None:
                (folder := Path(place) / f"{family}-{seed}").mkdir()
                row = check(family, seed, folder)
                if asked.out:
                    with asked.out.open("a", encoding="utf-8") as sink:
                        sink.write(json.dumps(row) + "\n")
            results.append(row["good"])
            print(json.dumps(row), flush=True)
    print(f"{sum(results)} of {len(results)} donors are within bounds, trained and exported")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
