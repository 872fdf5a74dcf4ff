"""Cached decoding of MEGABYTE, for the methods of `models.megabyte.Megabyte`.

One round is one patch, and the global transformer runs once per round. With `reset_on` a round is
one byte, and the global transformer runs when a patch starts in some row. Axes: B batch, T bytes, L
positions of a cache, P bytes per patch, D width, K head width, V vocabulary.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from bytelm_jax.layers.attention import KeyValueCache, Scope
from bytelm_jax.layers.caches import (
    Index,
    in_each_row,
    positions_from,
    read_at,
    take_at,
    write_at,
)
from bytelm_jax.layers.ids import as_ids
from bytelm_jax.layers.resets import extend_segment_starts, find_segment_starts, lay_out, scope_of
from bytelm_jax.models.interface import Choose

if TYPE_CHECKING:
    from bytelm_jax.models.megabyte import Megabyte


class MegabyteCache(NamedTuple):
    """The state of cached decoding: the global layers' keys and values, S = patches."""

    layers: tuple[KeyValueCache, ...]


class Round(NamedTuple):
    """The state within a round: each byte's share of the context, the local keys and values."""

    context: Float[Array, "B P D"]
    local: tuple[KeyValueCache, ...]


class ByteCache(NamedTuple):
    """The state of cached decoding byte by byte: with `reset_on`, or for drafts of any length.

    Everything is stored by position, so that later entries may hold anything. L positions, S = P −
    1 + L and I = P + L, including the padding in front.
    """

    layers: tuple[KeyValueCache, ...]
    """The global layers' keys and values, [B, L, K]; read where a patch starts."""
    local: tuple[KeyValueCache, ...]
    """The local layers' keys and values, [B, S, K], after P − 1 zeros."""
    contexts: Float[Array, "B L W"]
    """What the global transformer made of the patch that starts at a position, W = P·D_G."""
    ids: Int[Array, "B I"]
    """The ids, after P pads."""
    segment_starts: Int[Array, "B L"]
    """Where the segment of each position starts; all 0 without `reset_on`."""


Cache = MegabyteCache | ByteCache


def init_cache(model: "Megabyte", batch: int, length: int, by_byte: bool) -> Cache:
    """A `ByteCache` if the model resets within a row or if asked for, else a `MegabyteCache`."""
    model.check_length(length)
    patch, dtype = model.config.patch_size, model.to_logits.kernel[...].dtype
    if model.config.reset_on == "none" and not by_byte:
        patches = -(-length // patch)
        return MegabyteCache(model.global_transformer.empty_caches(batch, patches, dtype))
    capacity = length + patch - 1
    return ByteCache(
        model.global_transformer.empty_caches(batch, length, dtype),
        model.local_transformer.empty_caches(batch, capacity, dtype),
        jnp.zeros((batch, length, model.config.global_width), dtype),
        jnp.full((batch, patch + length), model.config.vocab.pad_id, jnp.int32),
        jnp.zeros((batch, length), jnp.int32),
    )


def prefill(model: "Megabyte", ids: Integer[Array | np.ndarray, "B T"], cache: Cache) -> Cache:
    """Runs the prompt's patches through the global transformer.

    The local transformer's results are kept only with resets: otherwise a round is a whole patch,
    in which the local transformer starts empty.
    """
    ids = as_ids(ids)
    if isinstance(cache, ByteCache):
        return _prefill_segments(model, ids, cache)
    patches = ids.reshape(ids.shape[0], -1, model.config.patch_size)
    inputs = model.global_input(model.shift(patches, axis=1), 0)
    _, layers = model.global_transformer.extend(inputs, cache.layers, 0)
    return MegabyteCache(layers)


def prefill_further(
    model: "Megabyte",
    previous: Integer[Array | np.ndarray, "B T"],
    cache: MegabyteCache,
    index: Index,
) -> MegabyteCache:
    """Runs more patches through the global transformer, each after its `previous` one."""
    c, batch = model.config, previous.shape[0]
    patches = as_ids(previous).reshape(batch, -1, c.patch_size)
    index = in_each_row(index, batch)
    numbers = positions_from(index, patches.shape[1])
    inputs = model.global_input_at(patches, numbers, c.patches(c.max_length))
    _, layers = model.global_transformer.extend(inputs, cache.layers, index)
    return MegabyteCache(layers)


def decode_round(
    model: "Megabyte",
    cache: MegabyteCache,
    previous: Integer[Array | np.ndarray, "B P"],
    index: Index,
    choose: Choose,
) -> tuple[MegabyteCache, Int[Array, "B P"]]:
    """Runs the global transformer once, on the previous round, then the local one byte by byte."""
    previous = as_ids(previous)
    cache, state, byte = start_round(model, cache, previous, index)
    chosen = []
    for i in range(previous.shape[1]):
        logits, state = round_logits(model, state, byte, i)
        byte = as_ids(choose(logits, i))
        chosen.append(byte)
    return cache, jnp.stack(chosen, axis=1)


def start_round(
    model: "Megabyte", cache: MegabyteCache, previous: Int[Array, "B P"], index: Index
) -> tuple[MegabyteCache, Round, Int[Array, " B"]]:
    """Runs the global transformer on the previous round; also gives the byte before the first."""
    (batch, patch), c = previous.shape, model.config
    index = in_each_row(index, batch)
    inputs = model.global_input_at(previous[:, None], index[:, None], c.patches(c.max_length))
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


def _prefill_segments(model: "Megabyte", ids: Array, cache: ByteCache) -> ByteCache:
    c, (batch, length) = model.config, ids.shape
    most = length if c.reset_on != "none" else c.patches(length)
    layout = lay_out(ids, c.vocab, c.reset_on, c.patch_size, most)
    inputs, before = model.inputs_of_segments(layout, c.patches(length))
    dtype = inputs.dtype
    empty = model.global_transformer.empty_caches(batch, most, dtype)
    context, layers = model.global_transformer.extend(inputs, empty, 0, scope_of(layout))
    hidden = model.local_input(before) + model.split(context)
    hidden = hidden.reshape(batch * most, c.patch_size, -1)
    empty = model.local_transformer.empty_caches(batch * most, c.patch_size, dtype)
    _, local = model.local_transformer.extend(hidden, empty, 0)

    def at_bytes(x: Array, slots: Array) -> Array:
        flat = x.reshape(batch, -1, x.shape[-1])
        return jnp.take_along_axis(flat, slots[..., None], axis=1)

    slots = layout.slots
    layers, contexts = jax.tree.map(lambda x: at_bytes(x, slots // c.patch_size), (layers, context))
    local = jax.tree.map(lambda x: at_bytes(x, slots), local)
    segment_starts = find_segment_starts(ids, c.vocab, c.reset_on)
    return ByteCache(
        write_at(cache.layers, layers, 0),
        write_at(cache.local, local, c.patch_size - 1),
        write_at(cache.contexts, contexts, 0),
        write_at(cache.ids, ids.astype(jnp.int32), c.patch_size),
        write_at(cache.segment_starts, segment_starts, 0),
    )


def extend(
    model: "Megabyte",
    before: Integer[Array | np.ndarray, "B T"],
    cache: ByteCache,
    index: Index,
    within_patch: bool = False,
) -> tuple[Float[Array, "B T V"], ByteCache, Int[Array, " B"]]:
    """Runs the local transformer on T bytes of each row, the global one where patches start.

    Also gives how many of the logits hold: all, or `within_patch` those before the next patch.
    """
    c, pad, before = model.config, model.config.vocab.pad_id, as_ids(before)
    index, count = in_each_row(index, before.shape[0]), before.shape[1]
    starts = extend_segment_starts(before, index, cache.segment_starts, c.vocab, c.reset_on)
    positions = positions_from(index, count)
    segment_positions, offsets = jnp.divmod(positions - starts, c.patch_size)
    cache = cache._replace(
        ids=write_at(cache.ids, before, index + c.patch_size - 1),
        segment_starts=write_at(cache.segment_starts, starts, index),
    )
    patch_starts = offsets == 0
    reach = jnp.full(before.shape[0], count, jnp.int32)
    if within_patch:
        later = patch_starts & (jnp.arange(count) > 0)[None, :]
        reach = jnp.where(later.any(axis=1), jnp.argmax(later, axis=1), count).astype(jnp.int32)
        cache = _start_patches(
            model,
            cache,
            starts[:, :1],
            segment_positions[:, :1],
            patch_starts[:, :1],
            positions[:, :1],
        )
    else:
        cache = _start_patches(model, cache, starts, segment_positions, patch_starts, positions)

    is_first = starts == positions if c.variant == "in_action" else offsets == 0
    first = positions - offsets
    hidden = model.local_input(jnp.where(is_first, pad, before))
    hidden = hidden + model.share(take_at(cache.contexts, first), offsets)
    # Each byte sees the bytes of its own patch, among the P − 1 before these T and themselves.
    near = read_at(cache.local, index, c.patch_size - 1 + count)
    slots = positions_from(index - (c.patch_size - 1), c.patch_size - 1 + count)
    mask = (slots[:, None] >= first[..., None]) & (slots[:, None] <= positions[..., None])
    earlier = slots[:, : c.patch_size - 1] - first[:, :1]
    inside = jnp.concatenate([jnp.maximum(earlier, 0), offsets], axis=1)
    hidden, near = model.local_transformer.extend(
        hidden, near, c.patch_size - 1, Scope(mask, inside)
    )
    newest = jax.tree.map(lambda x: x[:, c.patch_size - 1 :], near)
    local = write_at(cache.local, newest, index + c.patch_size - 1)
    return model.to_logits(hidden), cache._replace(local=local), reach


def _start_patches(
    model: "Megabyte",
    cache: ByteCache,
    segment_starts: Array,
    segment_positions: Array,
    starts: Array,
    positions: Array,
) -> ByteCache:
    """Runs the patches that start at some of T positions, `starts`, through the global stack."""
    c, (batch, count) = model.config, starts.shape
    patch, length = c.patch_size, cache.segment_starts.shape[1]
    # The positions of the starts come first, as many as there can be.
    most = 1 + (count - 1) // patch if c.reset_on == "none" else count
    order = jnp.argsort(~starts, axis=1, stable=True)[:, :most]
    pick = lambda x: jnp.take_along_axis(x, order, axis=1)  # noqa: E731
    real, at, start, number = map(pick, (starts, positions, segment_starts, segment_positions))

    def run() -> tuple[Array, tuple[KeyValueCache, ...]]:
        behind = at[..., None] + jnp.arange(patch)[None, None, :]  # the ids are P further on
        recent = take_at(cache.ids, behind.reshape(batch, most * patch))
        recent = recent.reshape(batch, most, patch)
        recent = jnp.where((number == 0)[..., None], c.vocab.pad_id, recent)
        slots = jnp.arange(length)[None, None, :]
        # Those past the end see its last slot: nobody reads them, but they are finite.
        inside = slots - jnp.minimum(start, length - 1)[..., None]
        seen = (inside >= 0) & (inside % patch == 0) & (slots <= at[..., None])
        # A slot's number within its segment, wherever it is seen.
        number_of = (jnp.arange(length)[None, :] - cache.segment_starts) // patch
        scope = Scope(seen, jnp.maximum(number_of, 0))
        inputs = model.global_input_at(recent, number, c.patches(c.max_length))
        written = jnp.where(real, at, length)
        context, layers = model.global_transformer.extend(inputs, cache.layers, written, scope)
        return context, jax.tree.map(lambda x: take_at(x, written), layers)

    def skip() -> tuple[Array, tuple[KeyValueCache, ...]]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))

    contexts, layers = jax.lax.cond(starts.any(), run, skip)
    # What does not start a patch goes past the end, where it is dropped.
    written = jnp.where(real, at, length)
    return cache._replace(
        layers=write_at(cache.layers, layers, written),
        contexts=write_at(cache.contexts, contexts, written),
    )
