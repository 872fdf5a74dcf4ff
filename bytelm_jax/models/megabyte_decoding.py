"""Cached decoding of MEGABYTE, for the methods of `models.megabyte.Megabyte`.

One round is one patch, and the global transformer runs once per round. With `reset_on` a round is
one byte, and the global transformer runs when a patch starts in some row. Axes: B batch, T bytes, L
positions of a cache, P bytes per patch, D width, K head width, V vocabulary.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from bytelm_jax.layers.attention import KeyValueCache, Scope
from bytelm_jax.layers.ids import as_ids
from bytelm_jax.layers.resets import ends_segment, find_segment_starts, lay_out, scope_of
from bytelm_jax.models.interface import Choose, write_at

if TYPE_CHECKING:
    from bytelm_jax.models.megabyte import Megabyte


class MegabyteCache(NamedTuple):
    """The state of cached decoding: the global layers' keys and values, S = patches."""

    layers: tuple[KeyValueCache, ...]


class Round(NamedTuple):
    """The state within a round: each byte's share of the context, the local keys and values."""

    context: Float[Array, "B P D"]
    local: tuple[KeyValueCache, ...]


class ResetCache(NamedTuple):
    """The state of cached decoding with `reset_on`, where rows differ in their patch boundaries.

    Everything is stored by position, so that later entries may hold anything. L positions, S = P −
    1 + L and I = P + L, including the padding in front.
    """

    layers: tuple[KeyValueCache, ...]
    """The global layers' keys and values, [B, L, K]; read where a patch starts."""
    local: tuple[KeyValueCache, ...]
    """The local layers' keys and values, [B, S, K], after P − 1 zeros."""
    shares: Float[Array, "B S D"]
    """Each byte's share of its patch's context, including the bytes of the unfinished patch."""
    ids: Int[Array, "B I"]
    """The ids, after P pads."""
    segment_starts: Int[Array, "B L"]
    """Where the segment of each position starts."""


def init_cache(model: "Megabyte", batch: int, length: int) -> MegabyteCache | ResetCache:
    """A `ResetCache` if the model resets within a row, otherwise a `MegabyteCache`."""
    model.check_length(length)
    patch, dtype = model.config.patch_size, model.to_logits.kernel[...].dtype
    if model.config.reset_on == "none":
        patches = -(-length // patch)
        return MegabyteCache(model.global_transformer.empty_caches(batch, patches, dtype))
    capacity = length + patch - 1
    return ResetCache(
        model.global_transformer.empty_caches(batch, length, dtype),
        model.local_transformer.empty_caches(batch, capacity, dtype),
        jnp.zeros((batch, capacity, model.config.local_dim), dtype),
        jnp.full((batch, patch + length), model.config.vocab.pad_id, jnp.int32),
        jnp.zeros((batch, length), jnp.int32),
    )


def prefill(
    model: "Megabyte", ids: Integer[Array | np.ndarray, "B T"], cache: MegabyteCache | ResetCache
) -> MegabyteCache | ResetCache:
    """Runs the prompt's patches through the global transformer.

    The local transformer's results are kept only with resets: otherwise a round is a whole patch,
    in which the local transformer starts empty.
    """
    ids = as_ids(ids)
    if isinstance(cache, ResetCache):
        return _prefill_segments(model, ids, cache)
    patches = ids.reshape(ids.shape[0], -1, model.config.patch_size)
    inputs = model.global_input(model.shift(patches, axis=1), 0)
    _, layers = model.global_transformer.extend(inputs, cache.layers, 0)
    return MegabyteCache(layers)


def decode_round(
    model: "Megabyte",
    cache: MegabyteCache | ResetCache,
    previous: Integer[Array | np.ndarray, "B P"],
    index: int | Int[Array, ""],
    choose: Choose,
) -> tuple[MegabyteCache | ResetCache, Int[Array, "B P"]]:
    """Runs the global transformer once, on the previous round, then the local one byte by byte."""
    previous = as_ids(previous)
    if isinstance(cache, ResetCache):
        return _decode_byte(model, cache, previous, jnp.asarray(index), choose)
    cache, state, byte = start_round(model, cache, previous, index)
    chosen = []
    for i in range(previous.shape[1]):
        logits, state = round_logits(model, state, byte, i)
        byte = as_ids(choose(logits, i))
        chosen.append(byte)
    return cache, jnp.stack(chosen, axis=1)


def start_round(
    model: "Megabyte", cache: MegabyteCache, previous: Int[Array, "B P"], index: int | Array
) -> tuple[MegabyteCache, Round, Int[Array, " B"]]:
    """Runs the global transformer on the previous round; also gives the byte before the first."""
    batch, patch = previous.shape
    inputs = model.global_input(previous[:, None, :], index * patch)
    context, layers = model.global_transformer.extend(inputs, cache.layers, index)
    context = model.split(context)[:, 0]
    local = model.local_transformer.empty_caches(batch, patch, context.dtype)
    first = jnp.full_like(previous[:, 0], model.config.vocab.pad_id)
    before = previous[:, -1] if model.config.variant == "in_action" else first
    return MegabyteCache(layers), Round(context, local), before


def round_logits(
    model: "Megabyte", state: Round, before: Int[Array, " B"], i: int | Array
) -> tuple[Float[Array, "B V"], Round]:
    """Runs the local transformer on the round's byte number i."""
    share = jax.lax.dynamic_slice_in_dim(state.context, i, 1, axis=1)
    hidden = model.local_input(before[:, None]) + share
    hidden, local = model.local_transformer.extend(hidden, state.local, i)
    return model.to_logits(hidden)[:, 0], Round(state.context, local)


def _prefill_segments(model: "Megabyte", ids: Array, cache: ResetCache) -> ResetCache:
    c, (batch, length) = model.config, ids.shape
    # The patch that the prompt leaves unfinished also needs the shares of its remaining bytes.
    padded = jnp.pad(ids, ((0, 0), (0, c.patch_size - 1)), constant_values=c.vocab.pad_id)
    most = padded.shape[1]
    layout = lay_out(padded, c.vocab, c.reset_on, c.patch_size, most)
    inputs, before = model.inputs_of_segments(layout, c.patches(length))
    dtype = inputs.dtype
    empty = model.global_transformer.empty_caches(batch, most, dtype)
    context, layers = model.global_transformer.extend(inputs, empty, 0, scope_of(layout))
    shares = model.split(context)
    hidden = (model.local_input(before) + shares).reshape(batch * most, c.patch_size, -1)
    empty = model.local_transformer.empty_caches(batch * most, c.patch_size, dtype)
    _, local = model.local_transformer.extend(hidden, empty, 0)

    def at_bytes(x: Array, slots: Array) -> Array:
        flat = x.reshape(batch, -1, x.shape[-1])
        return jnp.take_along_axis(flat, slots[..., None], axis=1)

    slots = layout.slots[:, :length]
    layers = jax.tree.map(lambda x: at_bytes(x, slots // c.patch_size), layers)
    local = jax.tree.map(lambda x: at_bytes(x, slots), local)
    segment_starts = find_segment_starts(ids, c.vocab, c.reset_on)
    return ResetCache(
        write_at(cache.layers, layers, 0),
        write_at(cache.local, local, c.patch_size - 1),
        write_at(cache.shares, at_bytes(shares, layout.slots), 0),
        write_at(cache.ids, ids.astype(jnp.int32), c.patch_size),
        write_at(cache.segment_starts, segment_starts, 0),
    )


def _decode_byte(
    model: "Megabyte", cache: ResetCache, previous: Array, index: Array, choose: Choose
) -> tuple[ResetCache, Array]:
    c, pad = model.config, model.config.vocab.pad_id
    before = jax.lax.dynamic_index_in_dim(
        cache.segment_starts, jnp.maximum(index - 1, 0), axis=1, keepdims=False
    )
    is_segment_start = (index == 0) | ends_segment(previous[:, 0], c.vocab, c.reset_on)
    segment_start = jnp.where(is_segment_start, index.astype(before.dtype), before)
    segment_position, offset = jnp.divmod(index - segment_start, c.patch_size)
    cache = cache._replace(
        ids=write_at(cache.ids, previous.astype(jnp.int32), index + c.patch_size - 1),
        segment_starts=write_at(cache.segment_starts, segment_start[:, None], index),
    )
    cache = _start_patches(model, cache, segment_start, segment_position, offset == 0, index)

    share = jax.lax.dynamic_slice_in_dim(cache.shares, index, 1, axis=1)
    first = is_segment_start if c.variant == "in_action" else offset == 0
    hidden = model.local_input(jnp.where(first[:, None], pad, previous)) + share
    near = _read_at(cache.local, index, c.patch_size)
    inside = jnp.arange(c.patch_size)[None, :] - (c.patch_size - 1 - offset)[:, None]
    scope = Scope((inside >= 0)[:, None, :], jnp.maximum(inside, 0))
    hidden, near = model.local_transformer.extend(hidden, near, c.patch_size - 1, scope)
    newest = jax.tree.map(lambda x: x[:, c.patch_size - 1 :], near)
    local = write_at(cache.local, newest, index + c.patch_size - 1)
    return cache._replace(local=local), as_ids(choose(model.to_logits(hidden)[:, 0], 0))[:, None]


def _start_patches(
    model: "Megabyte",
    cache: ResetCache,
    segment_start: Array,
    segment_position: Array,
    starts: Array,
    index: Array,
) -> ResetCache:
    """Runs the patches that start at `index`, in the rows `starts`, through the global stack.

    The other rows write keys at positions where none of their patches starts, which are never read.
    """
    patch, pad = model.config.patch_size, model.config.vocab.pad_id
    most = model.config.patches(model.config.max_length)

    def run() -> tuple[Array, tuple[KeyValueCache, ...]]:
        recent = jax.lax.dynamic_slice_in_dim(cache.ids, index, patch, axis=1)
        recent = jnp.where((segment_position == 0)[:, None], pad, recent)[:, None]
        slots = jnp.arange(cache.segment_starts.shape[1])[None, :]
        inside = slots - segment_start[:, None]
        seen = (inside >= 0) & (inside % patch == 0) & (slots <= index)
        scope = Scope(seen[:, None, :], jnp.maximum(inside, 0) // patch)
        inputs = model.global_input_at(recent, segment_position[:, None], most)
        context, layers = model.global_transformer.extend(inputs, cache.layers, index, scope)
        return model.split(context)[:, 0], _read_at(layers, index, 1)

    def skip() -> tuple[Array, tuple[KeyValueCache, ...]]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))

    shares, layers = jax.lax.cond(starts.any(), run, skip)
    old_shares = jax.lax.dynamic_slice_in_dim(cache.shares, index, patch, axis=1)
    shares = jnp.where(starts[:, None, None], shares, old_shares)
    return cache._replace(
        layers=write_at(cache.layers, layers, index),
        shares=write_at(cache.shares, shares, index),
    )


def _read_at(buffers: Any, index: int | Array, count: int) -> Any:
    """Positions `index` … `index + count − 1` of axis 1 of every array in a tree."""
    return jax.tree.map(
        lambda buffer: jax.lax.dynamic_slice_in_dim(buffer, index, count, axis=1), buffers
    )
