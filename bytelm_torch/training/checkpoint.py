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

from bytelm.config import (
    Recipe,
    TrainConfig,
    require,
    to_dict,
)
from bytelm.export import (
    errors_about,
    one_line,
    refuse_non_finite,
    write_synced,
)
from bytelm.metrics import score
from bytelm.runs import saved_steps
from bytelm.torch_files import check_torch_file
from bytelm_torch.interop.export import from_pretrained, save_pretrained
from bytelm_torch.interop.finite import first_non_finite

_TRAINING_FILE = "training.pt"


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    data: str,
    metrics: dict[str, float] | None,
) -> None:
    """Writes `checkpoints/<step>`, completely or not at all, and removes superseded checkpoints.

    The folder is an export, for `from_pretrained` and `bytelm import`, in which `training.pt`
    additionally holds the optimizer, the identity of the data and the metrics.
    """
    folder = run_dir / "checkpoints"
    partial = folder / f".{step}.{os.getpid()}.partial"
    state = {"step": step, "data": data, "metrics": metrics, "optimizer": optimizer.state_dict()}
    try:
        extra: dict[str, Any] = {"recipe": recipe.name, "step": step}
        if recipe.patching:
            extra["patching"] = to_dict(recipe.patching)
        save_pretrained(model, partial, extra)
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
    run_dir: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads checkpoint `step` into `model` and `optimizer`; returns what was stored with them.

    Raises `ValueError` for files that cannot be read, belong to another optimizer or are not
    finite.
    """
    loaded = from_pretrained(run_dir / "checkpoints" / str(step))
    model.load_state_dict(loaded.state_dict(), strict=True)
    state = read_training(run_dir, step, checksums=True)
    with errors_about(run_dir / "checkpoints" / str(step), ""):
        refuse_non_finite(first_non_finite(state["optimizer"], "optimizer"))
    try:
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{run_dir}/checkpoints/{step}: another optimizer's state ({one_line(error)}); "
            "keep the optimizer or choose another run_dir"
        ) from None
    return state
