"""Starting a run from weights that exist: which they are, and what they decide of the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.config import ByteVocab, ModelConfig, PatchingContract, Recipe, require
from bytelm.remote.copies import NO_ARRAYS, local_copy
from bytelm.runs import is_run, load_recipe, saved_recipe

ReadConfig = Callable[[Path], tuple[ModelConfig, PatchingContract | None]]
"""What an export, or weights of another project, say about their model, read without weights."""


def split_source(named: str) -> tuple[Path, str]:
    """Path and checkpoint of `train.init_from`: PATH, or PATH@CHECKPOINT if no such path exists."""
    path, at, checkpoint = named.rpartition("@")
    if at and path and checkpoint and not Path(named).exists():
        return Path(path), checkpoint
    return Path(named), "latest"


@contextmanager
def opened_source(named: str, weights: bool = True) -> Iterator[tuple[Path, str]]:
    """A folder of this machine with what `train.init_from` names, and the checkpoint.

    Of a run at an address the weights of that checkpoint alone are fetched, if any are wanted.
    Errors of the block name the address.
    """
    path, checkpoint = split_source(named)
    with local_copy(path, checkpoint if weights else NO_ARRAYS) as copy:
        yield copy, checkpoint


def with_source(recipe: Recipe, named: str, run_dir: Path | None, read: ReadConfig) -> Recipe:
    """`recipe` with the model and patches of the weights that `train.init_from` names.

    A run that exists keeps its own model: its source may be gone. Raises `ValueError` for a source
    that cannot be read and for one of another architecture.
    """
    saved = saved_recipe(run_dir) if run_dir else None
    if saved is not None:
        model, patching = saved.model, saved.patching
    else:
        with opened_source(named, weights=False) as (path, _):
            require(path.exists(), f"train.init_from={named}: does not exist; check the spelling")
            if is_run(path):
                source = load_recipe(path)
                model, patching = source.model, source.patching
            else:
                model, patching = read(path)
        ours, theirs = recipe.model.architecture, model.architecture
        require(
            ours == theirs,
            f"train.init_from={named}: holds a model of architecture {theirs}, and {recipe.name} "
            f"is {ours}; name a recipe of that architecture",
        )
    train = replace(recipe.train, init_from=named)
    return replace(recipe, model=model, patching=patching, train=train)


def keep_source(recipe: Recipe, run_dir: Path) -> Recipe:
    """`recipe` with the source of the run that `run_dir` holds, if there is one.

    Raises `ValueError` if the recipe names another.
    """
    saved, named = saved_recipe(run_dir), recipe.train.init_from
    if saved is None:
        return recipe
    began = saved.train.init_from
    same = not named or (bool(began) and Path(named) == Path(began))
    says = f"began from {saved.origin}" if began else "did not begin from other weights"
    hint = "leave it out or choose another run_dir"
    require(same, f"train.init_from={named}: {run_dir} {says}; {hint}")
    train = replace(recipe.train, init_from=began)
    return replace(recipe, train=train, origin=saved.origin)


Shapes = Mapping[str, tuple[int, ...]]


def require_fit(
    named: str, theirs: tuple[ByteVocab, Shapes], ours: tuple[ByteVocab, Shapes]
) -> None:
    """Raises `ValueError` for the first parameter that has no place in this model, or none there.

    Each side has its id map and, in the same layout, shapes by parameter name.
    """
    same = theirs[0] == ours[0]
    require(
        same, f"train.init_from={named}: has another id map, {theirs[0]}; leave model.vocab out"
    )
    for name in [*ours[1], *theirs[1]]:
        there, here = (shapes.get(name, "missing") for _, shapes in (theirs, ours))
        require(
            there == here,
            f"train.init_from={named}: {name} is {there} there and {here} in this model; leave out "
            "the model's options that change it",
        )


def export_step(path: Path, exported: Path | None) -> int | None:
    """The step of an export that lies in the run folder `path`; None where that is the export."""
    return int(exported.name) if exported and exported != path else None


def origin_of(named: str, step: int | None, arrays: Iterable[tuple[str, Any]]) -> str:
    """What `Recipe.origin` says of float32 weights: their name, step and SHA-256.

    `arrays` are those of the PyTorch twin, by name and in the order of names.
    """
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    at = "" if step is None else f" at step {step}"
    return f"{named}{at}, sha256:{digest.hexdigest()[:16]}"
