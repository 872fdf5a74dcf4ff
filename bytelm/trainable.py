"""Which parameters a run trains, and which of them at another learning rate.

Both packages ask here, by the names of parameters that they share.
"""

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from bytelm.config import OptimizerConfig, Recipe, parse_scales, require
from bytelm.leaves import is_adapter, torch_name


class Trainable(NamedTuple):
    """What a run does with each parameter; what is not named here trains at the usual rate."""

    frozen: frozenset[str] = frozenset()
    """Names of the parameters that have no gradient, no optimizer state and no update."""
    scales: dict[str, float] = {}  # noqa: RUF012
    """Name → the number that multiplies the parameter's finished update, where that is not 1."""


EVERYTHING = Trainable()
"""Every parameter trains at the usual rate."""


def trainable(recipe: Recipe, names: Iterable[str]) -> Trainable:
    """What `recipe` does with the parameters called `names`, as the JAX package calls them.

    A pattern of `train.freeze` or `train.learning_rate_scale` matches a parameter by that name or
    by its name in the PyTorch twin's state dict, which has `weight` for `kernel`, `embedding` and
    `scale`. Where adapters train, nothing else does.

    Raises `ValueError` for a pattern that matches nothing or has no effect, if nothing is left to
    train, and for a scale under which weights would grow without bound.
    """
    names, run = list(names), recipe.train
    frozen = {name for name in names if name.startswith(recipe.model.frozen_prefixes)}
    if run.lora_rank:
        frozen |= {name for name in names if not is_adapter(name)}
    for pattern in run.freeze:
        frozen |= _matches("freeze", pattern, names)
    left = set(names) - frozen
    require(bool(left), f"train.freeze={_listed(run.freeze)}: leaves nothing to train")
    scales: dict[str, float] = {}
    owners: dict[str, str] = {}
    numbers = parse_scales(run.learning_rate_scale)
    for pattern, number in numbers.items():
        found = _matches("learning_rate_scale", pattern, names)
        where = f"train.learning_rate_scale={pattern}={number:g}"
        require(bool(found & left), f"{where}: all that it matches is frozen; leave it out")
        _require_rate(recipe.optimizer, number, where)
        scales |= dict.fromkeys(found & left, number)
        owners |= dict.fromkeys(found & left, pattern)
    for pattern in numbers:
        used = pattern in owners.values()
        why = "later entries match all that it matches; leave it out or write it last"
        require(used, f"train.learning_rate_scale={pattern}: {why}")
    return Trainable(frozenset(frozen), {k: v for k, v in scales.items() if v != 1})


def _matches(field: str, pattern: str, names: list[str]) -> set[str]:
    """The names that `pattern` matches; `ValueError` if there are none."""
    found = {
        name
        for name in names
        if fnmatchcase(name, pattern) or fnmatchcase(torch_name(name), pattern)
    }
    if not found:
        near = ", ".join(_near(pattern, names))
        raise ValueError(f"train.{field}={pattern}: matches no parameter; near names: {near}")
    return found


def _near(pattern: str, names: list[str]) -> list[str]:
    """A few patterns and names that exist and resemble `pattern`."""
    modules: dict[str, None] = {}  # in order, each once
    for name in names:
        parts = name.split(".")[:-1]
        modules |= {".".join(parts[:end]): None for end in range(1, len(parts) + 1)}
    choices = [*(f"{module}.*" for module in modules), *map(torch_name, names)]
    return get_close_matches(pattern, choices, n=3, cutoff=0.3) or choices[:3]


def _require_rate(optimizer: OptimizerConfig, scale: float, where: str) -> None:
    """Raises `ValueError` for a scale that makes the optimizer's rate one that it refuses."""
    try:
        replace(optimizer, learning_rate=optimizer.learning_rate * scale)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _listed(patterns: Iterable[str]) -> str:
    return " ".join(patterns)
