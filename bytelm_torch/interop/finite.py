"""Whether weights are finite: what holds NaN or infinity is neither saved nor loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def is_finite(value: Tensor) -> bool:
    """Whether every element is a finite number; one pass, and no copy of `value`."""
    if not value.is_floating_point() or value.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(value.detach()))).all())


def first_non_finite(tree: Any, name: str = "") -> str | None:
    """The dotted name of the first tensor that is not finite, in any nest of mappings and lists."""
    if isinstance(tree, Tensor):
        return None if is_finite(tree) else name
    if isinstance(tree, Mapping):
        items = tree.items()
    else:
        items = enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    found = (first_non_finite(part, f"{name}.{key}" if name else str(key)) for key, part in items)
    return next((each for each in found if each is not None), None)
