"""Where a segment of the text starts: after each newline, or after each document.

To a model with `reset_on` each segment is a text of its own: its logits are those of the segment
alone. Axes: B batch, T bytes, N patches of P bytes, S slots, D features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from bytelm.config import ByteVocab
from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.layers.attention import Scope
from bytelm_jax.layers.caches import positions_from, take_at
from bytelm_jax.layers.ids import as_ids


def ends_segment(
    ids: Integer[Array | np.ndarray, "*batch"], vocab: ByteVocab, reset_on: str
) -> Bool[Array, "*batch"]:
    """Whether a segment ends with each id: a newline, or with "document" an `eos_id`."""
    ids = as_ids(ids)
    match reset_on:
        case "newline":
            return ids == vocab.offset + ord("\n")
        case "document":
            return ids == vocab.eos_id
        case _:
            return jnp.zeros_like(ids, dtype=bool)


def find_segment_starts(
    ids: Integer[Array | np.ndarray, "B T"], vocab: ByteVocab, reset_on: str
) -> Int[Array, "B T"]:
    """The position at which the segment of each position starts; its last id belongs to it.

    `ids` are the ids to be predicted, unshifted; a position's own id does not affect its segment.
    """
    length = ids.shape[1]
    next_start = jnp.where(ends_segment(ids, vocab, reset_on), 1 + jnp.arange(length)[None, :], 0)
    segment_starts = jnp.pad(next_start, ((0, 0), (1, 0)))[:, :length].astype(jnp.int32)
    return jax.lax.cummax(segment_starts, axis=1)


def extend_segment_starts(
    before: Integer[Array | np.ndarray, "B T"],
    index: Int[Array, " B"],
    segment_starts: Int[Array, "B S"],
    vocab: ByteVocab,
    reset_on: str,
) -> Int[Array, "B T"]:
    """Cached version of `find_segment_starts` for T positions of each row, from `index` on.

    `before` holds the id before each position, `segment_starts` those of the positions before.
    """
    positions = positions_from(index, before.shape[1])
    starts = (positions == 0) | ends_segment(before, vocab, reset_on)
    last = take_at(segment_starts, jnp.maximum(index - 1, 0)[:, None])
    found = jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)
    return jnp.maximum(found, jnp.where(index > 0, last[:, 0], 0)[:, None])


def position_in_segment(segment_starts: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of earlier positions in the same segment, for each position."""
    return jnp.arange(segment_starts.shape[1], dtype=segment_starts.dtype)[None, :] - segment_starts


def pad_segment_starts(
    before: Int[Array, "B T"], segment_positions: Int[Array, "B T"], pad_id: int
) -> Int[Array, "B T"]:
    """`before`, the id before each position, with a pad where a segment starts."""
    return jnp.where(segment_positions == 0, pad_id, before)


class Layout(NamedTuple):
    """Text cut into segments and these into patches of P bytes, the last of each one padded.

    S = N·P slots; an empty patch or slot belongs to position T.
    """

    patches: Int[Array, "B N P"]
    """The ids in the slots."""
    slots: Int[Array, "B T"]
    """The slot of each byte; no two are equal."""
    bytes: Int[Array, "B S"]
    """The position of the byte in each slot, T for an empty slot."""
    segment_starts: Int[Array, "B N"]
    """The position at which the segment of each patch starts, T for an empty patch."""
    segment_positions: Int[Array, "B N"]
    """The number of each patch within its segment, from 0."""
    overflow: Int[Array, " B"]
    """Resets that were skipped for lack of capacity."""


def lay_out(
    ids: Int[Array, "B T"], vocab: ByteVocab, reset_on: str, patch: int, capacity: int
) -> Layout:
    """The segments of `ids` in `capacity` patches of `patch` bytes; T patches always suffice.

    A segment starts only if the rest of the row, without further resets, still fits; otherwise the
    previous segment continues to the end of the row. So every byte has a slot, and its slot depends
    on earlier bytes and on T alone. `capacity` must be at least T / patch.
    """
    length = ids.shape[1]
    segment_starts, index = find_segment_starts(ids, vocab, reset_on), jnp.arange(length)[None, :]
    used = (
        jnp.cumsum(position_in_segment(segment_starts) % patch == 0, axis=1) - 1
    )  # patches before the one that starts here
    # The number of patches used and still needed can only grow from reset to reset: once one reset
    # does not fit, no later one does.
    fits = used - (-(length - index) // patch) <= capacity
    wanted = (segment_starts == index) & (index > 0)
    segment_starts = jax.lax.cummax(
        jnp.where(wanted & fits, index, 0).astype(segment_starts.dtype), axis=1
    )
    segment_positions = position_in_segment(segment_starts)
    slots = (
        jnp.cumsum(segment_positions % patch == 0, axis=1) - 1
    ) * patch + segment_positions % patch
    scatter = jax.vmap(
        lambda row, slot: row.at[slot].set(index[0], unique_indices=True, mode="drop")
    )
    byte_positions = scatter(jnp.full((ids.shape[0], capacity * patch), length, index.dtype), slots)
    first = byte_positions[:, ::patch]
    one_more = ((0, 0), (0, 1))
    starts = jnp.take_along_axis(
        jnp.pad(segment_starts, one_more, constant_values=length), first, axis=1
    )
    padded = jnp.pad(ids, one_more, constant_values=vocab.pad_id)
    patches = jnp.take_along_axis(padded, byte_positions, axis=1).reshape(
        ids.shape[0], capacity, patch
    )
    overflow = (wanted & ~fits).sum(axis=1)
    return Layout(patches, slots, byte_positions, starts, (first - starts) // patch, overflow)


def scope_of(layout: Layout) -> Scope:
    """Each patch sees itself and the earlier patches of its segment."""
    same_segment = layout.segment_starts[:, :, None] == layout.segment_starts[:, None, :]
    return Scope(
        same_segment & np.tri(same_segment.shape[1], dtype=bool)[None], layout.segment_positions
    )


def take_once(
    x: Float[Array, "B S D"], index: Int[Array, "B T"], inverse: Int[Array, "B S"]
) -> Float[Array, "B T D"]:
    """`x[b, index[b, t]]`, where no two indices of a row are equal.

    `inverse` holds, for each row of `x`, the t that reads it, or T: the gradient is gathered with
    it, where JAX would scatter.
    """
    return (_low_precision_take if is_low_precision(x) else _take_once)(x, index, inverse)


@jax.custom_jvp
def _take_once(x: Array, index: Array, inverse: Array) -> Array:
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="promise_in_bounds")


@_take_once.defjvp
def _take_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    x, index, inverse = primals
    # Written by `inverse`, since the transpose of a write is a read.
    length = index.shape[1]
    empty = jnp.zeros((x.shape[0], length + 1, x.shape[2]), x.dtype)
    write = lambda rows, at, change: rows.at[at].add(change)  # noqa: E731
    written = jax.vmap(write)(empty, inverse, tangents[0])
    return _take_once(x, index, inverse), written[:, :length]


@jax.custom_vjp
def _low_precision_take(x: Array, index: Array, inverse: Array) -> Array:
    return _take_once(x, index, inverse)


def _take_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, Array]:
    return _take_once(x, index, inverse), inverse


def _take_backward(inverse: Array, gradient: Array) -> tuple[Array, None, None]:
    padded = jnp.pad(gradient, ((0, 0), (0, 1), (0, 0)))
    return jnp.take_along_axis(padded, inverse[..., None], axis=1), None, None


_low_precision_take.defvjp(_take_forward, _take_backward)


def segmented_sums(
    x: Float[Array, "B T D"], segment_positions: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Running sums that restart at each segment, in the dtype of `x`.

    By doubling: each round adds the sum that ends as many positions earlier, if it lies in the
    segment. Nothing from before the segment is ever added, so nothing has to cancel, and a position
    has exactly the sum that it has in its segment alone.
    """
    reach = 1
    while reach < x.shape[1]:
        before = jnp.pad(x, ((0, 0), (reach, 0), (0, 0)))[:, : x.shape[1]]
        x = x + jnp.where((segment_positions >= reach)[..., None], before, 0)
        reach *= 2
    return x
