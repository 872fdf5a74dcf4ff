"""Ids of any integer dtype, converted to int64 before anything is computed with them.

In a narrower dtype special ids do not fit and wrap silently: as uint8, a pad of 257 is the byte 1.
"""

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def as_ids(ids: Shaped[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """`ids` as int64; int32, which holds every id and can index a table as well, stays unchanged.

    Raises `ValueError` for a dtype that is not an integer, including bool.
    """
    kind = ids.dtype
    if kind in (torch.int64, torch.int32):
        return ids
    if kind is torch.bool or kind.is_floating_point or kind.is_complex:
        name = str(kind).removeprefix("torch.")
        raise ValueError(f"ids: dtype {name}; give integers, such as int64")
    return ids.long()


def check_ids(ids: Shaped[Tensor, "*batch"], size: int) -> Int[Tensor, "B T"]:
    """`as_ids` with checks: raises `ValueError` for other shapes and ids outside [0, size).

    On an accelerator reading the values would stall the device at every call; there the embedding's
    own device assertion catches the same fault.
    """
    if ids.ndim != 2:
        raise ValueError(f"ids: shape {tuple(ids.shape)}; give rows of ids, [B, T]")
    checked = as_ids(ids)
    if checked.numel() == 0 or checked.device.type != "cpu" or torch.compiler.is_compiling():
        return checked
    low, high = int(checked.min()), int(checked.max())
    if low < 0 or high >= size:
        bad = ids[checked == (low if low < 0 else high)][0]  # as given: uint64 from 2^63 on wraps
        raise ValueError(f"ids: {bad} is outside the vocabulary; give ids from 0 to {size - 1}")
    return checked
