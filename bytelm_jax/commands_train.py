"""`bytelm train`: its command line, the processes of a run, and how a run ends."""

import math
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax

from bytelm_jax import processes, recipes
from bytelm_jax.arguments import (
    ALIASES,
    UsageError,
    expand_names,
    parse_recipe,
    take_flag,
    take_option,
)
from bytelm_jax.config import Recipe
from bytelm_jax.train import DivergedError, open_windows, train


def train_command(argv: list[str]) -> int:
    """`bytelm train RECIPE …`: the options depend on the recipe, so the name comes first."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_train_help())
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UsageError(f"{argv[0]}: name the recipe first: {', '.join(recipes.names())}")
    recipe = recipes.get(argv[0])
    run_dir, rest = take_option(argv[1:], "run_dir", "save_path")
    epochs, rest = take_option(rest, "epochs")
    joining, rest = _take_processes(rest)
    run_dir = Path(run_dir or Path("runs") / recipe.name)
    if epochs and any(a.startswith("--train.steps") for a in expand_names(recipe, rest)):
        raise UsageError("--epochs: sets --train.steps; give one of them")
    recipe = parse_recipe(recipe, rest, f"bytelm train {recipe.name}", _train_help())
    _join_processes(joining)
    recipe = _with_epochs(recipe, epochs) if epochs else recipe
    # Orbax raises again, here, what fails in its threads; their own tracebacks would be noise.
    threading.excepthook = sys.unraisablehook = lambda _: None
    try:
        outcome = train(recipe, run_dir)
    except DivergedError as error:
        print(f"bytelm train: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _leave(error)
    if not processes.is_first():
        return 0
    if outcome.interrupted and not outcome.step:
        print("stopped before the first step; nothing is lost, the same command starts again")
    elif outcome.interrupted:
        print(f"stopped: step {outcome.step} is saved in {run_dir}; the same command goes on")
    else:
        print(f"done: step {outcome.step} is saved in {run_dir}")
    return 0


def _train_help() -> str:
    return "\n".join(
        [
            "usage: bytelm train RECIPE [--data PATH …] [--run-dir DIR] [--steps N] [overrides]",
            "",
            "Trains RECIPE; resumes by itself when DIR (default runs/RECIPE) holds a checkpoint.",
            "Without --data it trains on the source of Python's standard library. Any field is",
            "overridden by its name, with or without its section (--train.batch-size 8,",
            "--batch-size 8); `bytelm train RECIPE --help` lists them all. Also understood:",
            *(f"  --{name} for --{field}" for name, field in ALIASES.items()),
            "  --save_path for --run-dir",
            "  --epochs N for the --steps that show each window N times",
            "  --distributed for one run over all the processes of a SLURM or MPI job or a TPU pod",
            "  --coordinator HOST:PORT --num-processes N --process-id I for the same elsewhere",
            "",
            "Example: bytelm train megabyte_tiny --steps 20 --run-dir runs/first",
            "",
            "recipes: " + ", ".join(recipes.names()),
        ]
    )


class _Joining(NamedTuple):
    """Whether this process is one of several, and what the command line says of them."""

    several: bool
    coordinator: str
    processes: int
    index: int | None


def _take_processes(argv: list[str]) -> tuple[_Joining, list[str]]:
    """What the command line says of processes, and what is left of it."""
    distributed, argv = take_flag(argv, "distributed")
    coordinator, argv = take_option(argv, "coordinator")
    numbers: list[int | None] = []
    for name in ("num_processes", "process_id"):
        text, argv = take_option(argv, name)
        if text and not coordinator:
            raise UsageError(f"--{name.replace('_', '-')}: needs --coordinator HOST:PORT")
        try:
            numbers.append(int(text) if text else None)
        except ValueError:
            raise UsageError(f"--{name.replace('_', '-')} {text}: must be a number") from None
    several = distributed or bool(coordinator)
    return _Joining(several, coordinator or "", numbers[0] or 0, numbers[1]), argv


def _join_processes(joining: _Joining) -> None:
    if not joining.several:
        processes.check_alone()
        return
    processes.join(joining.coordinator, joining.processes, joining.index)
    if processes.is_first():
        found = f"{jax.process_count()} processes, {jax.device_count()} devices"
        print(f"bytelm train: {found}", file=sys.stderr, flush=True)


def _leave(error: BaseException) -> NoReturn:
    """Ends a process that lost another one: nothing milder than this returns from a collective."""
    line = str(error).strip().splitlines()[0][:200]
    print(
        f"bytelm train: process {jax.process_index()} lost another one ({line}); the same command "
        "goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(processes.HUNG)


def _with_epochs(recipe: Recipe, epochs: str) -> Recipe:
    """The recipe with the steps, rounded up, that show each training window `epochs` times."""
    try:
        times = float(epochs)
    except ValueError:
        times = math.nan
    if not 0 < times < math.inf:
        raise UsageError(f"--epochs {epochs}: must be a number above 0")
    windows, _, _ = open_windows(recipe)
    steps = max(1, math.ceil(times * len(windows) / recipe.train.batch_size))
    return replace(recipe, train=replace(recipe.train, steps=steps))
