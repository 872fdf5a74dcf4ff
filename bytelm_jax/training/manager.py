"""Orbax's manager of checkpoints, which here says and does less by itself."""

import logging
import sys
from collections import namedtuple
from typing import Any

import orbax.checkpoint as ocp


def silence_orbax() -> None:
    """Orbax reports every step of its work, and logs errors that it also raises.

    When an array cannot be read, it closes its event loop while others are still being read, each
    of which then prints a traceback from a thread of tensorstore.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is not _without_late_reads:
        _hooks.append(sys.unraisablehook)
        sys.unraisablehook = _without_late_reads


_hooks: list[Any] = []
"""What prints exceptions that nothing can catch."""


def _without_late_reads(unraisable: Any) -> None:
    late = ("Event loop is closed", "Encountered error while reading array index")
    if not str(unraisable.exc_value).startswith(late):
        _hooks[-1](unraisable)


class Manager(ocp.CheckpointManager):
    """Orbax's, without its own end at a preemption."""

    def reached_preemption(self, step: int) -> bool:
        # `processes.StopSignal` agrees on an end by JAX's one counter, which Orbax would set back
        # to `step`, from a thread as well: processes then stop at different places, and wait.
        return False


def stored(tree: Any) -> Any:
    """The tree as it lies on disk: without fields that are None by default, and are None.

    They were added later: runs that are older do not have them.
    """
    if isinstance(tree, dict):
        return {name: stored(value) for name, value in tree.items()}
    if not isinstance(tree, tuple | list):
        return tree
    fields, defaults = getattr(tree, "_fields", None), getattr(tree, "_field_defaults", {})
    if fields is None:
        return type(tree)(map(stored, tree))
    kept = {
        name: stored(value)
        for name, value in zip(fields, tree, strict=True)
        if value is not None or defaults.get(name, "") is not None
    }
    kind = type(tree) if len(kept) == len(tree) else namedtuple(type(tree).__name__, kept)
    return kind(**kept)
