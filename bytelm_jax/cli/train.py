"""`bytelm train`: its command line, which is parsed without JAX; `run.py` does the work."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from bytelm import recipes
from bytelm.arguments import UsageError, take_flag, take_option
from bytelm.config import ModelConfig, PatchingContract, require_document_ends, require_length
from bytelm.config.lfbyte import require_prediction
from bytelm.train_options import HELP, RECIPES, read_options, take_recipe
from bytelm_jax.tools.machine import Machine
from bytelm_jax.tools.targets import Target, read_target


def train_command(argv: list[str]) -> int:
    """`bytelm train RECIPE …`: the options depend on the recipe, so its name comes first."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_train_help())
        return 0 if argv else 2
    named, rest = take_recipe(argv)
    epochs, rest = take_option(rest, "epochs")
    dry, rest = take_dry_run(rest)
    joining, rest = take_processes(rest)
    unlocked, rest = take_flag(rest, "no-lock")
    if dry and unlocked:
        raise UsageError("--no-lock: a dry run writes nothing; leave it out")
    if dry and (epochs or joining.several):
        raise UsageError("--dry-run: reads no data and joins no processes; leave those options out")
    recipe, run_dir, fields = read_options(named, rest, _read_config, "bytelm train", _train_help())
    if epochs and "train.steps" in fields:
        raise UsageError("--epochs: sets --train.steps; give only one of them")
    require_prediction(recipe.model)
    require_document_ends(recipe)
    require_length(recipe)
    times = _number_of_epochs(epochs) if epochs else None

    from bytelm_jax.cli import run  # the lines above need no JAX, so a mistake is reported at once

    return (
        run.dry_run(recipe, dry) if dry else run.run(recipe, run_dir, joining, times, not unlocked)
    )


def _read_config(path: Path) -> tuple[ModelConfig, PatchingContract | None]:
    from bytelm_jax.training.starting import read_config  # takes JAX

    return read_config(path)


def recipes_command(as_json: bool = False) -> int:
    """Lists the recipes: parameters, memory of parameters and AdamW's state, purpose.

    Example: bytelm recipes

    Args:
        as_json: print a JSON object a line.
    """
    for each in recipes.summaries():
        if as_json:
            print(json.dumps(each._asdict() | {"state_bytes": each.state_bytes}))
        else:
            size, memory = f"{each.parameters:,}", f"{each.state_bytes / 2**30:.2f} GiB"
            print(f"{each.name:24} {size:>13} {memory:>10}  {each.purpose}")
    return 0


def _number_of_epochs(text: str) -> float:
    try:
        times = float(text)
    except ValueError:
        times = math.nan
    if not 0 < times < math.inf:
        raise UsageError(f"--epochs {text}: must be a number above 0")
    return times


def _train_help() -> str:
    return "\n".join(
        [
            "usage: bytelm train RECIPE [--data PATH …] [--run-dir DIR] [--steps N] [FIELDS]",
            "",
            *HELP,
            "  --epochs N for the --steps that show each window N times",
            "  --run-dir gs://BUCKET/NAME or s3://BUCKET/NAME for a run on an object store",
            "  --no-lock to train although nothing can keep a second run out of the folder",
            "  --distributed for one run over all processes of a SLURM or MPI job or a pod",
            "  --coordinator HOST:PORT --num-processes N --process-id I for one run elsewhere",
            "  --dry-run --devices N to compile the step for N simulated devices and print",
            "    memory, collectives and their share of a step; nothing is read or written.",
            "    With it --json, --chip H100 --mfu 0.4 --link-gbytes 50 (GB/s per device);",
            "    --compile-for v5e:16x16 (or v4, v5p, v6e, v7, h100:8) for the figures of the",
            "    compiler of these TPUs (pip install 'bytelm[aot]') or GPUs ('bytelm[cuda]');",
            "    --fit for the largest batch",
            "",
            "Example: bytelm train megabyte_tiny --steps 20 --run-dir runs/first",
            "",
            RECIPES,
        ]
    )


class Joining(NamedTuple):
    """Whether this process is one of several, and what the command line says about them."""

    several: bool
    coordinator: str
    processes: int
    process_id: int | None


def take_processes(argv: list[str]) -> tuple[Joining, list[str]]:
    """The command line's description of processes, and the remaining arguments."""
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


class DryRun(NamedTuple):
    """A requested dry run: for which machine, and how to print it."""

    machine: Machine
    as_json: bool
    target: Target | None = None
    """The devices of `--compile-for`."""
    fit: bool = False
    """Whether to look for the largest batch."""


def take_dry_run(argv: list[str]) -> tuple[DryRun | None, list[str]]:
    """The command line's description of a dry run, and the remaining arguments."""
    wanted, argv = take_flag(argv, "dry-run")
    as_json, argv = take_flag(argv, "json")
    fit, argv = take_flag(argv, "fit")
    chip, argv = take_option(argv, "chip")
    asked, argv = take_option(argv, "compile_for")
    target = None if asked is None else read_target(asked)
    if target and chip:
        raise UsageError("--chip: --compile-for names it; leave it out")
    machine = Machine()
    machine = machine._replace(chip=target.chip.name if target else chip or machine.chip)
    numbers: dict[str, float] = {}
    for name in ("mfu", "link_gbytes"):
        text, argv = take_option(argv, name)
        try:
            numbers |= {name: float(text)} if text else {}
        except ValueError:
            raise UsageError(f"--{name.replace('_', '-')} {text}: must be a number") from None
    if not wanted and (as_json or chip or numbers or target or fit):
        raise UsageError(
            "--json, --chip, --mfu, --link-gbytes, --compile-for, --fit: need --dry-run"
        )
    if not wanted:
        return None, argv
    machine = machine._replace(**numbers)
    machine.check()
    return DryRun(machine, as_json, target, fit), argv
