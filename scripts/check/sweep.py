"""Hyperparameter sweeps: `bytelm train` at every point of a grid, or at random points.

    python scripts/check/sweep.py megabyte_tiny \\
        --vary learning_rate=1e-3,3e-3 optimizer=adamw,sgd --out runs/rates \\
        -- --steps 200 --train.seed 1
    python scripts/check/sweep.py megabyte_tiny --random 9 \\
        --vary learning_rate=1e-4:.1:log beta1=.8:.9

A field goes by its name on the command line of `bytelm train`; what stands after `--` holds for
every point. `FIELD=A,B,…` lists values. `FIELD=LOW:HIGH` is a range, `FIELD=LOW:HIGH:log` one with
an even logarithm; ranges of whole numbers stay whole, and need --random. Each point has its run
folder in OUT. The same command continues where it stopped: finished points are read, not run again.
Prints a table, best first, and writes it as OUT/results.json and OUT/results.csv.
"""

import argparse
import csv
import itertools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from bytelm import recipes, runs
from bytelm.arguments import parse_recipe
from bytelm.config import Recipe
from bytelm.files import replace_file
from bytelm.metrics import METRIC, read_metrics
from bytelm_jax.training.loop import train
from bytelm_jax.training.reporter import DivergedError

Point = dict[str, str]


def points(vary: list[str], count: int, seed: int) -> list[Point]:
    """The grid of `vary`, or `count` random points of it; raises `ValueError`."""
    axes = dict(_axis(text) for text in vary)
    if not count:
        ranges = [name for name, values in axes.items() if isinstance(values, tuple)]
        if ranges:
            raise ValueError(f"{ranges[0]}: a range needs --random N, or list its values")
        return [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]
    source = random.Random(seed)
    return [{name: _draw(values, source) for name, values in axes.items()} for _ in range(count)]


def _axis(text: str) -> tuple[str, list[str] | tuple[str, ...]]:
    name, _, values = text.partition("=")
    if not name or not values:
        raise ValueError(
            f"--vary {text}: write FIELD=A,B,… or FIELD=LOW:HIGH or FIELD=LOW:HIGH:log"
        )
    ends = tuple(values.split(":"))
    if len(ends) == 1:
        return name, values.split(",")
    try:
        low, high = map(float, ends[:2])
    except ValueError:
        raise ValueError(f"--vary {text}: LOW and HIGH must be numbers") from None
    logarithmic = ends[2:] == ("log",)
    if not (low < high and (ends[2:] == () or (logarithmic and low > 0))):
        raise ValueError(f"--vary {text}: needs LOW < HIGH, above 0 for log")
    return name, ends


def _draw(values: list[str] | tuple[str, ...], source: random.Random) -> str:
    if isinstance(values, list):
        return source.choice(values)
    low, high = map(float, values[:2])
    if len(values) == 3:
        value = math.exp(source.uniform(math.log(low), math.log(high)))
    else:
        value = source.uniform(low, high)
    whole = all(end.lstrip("-").isdigit() for end in values[:2])
    return str(round(value)) if whole else f"{value:.4g}"


def configure(recipe: str, point: Point, fixed: list[str]) -> Recipe:
    """The recipe at a point; raises `ValueError` for fields and values that do not fit."""
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in point.items()]
    return parse_recipe(recipes.get(recipe), [*fixed, *argv], "sweep", "")


def run(recipe: Recipe, run_dir: Path) -> dict[str, Any] | None:
    """Trains a point, or finds it trained: its last figures; None when a signal stopped it."""
    done = run_dir / "result.json"
    if done.is_file() and runs.load_recipe(run_dir) == recipe:
        return json.loads(done.read_text("utf-8"))
    result: dict[str, Any] = {"outcome": "finished"}
    try:
        if train(recipe, run_dir).interrupted:
            return None
    except DivergedError as error:
        result = {"outcome": "diverged", "message": str(error)}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        named = ("step", "bits_per_byte", METRIC, "skipped_steps")
        result |= {name: record[name] for name in named if name in record}
    replace_file(done, (json.dumps(result) + "\n").encode())
    jax.clear_caches()  # the next point shares no program with this one
    return result


def report(rows: list[tuple[Point, dict[str, Any]]], out: Path) -> None:
    """Prints the table and writes both files."""

    def rank(row: tuple[Point, dict[str, Any]]) -> float:
        _, result = row
        best = result.get(METRIC, result.get("bits_per_byte"))
        return math.inf if result["outcome"] != "finished" or best is None else best

    records = [point | result for point, result in sorted(rows, key=rank)]
    columns = list(dict.fromkeys(name for record in records for name in record))
    table = Table(*(name for name in columns if name != "message"))
    for record in records:
        values = (record.get(name, "") for name in columns if name != "message")
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)
    replace_file(out / "results.json", (json.dumps(records, indent=1) + "\n").encode())
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)


def main(argv: list[str]) -> int:
    """Runs every point that is not finished; exit code 2 with one line for a wrong call."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--vary", nargs="+", required=True, metavar="FIELD=VALUES")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="N random points")
    parser.add_argument("--seed", type=int, default=0, help="of the random points")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    options = parser.parse_args(argv[:split])
    rows = []
    try:
        grid = points(options.vary, options.random, options.seed)
        wanted = [configure(options.recipe, point, argv[split + 1 :]) for point in grid]
        for number, (point, recipe) in enumerate(zip(grid, wanted, strict=True), 1):
            name = ",".join(f"{key}={value}" for key, value in point.items())
            print(f"{number}/{len(grid)}: {name}", file=sys.stderr, flush=True)
            options.out.mkdir(parents=True, exist_ok=True)
            result = run(recipe, options.out / name.replace("/", "_"))
            if result is None:
                print("stopped; run the same command to continue", file=sys.stderr)
                break
            rows.append((point, result))
    except (ValueError, OSError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    if rows:
        report(rows, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
