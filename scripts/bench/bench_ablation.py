"""Recipes and changes to them against each other after equal CPU time: bits per byte, by seed.

    python scripts/bench/bench_ablation.py --cpu-seconds 120 --options "--batch-size 4" \
        --rows lfbyte_tiny transformer_tiny "lfbyte_tiny --model.token-mixing none"

A row is a recipe and its overrides, as `bytelm train` takes them; `--options` go to every row. A
run trains until its process has used up the CPU seconds, data reading included; compilation and
evaluation do not count. The learning rate stays at its peak after warm-up, since runs that share a
machine differ in their steps. Runs of all rows take turns, so that they share its moods.
Prints one JSON object per run, then one per row: mean and sample deviation over the seeds, and the
ratio of the mean to the first row's.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

from equal_time import Trainer, machine, read_row

from bytelm.config import Recipe


def measure(trainer: Trainer, seed: int, cpu_seconds: float) -> dict[str, Any]:
    """One run."""
    recipe = trainer.recipe
    wall = time.perf_counter()
    trained = trainer.train(seed, cpu_seconds, time.process_time)
    return {
        "seed": seed,
        "bits_per_byte": round(trained.evaluation.bits_per_byte, 4),
        "steps": trained.steps,
        "trained_bytes": trained.steps * recipe.train.batch_size * recipe.data.sequence_length,
        "cpu_seconds": round(trained.seconds, 1),
        "seconds_in_all": round(time.perf_counter() - wall, 1),
        "held_out_bytes": trained.evaluation.count,
    }


def summary(row: str, recipe: Recipe, runs: list[dict[str, Any]], first: float) -> dict[str, Any]:
    """Mean and spread of a row's runs."""
    bits = [run["bits_per_byte"] for run in runs]
    mean = statistics.mean(bits)
    return {
        "row": row,
        "parameters": recipe.model.parameter_count(),
        "mean_bits_per_byte": round(mean, 4),
        "deviation": round(statistics.stdev(bits), 4) if len(bits) > 1 else None,
        "over_first": round(mean / (first or mean), 4),
        "mean_steps": round(statistics.mean(run["steps"] for run in runs)),
        **machine(),
    }


def main() -> None:
    """Prints one line per run, then one per row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", required=True, metavar="'RECIPE OVERRIDES'")
    parser.add_argument("--options", default="", help="overrides of every row, in one string")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cpu-seconds", type=float, default=120.0)
    args = parser.parse_args()
    recipes = {row: read_row(row, args.options) for row in args.rows}
    for row, recipe in recipes.items():
        recipes[row] = replace(recipe, optimizer=replace(recipe.optimizer, final_fraction=1.0))
    trainers = {row: Trainer(recipe) for row, recipe in recipes.items()}
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for seed in args.seeds:
        for row, trainer in trainers.items():
            runs[row].append(measure(trainer, seed, args.cpu_seconds))
            print(json.dumps({"row": row, **runs[row][-1]}), flush=True)
    first = 0.0
    for row, recipe in recipes.items():
        line = summary(row, recipe, runs[row], first)
        first = first or line["mean_bits_per_byte"]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
