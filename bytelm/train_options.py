"""The command line that both packages' trainers understand: a recipe, its folder, and overrides."""

import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from bytelm import recipes
from bytelm.arguments import (
    ALIASES,
    UsageError,
    as_options,
    expand_names,
    parse_recipe,
    take_option,
)
from bytelm.config import OPTIMIZER_CONFIGS, Recipe
from bytelm.recipe_files import find_recipe
from bytelm.runs import is_run
from bytelm.starting import ReadConfig, branch_recipe, split_source, with_source
from bytelm.storage.stores import tidy

RUN_DIR = ("run_dir", "save_path")
"""The names of the option for the run folder."""

BRANCH = ("branch_from", "train.branch_from")
"""The names of the option for the run of a branch."""

HELP = (
    "Trains RECIPE: a name that `bytelm recipes` lists, or a JSON or YAML file that",
    "holds all fields, like a run's config.json, or only what differs from a recipe,",
    'as in {"base": "megabyte_132m"}. RECIPE can also be a run folder, which',
    "continues with its own options, or with --run-dir is the recipe of a new run.",
    "If DIR (default runs/RECIPE) has a checkpoint, the run resumes from it. Without",
    "--data it trains on the source of Python's standard library. Override any field",
    "by its name, with or without its section (--train.batch-size 8, --batch-size 8,",
    "train.batch_size=8); `RECIPE --help` lists them all. Also understood:",
    "  --optimizer NAME (--optimizer.name NAME): one of",
    f"    {', '.join(OPTIMIZER_CONFIGS)};",
    "    `RECIPE --optimizer NAME --help` lists its fields",
    *(f"  --{name} for --{field}" for name, field in ALIASES.items()),
    "  --save_path for --run-dir",
    "  --init-from PATH[@CHECKPOINT] to start from the weights and the model of a run",
    "    folder, an export, or anything else that `bytelm import` reads",
    "  --branch-from RUN[@STEP] --run-dir NEW instead of RECIPE, to continue from a",
    "    step of a run with another rate, other data or another optimizer",
)
"""What the help of both trainers says, a line each."""

RECIPES = textwrap.fill("recipes: " + ", ".join(recipes.names()), 80, subsequent_indent="  ")
"""The last lines of that help."""


class Asked(NamedTuple):
    """What a command line asks for."""

    recipe: Recipe
    run_dir: Path
    fields: frozenset[str]
    """The fields that it names, as `section.field`."""


def take_recipe(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe that a command line names first, and the other arguments, written as options.

    It names none where a branch has the recipe of its run.
    """
    options = as_options(argv)
    branch, _ = take_option(options, *BRANCH)
    if branch and options[0].startswith("-"):
        return "", options
    if not argv[0] or argv[0].startswith("-"):
        raise UsageError(
            f"{argv[0] or 'RECIPE'}: name the recipe first: {', '.join(recipes.names())}"
        )
    return argv[0], as_options(argv[1:])


def read_options(
    named: str, argv: Sequence[str], read: ReadConfig, prog: str, description: str
) -> Asked:
    """The recipe `named` as `argv` changes it; `read` opens what `--init-from` names.

    Raises `ValueError` for what does not exist or does not fit.
    """
    place, argv = take_option(argv, *RUN_DIR)
    branch, argv = take_option(argv, *BRANCH)
    recipe = _branch(named, branch, place) if branch else find_recipe(named)
    run_dir = _run_folder(place, "" if branch else named, recipe)
    source, argv = take_option(argv, "init_from", "train.init_from")
    if source:
        recipe = with_source(recipe, source, run_dir, read)
    options = [argument.partition("=")[0] for argument in expand_names(recipe, argv)]
    fields = frozenset(o[2:].replace("-", "_") for o in options if o.startswith("--"))
    recipe = parse_recipe(recipe, argv, f"{prog} {recipe.name}", description)
    _refuse_ineffective(recipe, fields)
    return Asked(recipe, run_dir, fields)


def run_folder(argv: Sequence[str]) -> Path:
    """The run folder that the arguments of `bytelm train` ask for; raises `ValueError`."""
    named, rest = take_recipe(argv)
    place, _ = take_option(rest, *RUN_DIR)
    return Path(place) if place else _run_folder(place, named, find_recipe(named))


def _run_folder(place: str | None, named: str, recipe: Recipe) -> Path:
    own = named and is_run(Path(named))
    return Path(place or (named if own else Path("runs") / recipe.name))


def _refuse_ineffective(recipe: Recipe, fields: Collection[str]) -> None:
    """Raises `UsageError` for a field of the model that is named and has no effect on it."""
    for name, setting in recipe.model.ineffective.items():
        for field in sorted(fields):
            if f"{field}.".startswith(f"model.{name}."):
                option = "--" + field.replace("_", "-")
                raise UsageError(f"{option}: has no effect with --model.{setting}; leave it out")


def _branch(named: str, branch: str, place: str | None) -> Recipe:
    """The recipe of a branch; raises `ValueError` for a command line that names none."""
    if named:
        raise UsageError(f"{named}: --branch-from {branch} has a recipe; leave {named} out")
    if not place:
        raise UsageError(f"--branch-from {branch}: name a new folder for the branch by --run-dir")
    source, _ = split_source(branch)
    if tidy(source) == tidy(place):
        raise UsageError(f"--run-dir {place}: is the run itself; name a new folder for the branch")
    return branch_recipe(branch, Path(place))
