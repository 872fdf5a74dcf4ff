"""The weights, the optimizer and the step from which a run starts."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bytelm.config import ModelConfig, PatchingContract, Recipe, require
from bytelm.export import patching_of, read_description
from bytelm.lora import LoRA, lora_of
from bytelm.runs import find_export, require_same_data
from bytelm.starting import (
    ANEW,
    check_run,
    export_step,
    keeps_optimizer,
    opened_run,
    opened_source,
    origin_of,
    require_fit,
)
from bytelm.trainable import Trainable, trainable
from bytelm_torch.interop.export import from_pretrained
from bytelm_torch.interop.finite import first_non_finite
from bytelm_torch.models import adapt, build_abstract, build_model, parameter_paths
from bytelm_torch.training import checkpoint
from bytelm_torch.training.average import Average


def read_config(path: Path) -> tuple[ModelConfig, PatchingContract | None]:
    """A `bytelm.starting.ReadConfig` for exports and folders of transformers."""
    described = read_description(path)
    return described.config, patching_of(described.extra)


def check_start(recipe: Recipe) -> None:
    """Raises `ValueError` unless what the recipe begins from is there and fits; reads no arrays."""
    check_run(recipe, "PyTorch", _step_of, partial(_names, recipe))


def parts_of(recipe: Recipe) -> tuple[LoRA | None, Trainable]:
    """The adapters of the model, if any, and which of all parameters train."""
    lora = lora_of(recipe, parameter_paths(build_abstract(recipe.model)).values())
    return lora, trainable(recipe, _names(recipe))


def open_model(
    recipe: Recipe, run_dir: Path, device: torch.device, lora: LoRA | None
) -> tuple[Recipe, Any]:
    """The model at step 0, or the one whose checkpoint is loaded next; and the recipe."""
    if checkpoint.saved_steps(run_dir):
        model = build_model(recipe.model).to(device)
    else:
        recipe, model = start_model(recipe, device)
    if lora is not None:
        adapt(model, lora)
    return recipe, model


def start_model(recipe: Recipe, device: torch.device) -> tuple[Recipe, Any]:
    """The model at step 0, and the recipe with the origin of weights that it did not draw."""
    torch.manual_seed(recipe.train.seed)
    model, named = build_model(recipe.model).to(device), recipe.train.init_from
    if not named:
        return recipe, model
    with opened_source(named) as (path, which):
        source = from_pretrained(path, checkpoint=which).float()
        step = export_step(path, find_export(path, which))
    theirs = source.state_dict()
    shapes = [{n: tuple(v.shape) for n, v in each.items()} for each in (theirs, model.state_dict())]
    require_fit(named, (source.config.vocab, shapes[0]), (recipe.model.vocab, shapes[1]))
    bad = first_non_finite(theirs)
    require(bad is None, f"train.init_from={named}: {bad} holds a value too large for float32")
    model.load_state_dict(theirs)
    return replace(recipe, origin=_origin(named, step, theirs)), model


def restore(
    recipe: Recipe,
    run_dir: Path,
    identity: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
) -> tuple[Recipe, int, list[str]]:
    """Loads what the run goes on from, if that is more than a model: its checkpoint or another's.

    Returns the recipe, with the origin of a branch, the step, and lines about it.
    """
    start = (checkpoint.saved_steps(run_dir) or [0])[-1]
    if start:
        restored = checkpoint.restore(run_dir, start, model, optimizer, average)
        require_same_data(restored["data"], identity, run_dir)
        return recipe, start, []
    if recipe.train.init_optimizer:
        with opened_run(recipe.train.init_from, "PyTorch", arrays=True) as (path, which, _):
            step = _step_of(path, which)
            saved = checkpoint.read_training(path, step, checksums=True)["optimizer"]
            checkpoint.adopt_optimizer(path, step, optimizer, saved, anew=True)
    named = recipe.train.branch_from
    if not named:
        return recipe, 0, []
    with opened_run(named, "PyTorch", arrays=True) as (path, which, source):
        start = _step_of(path, which)
        kept = keeps_optimizer(recipe, source, _names(recipe))
        saved = checkpoint.restore(path, start, model, None, average)["optimizer"]
        if kept:
            checkpoint.adopt_optimizer(path, start, optimizer, saved)
        else:
            average.begin()  # as the JAX package does: other parameters may be averaged
    origin = _origin(named, start, model.state_dict())
    return replace(recipe, origin=origin), start, [] if kept else [ANEW]


def _step_of(run_dir: Path, which: str) -> int:
    """The step of a checkpoint of a run folder of this package."""
    export = find_export(run_dir, which)
    assert export is not None
    return int(export.name)


def _names(recipe: Recipe) -> list[str]:
    names = [*parameter_paths(build_abstract(recipe.model)).values()]
    lora = lora_of(recipe, names)
    return [*names, *(lora.leaves if lora else [])]


def _origin(named: str, step: int | None, state: dict[str, torch.Tensor]) -> str:
    return origin_of(named, step, ((name, state[name].cpu().numpy()) for name in sorted(state)))
