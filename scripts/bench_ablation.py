"""Recipes and changes to them against each other after equal CPU time: bits per byte, by seed.

    python scripts/bench_ablation.py --cpu-seconds 120 --options "--batch-size 4" \
        --rows lfbyte_tiny transformer_tiny "lfbyte_tiny --model.token-mixing none"

A row is a recipe and its overrides, as `bytelm train` takes them; `--options` go to every row. A
run trains until its process has used up the CPU seconds, data reading included; compilation and
evaluation do not count. The learning rate stays at its peak after warm-up, since nobody knows how
many steps there will be. Runs of all rows take turns, so that they share the machine's moods.
Prints a JSON line a run, then one a row: mean and sample deviation over the seeds, and the ratio of
the mean to the first row's.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from bytelm_jax import data, parallel, patch_contract, recipes
from bytelm_jax.arguments import parse_recipe
from bytelm_jax.config import Recipe
from bytelm_jax.evaluate import evaluate, make_row_nats
from bytelm_jax.models import define_model
from bytelm_jax.optim import build_optimizer
from bytelm_jax.train import open_windows


def read_row(row: str, options: str) -> Recipe:
    """The recipe that a row of the command line describes."""
    name, *overrides = shlex.split(row)
    recipe = parse_recipe(recipes.get(name), [*shlex.split(options), *overrides], name, "")
    recipe = patch_contract.adopt(recipe, Path(os.devnull))  # a run that does not exist
    return replace(recipe, optimizer=replace(recipe.optimizer, final_fraction=1.0))


def make_run(recipe: Recipe) -> Callable[[int, float], dict[str, Any]]:
    """Compiles the recipe; the result trains it from a seed for CPU seconds and evaluates it."""
    run, vocab = recipe.train, recipe.model.vocab
    mesh = parallel.make_mesh(1)
    windows, held_out, _ = open_windows(recipe)
    bind, init = define_model(recipe.model)
    frozen = recipe.model.frozen_prefixes
    optimizer = build_optimizer(recipe.optimizer, run.steps, frozen=frozen)
    step = parallel.make_train_step(bind, optimizer, run, vocab.pad_id, mesh, frozen)
    row_nats = make_row_nats(bind, vocab.pad_id, mesh, parallel.compute_dtype(run))

    def train(seed: int, cpu_seconds: float) -> dict[str, Any]:
        state = parallel.init_state(mesh, optimizer, lambda: init(seed))
        if run.entropy_from:
            trained = patch_contract.load_entropy_model(recipe)
            trained = parallel.place(mesh, trained)
            state = state._replace(params=state.params | trained)
        batches = data.batches(windows, run.batch_size, seed, 0)
        state, report = step(state, parallel.put_batch(mesh, next(batches)))
        jax.block_until_ready(report)  # compiled
        count, begin, wall = 1, time.process_time(), time.perf_counter()
        while time.process_time() - begin < cpu_seconds:
            state, report = step(state, parallel.put_batch(mesh, next(batches)))
            jax.block_until_ready(report)
            count += 1
        used, waited = time.process_time() - begin, time.perf_counter() - wall
        kept = data.evaluation_batches(held_out, run.batch_size, run.eval_windows)
        found = evaluate(row_nats, state.params, kept, mesh)
        return {
            "seed": seed,
            "bits_per_byte": round(found.bits_per_byte, 4),
            "steps": count,
            "trained_bytes": count * run.batch_size * recipe.data.sequence_length,
            "cpu_seconds": round(used, 1),
            "seconds": round(waited, 1),
            "held_out_bytes": found.count,
        }

    return train


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
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Prints a line a run, then a line a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", required=True, metavar="'RECIPE OVERRIDES'")
    parser.add_argument("--options", default="", help="overrides of every row, in one string")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cpu-seconds", type=float, default=120.0)
    given = parser.parse_args()
    rows = {row: read_row(row, given.options) for row in given.rows}
    trainers = {row: make_run(recipe) for row, recipe in rows.items()}
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for seed in given.seeds:
        for row, train in trainers.items():
            runs[row].append(train(seed, given.cpu_seconds))
            print(json.dumps({"row": row, **runs[row][-1]}), flush=True)
    first = 0.0
    for row, recipe in rows.items():
        line = summary(row, recipe, runs[row], first)
        first = first or line["mean_bits_per_byte"]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
