"""Checks of the parameter groups of torch's optimizers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bytelm.config.base import require_amount
from bytelm.config.optimizer import require_shrinking


def check_group(group: dict[str, Any]) -> None:
    """Raises `ValueError` for a rate or a decay under which weights would grow without bound."""
    rate, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
    require_amount("lr", rate)
    require_amount("weight_decay", decay)
    if "momentum" in group and "betas" not in group:
        require_shrinking(rate, decay, 2 * (1 + group["momentum"]))
    elif group.get("decoupled_weight_decay", True):  # else Adam divides the decay by its size
        require_shrinking(rate, decay)


@contextmanager
def all_or_none(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Takes groups that were added inside out of `groups` again if that raises `ValueError`."""
    count = len(groups)
    try:
        yield
    except ValueError:
        del groups[count:]
        raise
