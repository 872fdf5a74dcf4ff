"""How many patches windows of a text have, and what room they need: one JSON object per row.

    python scripts/bench/bench_patch_room.py --data english.txt others.txt

Windows of a Byte Latent Transformer have a budget of patches, which decides what its global
transformer computes. A row is a patcher and a text; the budget is taken from the first text, the
others show whether it holds there: `room` is the smallest multiple of `--multiple` that at most
a thousandth of its windows exceed, `patch_budget` the field that gives it, `default` the recipe's
own. Of each, `exceeded` is the share of windows with more patches, and `executed_over_own` the work
for that many patches over the work for those that are there. `--run` adds a calibrated run's
patcher.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bytelm import data as corpora
from bytelm import recipes
from bytelm.config import BLTConfig
from bytelm_jax.models.entropy import shift_right
from bytelm_jax.models.patching import patch_starts
from bytelm_jax.training import checkpoint
from bytelm_jax.training.patch_calibration import (
    as_blt,
    boundary_scores,
    patch_counts,
    room_for,
)

ROWS = ("blt_132m", "blt_132m --patcher word", "bytropix")
BATCH = 256


def patchers(rows: list[str], run: Path | None) -> Iterator[tuple[str, BLTConfig, Any]]:
    """Name, model and parameters (None where the patcher needs none) of each."""
    for row in rows:
        name, _, patcher = row.partition(" --patcher ")
        model: Any = recipes.get(name).model
        yield row, replace(model, patcher=patcher) if patcher else model, None
    if run:
        recipe, params, _ = checkpoint.load_run(run)
        model, params = as_blt(recipe, params)
        assert recipe.patching is not None
        yield str(run), replace(model, threshold=recipe.patching.threshold), params


def needed(config: BLTConfig, params: Any, path: Path, length: int, limit: int) -> np.ndarray:
    """The patches of each window that the global transformer computes if there is room for them."""
    windows = corpora.Windows(
        corpora.open_corpus([str(path)]), config.vocab, length, append_eos=False
    )
    if params is not None:
        scores = boundary_scores(config, params, windows, limit)
        return patch_counts(scores, config.threshold, length)

    @jax.jit
    def count(ids: Any) -> Any:
        starts = patch_starts(config, shift_right(ids, config.vocab.bos_id))
        return starts.at[:, :2].set(True).sum(axis=1) - 1

    found = []
    for batch in corpora.evaluation_batches(windows, BATCH, limit):
        real = (batch.ids != config.vocab.pad_id).all(axis=1)
        found.append(np.asarray(count(batch.ids))[real])
    return np.concatenate(found)


def main() -> None:
    """Prints the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="RECIPE")
    parser.add_argument("--run", type=Path, help="a run whose entropy model is calibrated")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16_384, help="of each text, evenly spaced")
    parser.add_argument("--multiple", type=int, default=8)
    options = parser.parse_args()
    length = options.length
    for name, config, params in patchers(options.rows, options.run):
        room = 0
        for text in options.data:
            counts = needed(config, params, text, length, options.windows)
            room = room or -(-room_for(counts) // options.multiple) * options.multiple
            mean = length / counts.mean()
            rate = max(room - 8, 1) * 1_000_000 // length / 1_000_000
            budgets = {"room": room, "default": config.budget(length)}
            row: dict[str, Any] = {
                "patcher": name,
                "text": text.name,
                "windows": len(counts),
                "bytes_per_patch": round(float(mean), 3),
                "patches": round(float(counts.mean()), 1),
                "largest": int(counts.max()),
                "patch_budget": rate,
            }
            for kind, budget in budgets.items():
                done = replace(config, bytes_per_patch=length / budget).flops_per_byte(length)
                own = replace(config, bytes_per_patch=float(mean)).flops_per_byte(length)
                row[kind] = {
                    "budget": budget,
                    "exceeded": round(float((counts > budget).mean()), 6),
                    "executed_over_own": round(done / own, 3),
                }
            row["date"] = time.strftime("%Y-%m-%d")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
