"""Buffers of cached decoding: an entry a position, and every row at a position of its own.

An index is one number for all rows, a position for each row [B] from which T entries follow, or T
positions for each row [B, T]. Axes: B rows, S positions of a buffer, T entries written or read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Index = int | Int[Array, ""] | Int[Array, " B"]
"""The position of the next entry: in all rows, or in each."""


def in_each_row(index: Index, batch: int) -> Int[Array, " {batch}"]:
    """`index` as one position a row."""
    return jnp.broadcast_to(jnp.asarray(index, jnp.int32), (batch,))


def positions_from(index: Int[Array, " B"], count: int) -> Int[Array, "B {count}"]:
    """`count` positions of each row, from `index` on."""
    return index[:, None] + jnp.arange(count, dtype=index.dtype)[None, :]


def write_at(buffers: Any, values: Any, index: Index | Int[Array, "B T"]) -> Any:
    """The arrays [B, S, …] of a tree with `values` [B, T, …] written from `index` on.

    Where rows differ, what would lie past the end is dropped.
    """
    index = jnp.asarray(index)

    def write(buffer: Array, new: Array) -> Array:
        if index.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis=1)
        at = positions_from(index, new.shape[1]) if index.ndim == 1 else index
        rows = jnp.arange(buffer.shape[0])[:, None]
        return buffer.at[rows, at].set(new, mode="drop")

    return jax.tree.map(write, buffers, values)


def read_at(buffers: Any, index: Index, count: int) -> Any:
    """`count` entries of every array [B, S, …] of a tree, from `index` on.

    Where rows differ, zeros past the end.
    """
    index = jnp.asarray(index)

    def read(buffer: Array) -> Array:
        if index.ndim == 0:
            return jax.lax.dynamic_slice_in_dim(buffer, index, count, axis=1)
        return take_at(buffer, positions_from(index, count))

    return jax.tree.map(read, buffers)


def take_at(buffer: Array, positions: Int[Array, "B T"]) -> Array:
    """The entries [B, T, …] at these positions of each row; zeros past the end."""
    rows, size = jnp.arange(buffer.shape[0])[:, None], buffer.shape[1]
    positions = jnp.where(positions < 0, positions + size, positions)
    # Not by `mode="fill"`, which takes further kernels on a GPU to see which indices are inside.
    found = buffer.at[rows, jnp.clip(positions, 0, size - 1)].get(mode="promise_in_bounds")
    inside = (positions >= 0) & (positions < size)
    return jnp.where(inside.reshape(*inside.shape, *(1,) * (found.ndim - 2)), found, 0)


def swap_heads(caches: Any) -> Any:
    """The arrays [B, S, G, K] of a tree as [B, G, S, K], or back again.

    Caches of several heads are stored by head: with the positions of one side by side, XLA's
    kernels for a softmax serve attention on a GPU.
    """
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), caches)


def write_heads_at(buffers: Any, values: Any, index: Index | Int[Array, "B T"]) -> Any:
    """`write_at` for buffers by head, [B, G, S, K], and values [B, T, G, K]."""
    index = jnp.asarray(index)

    def write(buffer: Array, new: Array) -> Array:
        new = jnp.swapaxes(new, 1, 2)
        if index.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis=2)
        at = positions_from(index, new.shape[2]) if index.ndim == 1 else index
        rows, heads = (jnp.arange(size) for size in buffer.shape[:2])
        where = (rows[:, None, None], heads[None, :, None], at[:, None, :])
        return buffer.at[where].set(new, mode="drop")

    return jax.tree.map(write, buffers, values)


def read_heads_at(buffers: Any, index: Int[Array, " B"], count: int) -> Any:
    """`read_at` for buffers by head, [B, G, S, K]; nothing may lie past the end."""

    def read(row: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(row, start, count, axis=1)

    return jax.tree.map(lambda buffer: jax.vmap(read)(buffer, index), buffers)
