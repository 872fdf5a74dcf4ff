"""Buffers of cached decoding: an entry a position, and every row at a position of its own.

An index is one number for all rows, a position for each row [B] from which T entries follow, or T
positions for each row [B, T]. Axes: B rows, S positions of a buffer, T entries written or read. The
tensors are written in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

Index = int | Int[Tensor, " B"]
"""The position of the next entry: in all rows, or in each."""


def in_each_row(index: Index, batch: int, device: torch.device) -> Int[Tensor, " {batch}"]:
    """`index` as one position a row."""
    return torch.as_tensor(index, device=device).expand(batch)


def positions_from(
    index: Index, count: int, device: torch.device | None = None
) -> Int[Tensor, "#B {count}"]:
    """`count` positions of each row, from `index` on; one row for all if `index` is a number."""
    if isinstance(index, int):
        return torch.arange(index, index + count, device=device)[None, :]
    return index[:, None] + torch.arange(count, device=index.device)[None, :]


def write_at(buffers: Any, values: Any, index: Index | Int[Tensor, "B T"]) -> Any:
    """The tensors [B, S, …] of a tree with `values` [B, T, …] written from `index` on, in place.

    What would lie past the end is dropped.
    """
    places: dict[tuple[int, int], _Places] = {}

    def write(buffer: Tensor, new: Tensor) -> Tensor:
        size, count = buffer.shape[1], new.shape[1]
        if isinstance(index, int):
            buffer[:, index : index + count] = new[:, : max(0, size - index)]
            return buffer
        if (size, count) not in places:
            at = positions_from(index, count) if index.ndim == 1 else index
            places[size, count] = _places(at, size)
        rows, slots, taken, some = places[size, count]
        kept = some.reshape(*some.shape, *(1,) * (buffer.ndim - 2))
        new = new[rows, taken].to(buffer.dtype)  # wider than under autocast
        buffer[rows, slots] = new.where(kept, buffer[rows, slots])
        return buffer

    return _map(write, buffers, values)


_Places = tuple[Tensor, Tensor, Tensor, Tensor]


def _places(at: Tensor, size: int) -> _Places:
    """Rows [B, 1], slots and entries [B, T] of a write that drops what lies past the end.

    An entry that is dropped writes another one of its row once more; the last tensor says [B, 1]
    whether there is one. A list of those that are kept would make a GPU wait for the host.
    """
    inside = at < size
    some, first = inside.any(dim=1, keepdim=True), inside.long().argmax(dim=1, keepdim=True)
    taken = torch.arange(at.shape[1], device=at.device).where(inside, first)
    slots = at.gather(1, taken).where(some, 0)
    return torch.arange(len(at), device=at.device)[:, None], slots, taken, some


def read_at(buffers: Any, index: Index, count: int) -> Any:
    """`count` entries of every tensor [B, S, …] of a tree, from `index` on; zeros past the end.

    If `index` is a number and they exist, this is a view: writing to it writes to the buffer.
    """

    def read(buffer: Tensor) -> Tensor:
        if isinstance(index, int) and index + count <= buffer.shape[1]:
            return buffer[:, index : index + count]
        return take_at(buffer, positions_from(index, count, buffer.device))

    return _map(read, buffers)


def take_at(buffer: Tensor, positions: Int[Tensor, "#B T"]) -> Tensor:
    """The entries [B, T, …] at these positions of each row; zeros past the end."""
    size = buffer.shape[1]
    rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
    taken = buffer[rows, positions.clamp(max=size - 1)]
    past = (positions >= size).reshape(*positions.shape, *(1,) * (buffer.ndim - 2))
    return taken.masked_fill(past, 0)


def swap_heads(caches: Any) -> Any:
    """The tensors [B, S, G, K] of a tree as [B, G, S, K], or back again: views of them.

    Caches of several heads are stored by head, as torch's kernels for attention take them.
    """
    return _map(lambda buffer: buffer.transpose(1, 2), caches)


def write_heads_at(buffers: Any, values: Any, index: Index | Int[Tensor, "B T"]) -> Any:
    """`write_at` for buffers by head, [B, G, S, K], and values [B, T, G, K]."""
    write_at(swap_heads(buffers), values, index)  # into views
    return buffers


def read_heads_at(buffers: Any, index: Index, count: int) -> Any:
    """`read_at` for buffers by head, [B, G, S, K]; nothing may lie past the end."""
    if isinstance(index, int):
        return _map(lambda buffer: buffer[:, :, index : index + count], buffers)
    rows = torch.arange(len(index), device=index.device)[:, None, None]
    at = positions_from(index, count)[:, None]

    def read(buffer: Tensor) -> Tensor:
        return buffer[rows, torch.arange(buffer.shape[1], device=buffer.device)[:, None], at]

    return _map(read, buffers)


def _map(change: Callable[..., Tensor], tree: Any, *rest: Any) -> Any:
    """The tree of tuples with `change` applied to each tensor and those in its place in `rest`."""
    if isinstance(tree, Tensor):
        return change(tree, *rest)
    parts = (_map(change, *each) for each in zip(tree, *rest, strict=True))
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
