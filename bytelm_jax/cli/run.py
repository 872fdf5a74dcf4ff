"""`bytelm train` after its command line is parsed: processes, training, endings, dry runs."""

import math
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import jax

from bytelm.config import Recipe
from bytelm.config.base import LARGEST_INTEGER
from bytelm.run_data import open_windows
from bytelm.runs import DivergedError, keep_rules
from bytelm.storage.stores import called
from bytelm_jax.cli.train import DryRun, Joining
from bytelm_jax.tools import compile_process
from bytelm_jax.tools import dry_run as estimates
from bytelm_jax.training import processes
from bytelm_jax.training.loop import train


def run(
    recipe: Recipe, run_dir: Path, joining: Joining, epochs: float | None, locked: bool = True
) -> int:
    """Trains; `epochs` replaces the recipe's number of steps. Returns the exit code."""
    join_processes(joining, "train")
    with processes.agreement():
        recipe = _with_epochs(keep_rules(run_dir, recipe), epochs) if epochs else recipe
        estimates.require_memory(recipe)
    # Orbax raises errors of its threads again, here; their own tracebacks would be noise.
    threading.excepthook = sys.unraisablehook = lambda _: None
    try:
        outcome = train(recipe, run_dir, locked)
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
    place = called(run_dir)
    if outcome.interrupted and not outcome.step:
        print("stopped before the first step; nothing is lost; run the same command again")
    elif outcome.interrupted:
        print(f"stopped: step {outcome.step} is saved in {place}; run the same command to continue")
    else:
        print(f"done: step {outcome.step} is saved in {place}")
    return 0


def join_processes(joining: Joining, command: str) -> None:
    """Joins the processes that the command line describes; the first one reports their number."""
    if not joining.several:
        processes.check_alone()
        return
    processes.join(joining.coordinator, joining.processes, joining.process_id)
    if processes.is_first():
        joined = f"{jax.process_count()} processes, {jax.device_count()} devices"
        print(f"bytelm {command}: {joined}", file=sys.stderr, flush=True)


def dry_run(recipe: Recipe, asked: DryRun) -> int:
    """Prints the memory and time that a run would take, reading and writing nothing."""
    job = compile_process.Job(recipe, asked.machine, asked.target, asked.fit, asked.as_json)
    if estimates.can_compile(asked.target):
        return compile_process.in_its_own_process(job)
    print(compile_process.answer(job))
    return 0


def _with_epochs(recipe: Recipe, epochs: float) -> Recipe:
    """The recipe with the steps, rounded up, that show each training window `epochs` times."""
    windows = open_windows(recipe).windows
    steps = max(1, math.ceil(epochs * len(windows) / recipe.train.batch_size))
    if steps > LARGEST_INTEGER:
        most = LARGEST_INTEGER * recipe.train.batch_size // len(windows)
        raise ValueError(f"epochs={epochs:g}: must be at most {most}")
    return replace(recipe, train=replace(recipe.train, steps=steps))


def _out_of_memory(recipe: Recipe, error: BaseException) -> str:
    run, line = recipe.train, " ".join(str(error).split())[:200]
    return (
        f"bytelm train: out of memory with batch_size={run.batch_size} ({line}); add --remat or a "
        "larger --fsdp or --tensor, raise accumulation_steps, or in another --run-dir lower it"
    )


def _leave(error: BaseException) -> NoReturn:
    """Ends a process that has lost another one: nothing milder returns from a collective."""
    line = str(error).strip().splitlines()[0][:200]
    print(
        f"bytelm train: process {jax.process_index()} lost contact with another one ({line}); "
        "run the same command to continue from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(processes.HUNG)
