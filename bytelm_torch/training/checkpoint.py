"""Run folders of the trainer: the configuration, and checkpoints.

A checkpoint is an export together with the state of the optimizer.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bytelm.config import Recipe, TrainConfig, require
from bytelm.export import (
    errors_about,
    model_extra,
    one_line,
    refuse_non_finite,
    write_synced,
)
from bytelm.metrics import score
from bytelm.runs import saved_steps
from bytelm.torch_files import check_torch_file
from bytelm_torch.interop.export import read_state, save_pretrained
from bytelm_torch.interop.finite import first_non_finite
from bytelm_torch.optimizers.q_agent import begin_counting
from bytelm_torch.training.average import Average

_TRAINING_FILE = "training.pt"


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    data: str,
    metrics: dict[str, float] | None,
    average: Average,
) -> None:
    """Writes `checkpoints/<step>`, completely or not at all, and removes superseded checkpoints.

    The folder is an export, for `from_pretrained` and `bytelm import`, in which `training.pt`
    additionally holds the optimizer, the identity of the data and the metrics. Where an average is
    kept, that is exported, and the weights themselves are there as `trained`.
    """
    folder = run_dir / "checkpoints"
    partial = folder / f".{step}.{os.getpid()}.partial"
    state = {"step": step, "data": data, "metrics": metrics, "optimizer": optimizer.state_dict()}
    try:
        extra: dict[str, Any] = {"recipe": recipe.name, "step": step}
        extra |= model_extra(recipe.patching, recipe.data.sequence_length)
        with average.in_model() as trained:
            save_pretrained(model, partial, extra)
            state |= {"trained": trained} if trained else {}
            write_synced(partial / _TRAINING_FILE, lambda sink: torch.save(state, sink))
        shutil.rmtree(folder / str(step), ignore_errors=True)
        os.replace(partial, folder / str(step))
    except OSError as error:
        why = error.strerror or one_line(error)
        raise ValueError(f"{folder}: cannot be written ({why}); earlier ones are intact") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in _superseded(run_dir, recipe.train):
        shutil.rmtree(folder / str(old))


def _superseded(run_dir: Path, train: TrainConfig) -> list[int]:
    steps = saved_steps(run_dir)
    scores = {step: score(read_training(run_dir, step)["metrics"]) for step in steps}
    ranked = sorted((value, step) for step, value in scores.items() if value is not None)
    best = {step for _, step in ranked[: train.keep_best]}
    return [step for step in steps[: -train.keep_last] if step not in best]


def read_training(run_dir: Path, step: int, checksums: bool = False) -> dict[str, Any]:
    """The training state stored next to the export of a checkpoint; no code in it is run.

    `checksums` says to read all of it and to compare it with the sums in the file. Raises
    `ValueError` for a file that is damaged or was not written by training.
    """
    file = run_dir / "checkpoints" / str(step) / _TRAINING_FILE
    with errors_about(file, "delete that checkpoint to continue from the one before"):
        try:
            check_torch_file(file, checksums)
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except OSError:
            raise
        except Exception as error:  # damaged files make torch raise almost anything
            raise ValueError(f"damaged ({one_line(error, 160)}); delete that folder") from None
        kinds = {"step": int, "data": str, "metrics": dict | None, "optimizer": dict}
        whole = isinstance(state, dict) and all(
            name in state and isinstance(state[name], kind) for name, kind in kinds.items()
        )
        numbers = whole and all(
            isinstance(value, int | float) for value in (state["metrics"] or {}).values()
        )
        require(numbers, "not written by training; delete that folder")
        return state


def restore(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    average: Average,
) -> dict[str, Any]:
    """Loads checkpoint `step` into `model` and the rest; returns what was stored with them.

    Raises `ValueError` for files that cannot be read, belong to another optimizer or are not
    finite.
    """
    _, weights, _ = read_state(run_dir / "checkpoints" / str(step))
    model.load_state_dict(weights, strict=True)
    state = read_training(run_dir, step, checksums=True)
    average.begin()
    if "trained" in state:  # what the model has now is their average
        _load_trained(run_dir / "checkpoints" / str(step), model, state["trained"])
    if optimizer is not None:
        _load_optimizer(run_dir, step, optimizer, state["optimizer"])
    return state


def _load_trained(folder: Path, model: nn.Module, trained: Any) -> None:
    """Loads the weights that were trained where an average of them is exported."""
    with errors_about(folder / _TRAINING_FILE, "delete that folder"):
        refuse_non_finite(first_non_finite(trained, "trained"))
        try:
            model.load_state_dict(model.state_dict() | trained)
        except (TypeError, AttributeError, RuntimeError) as error:
            why = f"its weights are not those of this model ({one_line(error, 160)})"
            raise ValueError(f"{why}; delete that folder") from None


def adopt_optimizer(
    run_dir: Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    anew: bool = False,
) -> None:
    """Loads the state `saved` of the optimizer of checkpoint `step`, but for its settings.

    `saved`, which is changed, is the "optimizer" of `read_training`. `anew` lets an agent count
    from the first step. Raises `ValueError` as `restore` does.
    """
    ours = optimizer.state_dict()
    groups = zip(ours["param_groups"], saved.get("param_groups", []), strict=False)
    saved["param_groups"] = [{**mine, "params": theirs["params"]} for mine, theirs in groups]
    if "q_learning" in saved:
        agent = saved["q_learning"]
        if "settings" in agent:
            agent |= {"settings": ours["q_learning"]["settings"]}
            agent |= {"unobserved": 0} if anew else {}
        if anew:
            begin_counting(agent.get("agent", agent))
    _load_optimizer(run_dir, step, optimizer, saved)


def _load_optimizer(
    run_dir: Path, step: int, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:
    with errors_about(run_dir / "checkpoints" / str(step), ""):
        refuse_non_finite(first_non_finite(saved, "optimizer"))
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{run_dir}/checkpoints/{step}: another optimizer's state ({one_line(error)}); "
            "keep the optimizer or choose another run_dir"
        ) from None
