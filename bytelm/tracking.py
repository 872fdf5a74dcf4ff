"""The metrics of a run in TensorBoard and Weights & Biases, in addition to `metrics.jsonl`.

The extra `track` installs what this needs; nothing of it is imported unless a run asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bytelm.config import Recipe, require, to_dict
from bytelm.files import errors_about, require_plain_file

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@runtime_checkable
class Tracker(Protocol):
    """Receives the same records as `metrics.jsonl`."""

    def write(self, record: dict[str, Any]) -> None:
        """Takes one record: `step`, and values by name, None for one that is not finite."""
        ...

    def close(self) -> None:
        """Ensures that everything is on disk."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises `ValueError` if the package of a named tracker is not installed."""
    for name in names:
        require(
            importlib.util.find_spec(_PACKAGES[name]) is not None,
            f"train.track={name}: the package {_PACKAGES[name]} is not installed; "
            "pip install 'bytelm[track]'",
        )


def open_trackers(recipe: Recipe, run_dir: Path, start: int) -> list[Tracker]:
    """The trackers that the recipe asks for, of a run that continues after step `start`."""
    check_trackers(recipe.train.track)
    kinds = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}
    return [kinds[name](recipe, run_dir, start) for name in dict.fromkeys(recipe.train.track)]


class TensorBoardTracker:
    """Event files in DIR/tensorboard, for `tensorboard --logdir DIR`.

    Readers ignore what an earlier, killed process wrote past `start`.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its imports
            package: Any = importlib.import_module("tensorboardX")
        purge = {"purge_step": start + 1} if start else {}
        folder, suffix = str(run_dir / "tensorboard"), f".{start}"
        self._writer = package.SummaryWriter(folder, filename_suffix=suffix, **purge)
        self._writer.add_text("recipe", recipe.name, start)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one scalar per value."""
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases in DIR/wandb, offline unless the machine is logged in.

    `WANDB_MODE`, if set, takes precedence. A resumed run keeps its id, so that `wandb sync
    DIR/wandb/offline-run-*` joins all its parts into one run.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, start: int):
        # Otherwise it sends its own errors to a server, whose name it looks up even when offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its imports
            package: Any = importlib.import_module("wandb")
        self._package = package
        settings = package.Settings(console="off", silent=True, disable_git=True, save_code=False)
        mode = os.environ.get("WANDB_MODE")
        if not mode:
            mode = "online" if package.login(prompt=False) else "offline"
        try:
            self._run = package.init(
                project=os.environ.get("WANDB_PROJECT") or "bytelm",
                dir=str(run_dir),
                name=run_dir.name,
                id=_run_id(run_dir, start),
                resume="allow" if mode == "online" else None,
                config=to_dict(recipe),
                mode=mode,
                settings=settings,
            )
        except package.errors.Error as error:
            why = " ".join(str(error).split())
            hint = "set WANDB_MODE=offline to continue without the W&B server"
            raise ValueError(f"train.track=wandb: {why}; {hint}") from None

    def write(self, record: dict[str, Any]) -> None:
        """Logs the values at their step."""
        values = {k: v for k, v in record.items() if k != "step" and v is not None}
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        """Waits until everything is written and, when online, uploaded."""
        self._run.finish()
        self._package.teardown()  # `finish` alone comes back before the last records are on disk


_ID_BYTES = frozenset((string.ascii_letters + string.digits + "-_").encode())
"""What an id may consist of."""


def _run_id(run_dir: Path, start: int) -> str:
    """The id of this run folder; a new run gets a new one."""
    path = run_dir / "wandb" / "id"
    with errors_about(path, "remove it"):
        if path.exists():
            require_plain_file(path)
        if not (start and path.exists()):
            path.parent.mkdir(exist_ok=True)
            path.write_text(secrets.token_hex(4), "utf-8")
        with open(path, "rb") as file:
            stored = file.read(129)
        known = 0 < len(stored) <= 128 and all(c in _ID_BYTES for c in stored)
        require(known, "not the id of a run; remove it to begin a new one in W&B")
        return stored.decode("ascii")
