"""`bytelm train`: its command line, the processes of a run, how a run ends, and dry runs."""

import json
import math
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax

from bytelm import recipes
from bytelm.config import Recipe, require_document_ends
from bytelm.config.lfbyte import require_prediction
from bytelm_jax.cli.arguments import (
    ALIASES,
    UsageError,
    expand_names,
    parse_recipe,
    take_flag,
    take_option,
)
from bytelm_jax.tools import dry_run
from bytelm_jax.tools.machine import Machine
from bytelm_jax.training import processes
from bytelm_jax.training.loop import open_windows, train
from bytelm_jax.training.reporter import DivergedError


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
    dry, rest = take_dry_run(rest)
    joining, rest = take_processes(rest)
    if dry and (epochs or joining.several):
        raise UsageError("--dry-run: reads no data and joins no processes; leave those options out")
    run_dir = Path(run_dir or Path("runs") / recipe.name)
    if epochs and any(a.startswith("--train.steps") for a in expand_names(recipe, rest)):
        raise UsageError("--epochs: sets --train.steps; give one of them")
    recipe = parse_recipe(recipe, rest, f"bytelm train {recipe.name}", _train_help())
    if dry:
        return _dry_run(recipe, dry)
    join_processes(joining, "train")
    recipe = _with_epochs(recipe, epochs) if epochs else recipe
    # Orbax raises again, here, what fails in its threads; their own tracebacks would be noise.
    threading.excepthook = sys.unraisablehook = lambda _: None
    dry_run.require_memory(recipe)
    try:
        outcome = train(recipe, run_dir)
    except DivergedError as error:
        print(f"bytelm train: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            _leave(error)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(_out_of_memory(recipe, error), file=sys.stderr)
        return 1
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
            "  --dry-run --devices N to compile the step for N simulated devices and print memory,",
            "    collectives and their share of a step, reading and writing nothing; and with it",
            "    --json, --chip H100 --mfu 0.4 --link-gbytes 50 (GB/s of each device)",
            "",
            "Example: bytelm train megabyte_tiny --steps 20 --run-dir runs/first",
            "",
            "recipes: " + ", ".join(recipes.names()),
        ]
    )


class Joining(NamedTuple):
    """Whether this process is one of several, and what the command line says of them."""

    several: bool
    coordinator: str
    processes: int
    index: int | None


def take_processes(argv: list[str]) -> tuple[Joining, list[str]]:
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
    return Joining(several, coordinator or "", numbers[0] or 0, numbers[1]), argv


def join_processes(joining: Joining, command: str) -> None:
    """Joins the processes that the command line speaks of; the first one says how many came."""
    if not joining.several:
        processes.check_alone()
        return
    processes.join(joining.coordinator, joining.processes, joining.index)
    if processes.is_first():
        found = f"{jax.process_count()} processes, {jax.device_count()} devices"
        print(f"bytelm {command}: {found}", file=sys.stderr, flush=True)


class DryRun(NamedTuple):
    """A dry run is asked for: on which machine, and how to print."""

    machine: Machine
    as_json: bool


def take_dry_run(argv: list[str]) -> tuple[DryRun | None, list[str]]:
    """What the command line says of a dry run, and what is left of it."""
    wanted, argv = take_flag(argv, "dry-run")
    as_json, argv = take_flag(argv, "json")
    chip, argv = take_option(argv, "chip")
    machine = Machine()
    machine = machine._replace(chip=chip or machine.chip)
    numbers: dict[str, float] = {}
    for name in ("mfu", "link_gbytes"):
        text, argv = take_option(argv, name)
        try:
            numbers |= {name: float(text)} if text else {}
        except ValueError:
            raise UsageError(f"--{name.replace('_', '-')} {text}: must be a number") from None
    if not wanted and (as_json or chip or numbers):
        raise UsageError("--json, --chip, --mfu, --link-gbytes: need --dry-run")
    return (DryRun(machine._replace(**numbers), as_json) if wanted else None), argv


def _dry_run(recipe: Recipe, asked: DryRun) -> int:
    require_prediction(recipe.model)
    require_document_ends(recipe)
    found = dry_run.dry_run(recipe, asked.machine)
    if asked.as_json:
        print(json.dumps(dry_run.as_json(recipe.name, found)))
    else:
        print(dry_run.describe(recipe.name, found))
    return 0


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


def _out_of_memory(recipe: Recipe, error: BaseException) -> str:
    run, line = recipe.train, " ".join(str(error).split())[:200]
    return (
        f"bytelm train: out of memory with batch_size={run.batch_size} ({line}); add --remat or a "
        "larger --fsdp, or in another --run-dir lower it or raise accumulation_steps"
    )


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
