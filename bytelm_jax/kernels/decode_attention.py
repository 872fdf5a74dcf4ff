"""Attention of one new position a row to a cache that it is written into, in one kernel on a GPU.

A program of the grid is one head of one row. It rotates the query and the key, writes key and value
into the cache in place, and reads the cache up to the position before, block by block, so that it
takes as long as the text is and not as long as the cache. The softmax starts with the new position
itself, whose key it has: nothing waits for what another program writes.

Axes: M rows, S positions of a cache, H heads in G groups, K head width, C all heads of a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.decode_linear import kernel_call, wide
from bytelm_jax.kernels.decode_weights import Columns, Heads, power_of_two

_BLOCK = 64
"""Positions that are read at once."""


class _Shape(NamedTuple):
    heads: Heads
    length: int
    keys: int
    values: int
    rotated: bool
    written: bool


def attend(
    projected: Float[Array, "M N"],
    keys: Columns,
    values: Columns,
    index: Int[Array, " M"],
    first: Int[Array, " M"],
    rope: tuple[Array, Array] | None,
    heads: Heads,
    write: bool,
) -> tuple[Float[Array, "M D"], Array, Array]:
    """Softmax attention of position `index` of each row to those from `first` on, itself included.

    `projected` holds H queries, G keys and G values; `rope` the cosines and sines [M, K // 2] of
    the position. Also gives the caches with the new key and value, or, unless they are to be
    written, these alone, [M, G · K], the key rotated. A row whose index is past the end of its
    cache writes nothing.
    """
    rows, length = len(projected), keys.array.shape[2]
    out = jax.ShapeDtypeStruct((rows, heads.heads * heads.width), projected.dtype)
    if write:
        new = tuple(jax.ShapeDtypeStruct(c.array.shape, c.array.dtype) for c in (keys, values))
    else:
        new = (jax.ShapeDtypeStruct((rows, heads.groups * heads.width), projected.dtype),) * 2
    shape = _Shape(heads, length, keys.start, values.start, rope is not None, write)
    return kernel_call(
        _attend_kernel,
        shape,
        (projected, index, first, keys.array, values.array, *(rope or ())),
        (heads.heads, rows),
        (out, *new),
        name="decode_attention",
        aliases=((3, 1), (4, 2)) if write else (),
    )


def _attend_kernel(shape: _Shape, *refs: Any) -> None:
    projected, index, first, keys, values, *rest = refs
    *rope, out, new_keys, new_values = rest
    (heads, groups, width), row = shape.heads, pl.program_id(1)
    head = pl.program_id(0)
    group, lanes = head // (heads // groups), jnp.arange(power_of_two(width))
    here, inside = index[row], lanes < width

    def read(column: Any, rotated: bool) -> Array:
        at = column * width + lanes
        x = wide(plgpu.load(projected.at[row, at], mask=inside, other=0))
        if not rotated:
            return x
        near = column * width + (lanes ^ 1)
        partner = wide(plgpu.load(projected.at[row, near], mask=inside, other=0))
        cos, sin = (
            plgpu.load(part.at[row, lanes // 2], mask=inside, other=0).astype(x.dtype)
            for part in rope
        )
        return x * cos + partner * jnp.where(lanes % 2 == 0, -sin, sin)

    # As they are stored: what the other forms read, too.
    q = read(head, shape.rotated).astype(projected.dtype)
    k = read(heads + group, shape.rotated).astype(projected.dtype)
    v = read(heads + groups + group, False).astype(projected.dtype)
    at, is_first = group * width + lanes, head % (heads // groups) == 0
    columns = (shape.keys + group, shape.values + group, lanes, inside)
    new = (new_keys, new_values)
    if shape.written:
        store_new(new, (k, v), (row, here, shape.length), columns, is_first)
    else:
        plgpu.store(new_keys.at[row, at], k, mask=inside & is_first)
        plgpu.store(new_values.at[row, at], v, mask=inside & is_first)
    where = (row, first[row], here)
    mixed = mix((q, k, v), (keys, values), where, columns, shape.length, width)
    plgpu.store(out.at[row, head * width + lanes], mixed.astype(out.dtype), mask=inside)


def store_new(caches: Any, new: Any, where: Any, columns: Any, is_first: Array) -> None:
    """Writes a key and a value under their heads, at a position that may be past the end."""
    row, here, length = where
    *groups, lanes, inside = columns
    slot, mask = jnp.minimum(here, length - 1), inside & is_first & (here < length)
    for cache, x, group in zip(caches, new, groups, strict=True):
        plgpu.store(cache.at[row, group, slot, lanes], x, mask=mask)


def mix(new: Any, caches: Any, where: Any, columns: Any, length: int, width: int) -> Array:
    """The softmax over a new position and those of a cache before it, block by block.

    `new` is its query, key and value [K]; `where` the row, the first position seen and this one;
    `columns` the heads of keys and of values, their lanes, and which of these there are.
    """
    (q, k, v), (keys, values), (row, first, here) = new, caches, where
    key_head, value_head, lanes, inside = columns
    q, block = wide(q) * width**-0.5, min(_BLOCK, power_of_two(length))
    slots = jnp.arange(block)

    def step(number: Any, carry: Any) -> Any:
        most, total, mixed = carry
        position = number * block + slots
        seen = (position >= first) & (position < here) & (position < length)
        position = jnp.minimum(position, length - 1)[:, None]
        mask = seen[:, None] & inside[None, :]
        near = plgpu.load(keys.at[row, key_head, position, lanes[None, :]], mask=mask, other=0)
        scores = jnp.where(seen, (wide(near) * q[None, :]).sum(axis=1), -jnp.inf)
        new_most = jnp.maximum(most, scores.max(axis=0))
        weights, share = jnp.exp(scores - new_most), jnp.exp(most - new_most)
        near = plgpu.load(values.at[row, value_head, position, lanes[None, :]], mask=mask, other=0)
        mixed = mixed * share + (weights[:, None] * wide(near)).sum(axis=0)
        return new_most, total * share + weights.sum(axis=0), mixed

    score = (q * wide(k)).sum(axis=0)
    begin = (score, jnp.ones_like(score), wide(v))
    last = (jnp.minimum(here, length) + block - 1) // block
    _, total, mixed = jax.lax.fori_loop(first // block, last, step, begin)
    return mixed / total
