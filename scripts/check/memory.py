"""The memory that `bytelm train --dry-run` estimates, compared with measurements on an H100.

    python scripts/check/memory.py megabyte_132m:32=7.43 megabyte_132m:128@4x4xjit=6.5

A row is one of `scripts/bench/bench_train.py` and, after `=`, its measured `peak_gib`. Prints one
JSON object per row; nothing is compiled, so each takes seconds on a CPU, which simulates eight
devices. The default rows are those of docs/pods.md.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from bench_train import read_row

from bytelm_jax.tools.dry_run import abstract_state, estimate_memory
from bytelm_jax.training import mesh as meshes

MEASURED = (
    "megabyte_132m:32=7.43 megabyte_132m:128=24.53 megabyte_132m:256=44.46 "
    "megabyte_132m:128@4x1xjit=7.67 megabyte_132m:128@4x4xjit=6.5 "
    "blt_767m:8:2048:4=16.19 blt_767m:8:2048:8=14.5 blt_767m:32:2048:8=29.62 "
    "lfbyte_130m:32=18.69 transformer_132m:16=12.69"
)


def main(rows: list[str]) -> None:
    """Prints one line per row."""
    for text in rows or MEASURED.split():
        row, _, measured = text.partition("=")
        recipe = read_row(row)
        mesh = meshes.make_mesh(recipe.train.devices, recipe.train.fsdp, recipe.train.tensor)
        recipe = replace(recipe, train=replace(recipe.train, compute_dtype="bfloat16"))
        memory = estimate_memory(recipe, mesh, abstract_state(recipe, mesh))
        report = {"row": row} | {k: round(v / 2**30, 2) for k, v in memory._asdict().items()}
        if measured:
            error = memory.peak / 2**30 / float(measured) - 1
            report |= {"measured": float(measured), "error_percent": round(100 * error, 1)}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
