"""A dry run in a process of its own: libtpu reads its environment once, when it is loaded.

`python -m bytelm_jax.tools.compile_process` reads a job from standard input and prints its answer.
"""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from typing import NamedTuple

from bytelm.config import Recipe
from bytelm.config.serialize import from_dict, to_dict
from bytelm_jax.tools import dry_run, dry_run_text
from bytelm_jax.tools.compiled import ENVIRONMENT
from bytelm_jax.tools.machine import Machine
from bytelm_jax.tools.targets import Target, read_target

_LIBRARIES = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin")}
"""Platform → the packages of which one is its compiler."""


class Job(NamedTuple):
    """A dry run, and how to print it."""

    recipe: Recipe
    machine: Machine
    target: Target | None
    fit: bool
    as_json: bool


def answer(job: Job) -> str:
    """The text that `bytelm train --dry-run` prints; raises `ValueError` as `dry_run` does."""
    recipe, lines, compiled = job.recipe, [], None
    if job.fit:
        recipe, needed, compiled = dry_run.largest_batch(recipe, job.machine, job.target)
        lines = [
            f"the largest batch that fits: --batch-size {recipe.train.batch_size}, "
            f"{needed / 2**30:.3f} GiB a device"
        ]
    estimate = dry_run.dry_run(recipe, job.machine, job.target, compiled)
    if job.as_json:
        found = dry_run_text.as_json(recipe.name, estimate)
        found |= {"batch_size": recipe.train.batch_size} if job.fit else {}
        return json.dumps(found, allow_nan=False)
    return "\n".join([*lines, dry_run_text.describe(recipe.name, estimate)])


def in_its_own_process(job: Job) -> int:
    """Prints the answer of a process with libtpu's environment, or a line; gives the exit code."""
    text = json.dumps(
        {
            "recipe": to_dict(job.recipe),
            "machine": job.machine._asdict(),
            "target": job.target.name if job.target else "",
            "fit": job.fit,
            "as_json": job.as_json,
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "bytelm_jax.tools.compile_process"],
        input=text,
        env=os.environ | ENVIRONMENT,
        text=True,
        stderr=subprocess.PIPE,
    )
    if not done.returncode:
        return 0
    # Of the last lines: libtpu writes lines of its own.
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    refused = done.returncode == 2 and bool(lines)
    assert job.target is not None, "a compiler is asked about its target"
    said = lines[-1] if refused else _failure(job.target, done.returncode, lines)
    print(said, file=sys.stderr)
    return 2


def _failure(target: Target, status: int, lines: list[str]) -> str:
    """One line about a compiler that failed; the usual cause is another version than JAX's own."""
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    why = errors[-1][:300] if errors else f"signal {-status}" if status < 0 else f"status {status}"
    compiler, hint = f"the compiler for {target.chip.name}", ""
    for name in _LIBRARIES[target.chip.platform]:
        if found := _version(name):
            asked = [each for each in metadata.requires("jax") or [] if each.startswith(name)]
            hint = f"; jax {_version('jax')} asks for {asked[0].partition(';')[0]}" if asked else ""
            compiler = f"{name} {found}"
            break
    return f"bytelm train: compile_for={target.name}: {compiler} failed ({why}){hint}"


def _version(package: str) -> str:
    """The installed version of a package; nothing if its metadata are not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def main() -> int:
    """Answers the job on standard input."""
    given = json.load(sys.stdin)
    recipe = from_dict(Recipe, given["recipe"])
    target = read_target(given["target"]) if given["target"] else None
    job = Job(recipe, Machine(**given["machine"]), target, given["fit"], given["as_json"])
    try:
        print(answer(job))
    except ValueError as error:
        print(f"bytelm train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
