"""The weights that a new run starts from, if its recipe names any."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from bytelm.config import ModelConfig, PatchingContract, Recipe, require
from bytelm.export import patching_of
from bytelm.runs import find_export, is_run, load_recipe
from bytelm.starting import (
    export_step,
    keeps_optimizer,
    opened_source,
    origin_of,
    require_branch,
    require_fit,
    require_optimizer,
)
from bytelm_jax.interop import formats
from bytelm_jax.interop.convert import Float32Cast, in_torch_layout
from bytelm_jax.models import Params, abstract_params
from bytelm_jax.optimizers.build import at_step
from bytelm_jax.training import checkpoint
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training.checkpoint import Recovered
from bytelm_jax.training.patch_calibration import load_entropy_model
from bytelm_jax.training.step import TrainState


def read_config(path: Path) -> tuple[ModelConfig, PatchingContract | None]:
    """A `bytelm.starting.ReadConfig` for all that `bytelm import` reads; does not start JAX."""
    return formats.read_config(path), patching_of(formats.stored_extra(path))


def load_start(recipe: Recipe) -> tuple[Recipe, Params]:
    """The parameters that a new run does not draw, in float32, and the recipe with their origin.

    All of them from `train.init_from`, or those of the entropy model from `train.entropy_from`.
    Raises `ValueError` if they are missing, damaged, not finite or not those that were calibrated.
    """
    if recipe.train.entropy_from:
        only = not recipe.train.init_from
        require(only, "train.entropy_from: train.init_from brings an entropy model; leave it out")
        return recipe, load_entropy_model(recipe)
    if not recipe.train.init_from:
        check_branch(recipe)
        return recipe, {}
    _check_source(recipe)
    check_optimizer(recipe)
    step, params = _load(recipe.train.init_from)
    tensors = in_torch_layout(params)  # so that both packages find the same digest
    arrays = ((name, tensors[name].read()) for name in sorted(tensors))
    return replace(recipe, origin=origin_of(recipe.train.init_from, step, arrays)), params


def check_branch(recipe: Recipe) -> None:
    """Raises `ValueError` unless `train.branch_from` names a run that `recipe` can go on from."""
    if recipe.train.branch_from:
        with _opened_run(recipe.train.branch_from, False) as (_, step, source):
            require_branch(recipe, source, step)


@contextmanager
def _opened_run(named: str, arrays: bool) -> Iterator[tuple[Any, int, Recipe]]:
    """The checkpoints of a run folder of this package, the step that `named` names, its recipe."""
    with opened_source(named, arrays, arrays) as (path, which):
        require(is_run(path), f"{named}: is no run folder; check the spelling")
        ours = find_export(path, which) is None
        require(ours, f"{named}: PyTorch trained it; go on with `python -m bytelm_torch.train`")
        with checkpoint.open_checkpoints(path) as manager:
            yield manager, checkpoint.choose_step(manager, which), load_recipe(path)


def load_branch(recipe: Recipe, template: TrainState) -> tuple[Recipe, Recovered | None]:
    """The state that `train.branch_from` names, placed like `template`; and the recipe's origin.

    The state lacks what the run did not have as `recipe` has it: the optimizer's state, or an
    average of the weights. None where the recipe names no run.
    """
    named = recipe.train.branch_from
    if not named:
        return recipe, None
    with _opened_run(named, True) as (manager, step, source):
        kept = keeps_optimizer(recipe, source, template.params)
        wanted = (template.params, template.opt_state if kept else None)
        average = template.average if kept and source.train.average_decay else None
        begun = checkpoint.restore(manager, step, *wanted, average)
    marks = json.dumps(begun.metadata["fingerprints"]["params"])
    origin = f"{named} at step {step}, sha256:{hashlib.sha256(marks.encode()).hexdigest()[:16]}"
    return replace(recipe, origin=origin), begun


def check_optimizer(recipe: Recipe) -> None:
    """Raises `ValueError` unless `train.init_from` has the state that `train.init_optimizer` asks.

    Nothing is checked of a recipe that asks for none.
    """
    if not recipe.train.init_optimizer:
        return
    with opened_source(recipe.train.init_from, weights=False) as (path, which):
        ours = is_run(path) and find_export(path, which) is None
        source = load_recipe(path) if ours else None
    require_optimizer(recipe, source, abstract_params(recipe.model))


def make_state(
    recipe: Recipe,
    make: Callable[[], TrainState],
    template: TrainState,
    mesh: Mesh,
    begun: Recovered | None,
    trained: Params,
) -> TrainState:
    """The state at the first step: what is read back, `begun`, or that of `make` with `trained`."""
    if begun is None:
        state = make()
        if trained:
            state = state.begin_with(state.params | meshes.place(mesh, trained))
        if recipe.train.init_optimizer:
            with _opened_run(recipe.train.init_from, True) as (manager, step, _):
                read = checkpoint.restore(manager, step, template.params, template.opt_state)
            state = state._replace(opt_state=at_step(read.opt_state, 0))
        return state
    step = jax.device_put(begun.step, template.step.sharding).astype(template.step.dtype)
    state = TrainState(step, begun.params, begun.opt_state, begun.average)
    if begun.opt_state is None:
        state = state._replace(opt_state=at_step(make().opt_state, begun.step))
    if begun.average is None and template.average is not None:
        state = state._replace(average=template.average).begin_with(begun.params)
    return state


def _check_source(recipe: Recipe) -> None:
    """Raises `ValueError` unless the weights that `train.init_from` names fit; reads none."""
    named = recipe.train.init_from
    with opened_source(named, weights=False) as (path, _):
        theirs = load_recipe(path).model if is_run(path) else formats.read_config(path)
    if theirs == recipe.model:  # the usual case; tracing two models takes seconds
        return
    ours = {name: leaf.shape for name, leaf in abstract_params(recipe.model).items()}
    shapes = {name: leaf.shape for name, leaf in abstract_params(theirs).items()}
    require_fit(named, (theirs.vocab, shapes), (recipe.model.vocab, ours))


def _load(named: str) -> tuple[int | None, Params]:
    with opened_source(named) as (path, which):
        exported = find_export(path, which)
        if exported is None:
            _, params, step = checkpoint.load_run(path, which)
            return step, params
        _, params = formats.import_any(exported, cast=Float32Cast())
        return export_step(path, exported), params
