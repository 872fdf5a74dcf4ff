"""The weights that a new run starts from, if its recipe names any."""

from dataclasses import replace
from pathlib import Path

from bytelm.config import ModelConfig, PatchingContract, Recipe, require
from bytelm.export import patching_of
from bytelm.runs import find_export, is_run, load_recipe
from bytelm.starting import export_step, opened_source, origin_of, require_fit
from bytelm_jax.interop import formats
from bytelm_jax.interop.convert import Float32Cast, in_torch_layout
from bytelm_jax.models import Params, abstract_params
from bytelm_jax.training import checkpoint
from bytelm_jax.training.patch_calibration import load_entropy_model


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
        return recipe, {}
    _check_source(recipe)
    step, params = _load(recipe.train.init_from)
    tensors = in_torch_layout(params)  # so that both packages find the same digest
    arrays = ((name, tensors[name].read()) for name in sorted(tensors))
    return replace(recipe, origin=origin_of(recipe.train.init_from, step, arrays)), params


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
