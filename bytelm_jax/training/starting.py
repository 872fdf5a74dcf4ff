"""The weights that a new run starts from, if its recipe names any."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bytelm.config import ModelConfig, PatchingContract, Recipe, require
from bytelm.export import patching_of
from bytelm.runs import find_export, is_run, load_recipe
from bytelm.starting import (
    check_run,
    export_step,
    keeps_optimizer,
    opened_run,
    opened_source,
    origin_of,
    require_fit,
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
    if recipe.train.init_from:
        _check_source(recipe)
    check_run(recipe, "JAX", _step_of, partial(abstract_params, recipe.model))
    if not recipe.train.init_from:
        return recipe, {}
    step, params = _load(recipe.train.init_from)
    tensors = in_torch_layout(params)  # so that both packages find the same digest
    arrays = ((name, tensors[name].read()) for name in sorted(tensors))
    return replace(recipe, origin=origin_of(recipe.train.init_from, step, arrays)), params


def load_branch(recipe: Recipe, template: TrainState) -> tuple[Recipe, Recovered | None]:
    """The state that `train.branch_from` names, placed like `template`; and the recipe's origin.

    The state lacks what the run did not have as `recipe` has it: the optimizer's state, or an
    average of the weights. None where the recipe names no run.
    """
    named = recipe.train.branch_from
    if not named:
        return recipe, None
    with opened_run(named, "JAX", arrays=True) as (path, which, source):
        kept = keeps_optimizer(recipe, source, template.params)
        wanted = (template.params, template.opt_state if kept else None)
        average = template.average if kept and source.train.average_decay else None
        begun = _restore(path, which, *wanted, average)
    # Fingerprints stand for the weights, of which a process may have only a part.
    marks = np.array(begun.metadata["fingerprints"]["params"], np.uint32)
    return replace(recipe, origin=origin_of(named, begun.step, [("params", marks)])), begun


def make_state(
    recipe: Recipe,
    compile_init: Callable[[Params], Callable[[], TrainState]],
    template: TrainState,
    mesh: Mesh,
    begun: Recovered | None,
    trained: Params,
) -> TrainState:
    """The state at the first step: what is read back, `begun`, or a new one with `trained`.

    `compile_init` compiles the function that creates a new one from the parameters it gets, and
    draws the others.
    """
    if begun is None:
        state = compile_init(meshes.place(mesh, trained))()
        if recipe.train.init_optimizer:
            with opened_run(recipe.train.init_from, "JAX", arrays=True) as (path, which, _):
                read = _restore(path, which, None, template.opt_state)
            state = state._replace(opt_state=at_step(read.opt_state, 0))
        return state
    step = jax.device_put(begun.step, template.step.sharding).astype(template.step.dtype)
    state = TrainState(step, begun.params, begun.opt_state, begun.average)
    if begun.opt_state is None:
        state = state._replace(
            opt_state=at_step(compile_init(begun.params)().opt_state, begun.step)
        )
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


def _step_of(run_dir: Path, which: str) -> int:
    with checkpoint.open_checkpoints(run_dir) as manager:
        return checkpoint.choose_step(manager, which)


def _restore(run_dir: Path, which: str, *wanted: Any) -> Recovered:
    with checkpoint.open_checkpoints(run_dir) as manager:
        return checkpoint.restore(manager, checkpoint.choose_step(manager, which), *wanted)


def _load(named: str) -> tuple[int | None, Params]:
    with opened_source(named) as (path, which):
        exported = find_export(path, which)
        if exported is None:
            _, params, step = checkpoint.load_run(path, which)
            return step, params
        _, params = formats.import_any(exported, cast=Float32Cast())
        return export_step(path, exported), params
