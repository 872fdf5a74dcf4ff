"""A dry run in a process of its own: libtpu reads its environment once, when it is loaded.

`python -m bytelm_jax.tools.compile_process` reads a job from standard input and prints its answer.
"""

import json
import os
import subprocess
import sys
from typing import NamedTuple

from bytelm.config import Recipe
from bytelm.config.serialize import from_dict, to_dict
from bytelm_jax.tools import dry_run, dry_run_text
from bytelm_jax.tools.compiled import ENVIRONMENT
from bytelm_jax.tools.machine import Machine
from bytelm_jax.tools.targets import Target, read_target


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
    """Prints the answer of a process with libtpu's environment; gives that process's exit code."""
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
    if done.returncode:  # the last line: libtpu writes lines of its own
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr)
    return done.returncode


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
