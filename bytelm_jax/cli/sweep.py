"""`bytelm sweep`: `bytelm train` at every point of a grid, or at random points."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytelm.arguments import UsageError, join_lists, take_option
from bytelm.train_options import read_options, take_recipe

if TYPE_CHECKING:
    from bytelm.config import Recipe

_HELP = """\
usage: bytelm sweep RECIPE --vary FIELD=VALUES … [--random N] [--out DIR] [overrides]

Trains RECIPE, a name or a file, at every point of a grid, or at N random points, each in a run
folder of its own in DIR (default runs/sweep). Overrides, as of `bytelm train`, hold for every
point. The same command continues where it stopped: finished points are read, not run again.
Prints a table, best first, and writes it as DIR/results.json and DIR/results.csv.

  --vary FIELD=A,B,… lists values of a field, under its name for `bytelm train`;
         FIELD=LOW:HIGH is a range, FIELD=LOW:HIGH:log one with an even logarithm; ranges of
         whole numbers stay whole, and need --random
  --random N  N random points in place of the grid
  --seed S    of the random points (default 0); --train.seed S is that of the runs
  --out DIR   where the run folders and the results are written

Example: bytelm sweep megabyte_tiny --vary learning_rate=1e-3,3e-3 optimizer=adamw,sgd --steps 200
Example: bytelm sweep megabyte_tiny --random 9 --vary learning_rate=1e-4:.1:log beta1=.8:.9"""


def sweep_command(argv: list[str]) -> int:
    """`bytelm sweep RECIPE …`: its options, and those of `bytelm train` for every point."""
    if not argv or argv[0] in ("-h", "--help") or "--help" in argv:
        print(_HELP)
        return 0 if argv else 2
    vary, argv = _take_list(argv, "vary")
    named, rest = take_recipe(argv or [""])
    numbers: dict[str, int] = {}
    for name in ("random", "seed"):
        text, rest = take_option(rest, name)
        if text and not text.isdecimal():
            raise UsageError(f"--{name} {text}: must be a whole number")
        numbers[name] = int(text or 0)
    out, rest = take_option(rest, "out")
    place, rest = take_option(rest, "run_dir", "save_path")
    if place:
        raise UsageError(f"--run-dir {place}: every point has its own; name --out")
    if not vary:
        raise UsageError("--vary: name the fields to vary, as --vary learning_rate=1e-3,3e-3")

    from bytelm import sweeps

    grid = sweeps.points(vary, numbers["random"], numbers["seed"])
    recipes = [_recipe_at(named, point, rest) for point in grid]
    folder, rows = Path(out or "runs/sweep"), []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (point, recipe) in enumerate(zip(grid, recipes, strict=True), 1):
        name = ",".join(f"{key}={value}" for key, value in point.items())
        print(f"{number}/{len(grid)}: {name}", file=sys.stderr, flush=True)
        result = run_point(recipe, folder / name.replace("/", "_"))
        if result is None:
            print("stopped; run the same command to continue", file=sys.stderr)
            break
        rows.append((point, result))
    if rows:
        sweeps.report(rows, folder)
    return 0


def _take_list(argv: list[str], option: str) -> tuple[list[str], list[str]]:
    """The values of all mentions of an option that takes several, and the other arguments."""
    values, rest, reading = list[str](), list[str](), False
    for argument in join_lists(argv, [option]):
        if argument == f"--{option}":
            reading = True
        elif reading and not argument.startswith("-"):
            values.append(argument)
        else:
            reading = False
            rest.append(argument)
    return values, rest


def _recipe_at(named: str, point: dict[str, str], fixed: list[str]) -> "Recipe":
    """The recipe at a point; raises `ValueError` for fields and values that do not fit."""
    from bytelm_jax.training.starting import read_config

    argv = [*fixed, *(f"--{name}={value}" for name, value in point.items())]
    return read_options(named, argv, read_config, "bytelm sweep", _HELP).recipe


def run_point(recipe: "Recipe", run_dir: Path) -> dict[str, Any] | None:
    """Trains a point, or finds it trained: its last figures; None when a signal stopped it."""
    import jax

    from bytelm import runs
    from bytelm.files import replace_file
    from bytelm.metrics import METRIC, read_metrics
    from bytelm_jax.training.loop import train

    done = run_dir / "result.json"
    saved = runs.saved_recipe(run_dir) if done.is_file() else None
    if saved and saved == replace(recipe, patching=saved.patching, origin=saved.origin):
        return json.loads(done.read_text("utf-8"))
    result: dict[str, Any] = {"outcome": "finished"}
    try:
        if train(recipe, run_dir).interrupted:
            return None
    except runs.DivergedError as error:
        result = {"outcome": "diverged", "message": str(error)}
    for record in read_metrics(run_dir / "metrics.jsonl"):
        named = ("step", "bits_per_byte", METRIC, "skipped_steps")
        result |= {name: record[name] for name in named if name in record}
    replace_file(done, (json.dumps(result) + "\n").encode())
    jax.clear_caches()  # the next point shares no program with this one
    return result
