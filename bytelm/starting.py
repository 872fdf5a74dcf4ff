"""Starting a run from weights that exist: which they are, and what they decide of the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bytelm.config import ByteVocab, ModelConfig, PatchingContract, Recipe, require, to_dict
from bytelm.remote.copies import NO_ARRAYS, local_copy
from bytelm.runs import find_export, is_run, load_recipe, saved_recipe
from bytelm.trainable import trainable

ReadConfig = Callable[[Path], tuple[ModelConfig, PatchingContract | None]]
"""What an export, or weights of another project, say about their model, read without weights."""

Package = Literal["JAX", "PyTorch"]
"""Which of the two trains a run, and alone goes on with it."""

_COMMANDS: dict[Package, str] = {"JAX": "bytelm train", "PyTorch": "python -m bytelm_torch.train"}


def split_source(named: str) -> tuple[Path, str]:
    """Path and checkpoint of `train.init_from`: PATH, or PATH@CHECKPOINT if no such path exists."""
    path, at, checkpoint = named.rpartition("@")
    if at and path and checkpoint and not Path(named).exists():
        return Path(path), checkpoint
    return Path(named), "latest"


@contextmanager
def opened_source(
    named: str, weights: bool = True, everything: bool = False
) -> Iterator[tuple[Path, str]]:
    """A folder of this machine with what `train.init_from` names, and the checkpoint.

    Of a run at an address the weights of that checkpoint alone are fetched, if any are wanted, or
    `everything` of it.
    Errors of the block name the address.
    """
    path, checkpoint = split_source(named)
    try:
        with local_copy(path, checkpoint if weights else NO_ARRAYS, everything) as copy:
            yield copy, checkpoint
    except ValueError as error:
        if not str(error).startswith("checkpoint="):
            raise
        raise ValueError(f"{named}: {error}") from None


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


ANEW = (
    "the optimizer's state begins anew: it is another one, or other parameters train, or they "
    "train at other rates"
)
"""What a branch says that does not go on with the state of the optimizer that it found."""


def branch_recipe(named: str, run_dir: Path) -> Recipe:
    """The recipe of the run that `train.branch_from` names, as the branch in `run_dir` begins.

    A branch that exists has its own recipe: its source may be gone. Raises `ValueError` for what is
    no run folder.
    """
    saved = saved_recipe(run_dir)
    if saved is not None:
        return replace(saved, train=replace(saved.train, branch_from=named))
    with opened_source(named, weights=False) as (path, _):
        require(is_run(path), f"train.branch_from={named}: is no run folder; check the spelling")
        recipe = load_recipe(path)
    begins = {"init_from": "", "init_optimizer": False, "branch_from": named}
    return replace(recipe, train=replace(recipe.train, **begins), origin="")


@contextmanager
def opened_run(named: str, package: Package, arrays: bool) -> Iterator[tuple[Path, str, Recipe]]:
    """A run folder of `package`, on this machine, the checkpoint that `named` names, its recipe.

    `arrays` says whether that checkpoint is read, or only what describes it.
    """
    with opened_source(named, arrays, arrays) as (path, which):
        require(is_run(path), f"{named}: is no run folder; check the spelling")
        trainer = _trainer(path, which)
        hint = f"{trainer} trained it; go on with `{_COMMANDS[trainer]}`"
        require(trainer == package, f"{named}: {hint}")
        yield path, which, load_recipe(path)


def check_run(
    recipe: Recipe,
    package: Package,
    step_of: Callable[[Path, str], int],
    names: Callable[[], Iterable[str]],
) -> None:
    """Raises `ValueError` unless the run that `recipe` goes on from has what it takes from there.

    That is all of it for `train.branch_from`, and the optimizer's state for `train.init_optimizer`.
    Reads no arrays. `step_of` gives the step of a checkpoint of a folder of `package`, and `names`
    those of the parameters, which takes seconds, so it is called only if they are needed.
    """
    run = recipe.train
    if run.branch_from:
        with opened_run(run.branch_from, package, arrays=False) as (path, which, source):
            _require_branch(recipe, source, step_of(path, which))
    if run.init_optimizer:
        with opened_source(run.init_from, weights=False) as (path, which):
            ours = is_run(path) and _trainer(path, which) == package
            source = load_recipe(path) if ours else None
        _require_optimizer(recipe, source, names())


def _trainer(run_dir: Path, checkpoint: str) -> Package:
    return "JAX" if find_export(run_dir, checkpoint) is None else "PyTorch"


def _require_branch(recipe: Recipe, source: Recipe, step: int) -> None:
    """Raises `ValueError` if `recipe` cannot go on from step `step` of the run `source`."""
    named, run = f"train.branch_from={recipe.train.branch_from}", recipe.train
    before, after = to_dict(source.model), to_dict(recipe.model)
    for name in before:
        same = before[name] == after[name]
        require(same, f"model.{name}={after[name]}: {named} has {before[name]}; leave it out")
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        theirs, ours = getattr(source.train, name), getattr(run, name)
        hint = "keep that, or start anew by train.init_from"
        require(theirs == ours, f"train.{name}={ours}: {named} has {theirs}; {hint}")
    begins = f"{named}: begins at step {step}, so train.steps={run.steps} is over; give more steps"
    require(step < run.steps, begins)
    changes = recipe.optimizer.name != source.optimizer.name
    counted = changes and hasattr(recipe.optimizer, "controller")
    hint = "take another optimizer, or start anew by train.init_from"
    where = f"optimizer.name={recipe.optimizer.name}"
    require(not counted, f"{where}: its agent counts from step 0, which a branch is past; {hint}")


def keeps_optimizer(recipe: Recipe, source: Recipe, names: Iterable[str]) -> bool:
    """Whether an optimizer of `recipe` takes the state that the run `source` left.

    That is so for the same class over the same parameters at the same scales of the rate, which
    PyTorch keeps in groups; `names` are those of the model.
    """
    names = list(names)
    same = recipe.optimizer.name == source.optimizer.name
    return same and trainable(recipe, names) == trainable(source, names)


def _require_optimizer(recipe: Recipe, source: Recipe | None, names: Iterable[str]) -> None:
    """Raises `ValueError` if `train.init_from`, the run `source`, has no state for the optimizer.

    None is a source that is no run folder of the package that asks.
    """
    named = f"train.init_optimizer: {recipe.train.init_from}"
    if source is None:
        raise ValueError(f"{named} is no run folder of this package; leave it out")
    theirs, ours = source.optimizer.name, recipe.optimizer.name
    require(theirs == ours, f"{named} was trained with {theirs}, not with {ours}; leave it out")
    plain = not (recipe.train.lora_rank or source.train.lora_rank)
    require(plain, f"{named}: adapters begin anew, and so does their optimizer; leave it out")
    kept = keeps_optimizer(recipe, source, names)
    why = "trained other parameters, or at other rates, than train.freeze and "
    why += "train.learning_rate_scale say"
    require(kept, f"{named} {why}; leave it out")


def keep_source(recipe: Recipe, run_dir: Path) -> Recipe:
    """`recipe` with the source of the run that `run_dir` holds, if there is one.

    Raises `ValueError` if the recipe names another.
    """
    saved = saved_recipe(run_dir)
    if saved is None:
        return recipe
    hint = "leave it out or choose another run_dir"
    for field in ("init_from", "branch_from"):
        named, began = getattr(recipe.train, field), getattr(saved.train, field)
        same = not named or (bool(began) and Path(named) == Path(began))
        says = f"began from {saved.origin}" if saved.origin else "did not begin from other weights"
        require(same, f"train.{field}={named}: {run_dir} {says}; {hint}")
    kept = {name: getattr(saved.train, name) for name in _SOURCES}
    train = replace(recipe.train, **kept)
    return replace(recipe, train=train, origin=saved.origin)


_SOURCES = ("init_from", "init_optimizer", "branch_from")
"""Fields of `TrainConfig` that say what a run begins from, which stays so when it goes on."""

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
    """What `Recipe.origin` says of weights: their name, step and SHA-256.

    `arrays` are those of the PyTorch twin in float32, by name and in the order of names, which
    gives both packages one origin; or what else tells these weights from others.
    """
    digest = hashlib.sha256()
    for name, array in arrays:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    at = "" if step is None else f" at step {step}"
    return f"{named}{at}, sha256:{digest.hexdigest()[:16]}"
