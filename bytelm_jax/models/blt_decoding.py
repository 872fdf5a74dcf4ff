"""Cached decoding of the Byte Latent Transformer, for the methods of `models.blt.BLT`.

One round is one byte, and the global transformer runs when a patch ends in some row. Axes: B batch,
T bytes, L positions and N patches of a cache, M vectors per patch, G key heads, K head width, D
width, V vocabulary. `segment_start` holds the start of each row's segment, None if the row is one
text.
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from bytelm import patch_rules
from bytelm.config import BLTConfig
from bytelm_jax.kernels.decode_weights import (
    layer_weights,
    packed_columns,
    packed_vectors,
)
from bytelm_jax.kernels.segment_sum import segment_sum
from bytelm_jax.layers.attention import KeyValueCache
from bytelm_jax.layers.caches import (
    Index,
    in_each_row,
    positions_from,
    read_at,
    take_at,
    write_at,
    write_heads_at,
)
from bytelm_jax.layers.ngram import ngram_rows
from bytelm_jax.layers.segments import segment_max
from bytelm_jax.layers.transformer import Caches, positions_at
from bytelm_jax.models import patching
from bytelm_jax.models.entropy import (
    empty_segment_starts,
    entropy,
    extend_shifted,
    segment_starts_of,
    shift_right,
    write_prefix,
    write_segment_starts,
)
from bytelm_jax.models.interface import pack, pack_heads, unpack, unpack_heads

if TYPE_CHECKING:
    from bytelm_jax.models.blt import BLT


class BLTCache(NamedTuple):
    """The state of cached decoding, by position in s or by patch, so that a round can be repeated.

    L positions, N patches. Anything that a prefill wrote past the true prompt is overwritten by the
    round of its position, or of its patch, before it is read.
    """

    ids: Int[Array, "B L"]
    """s, preceded by as many −1 as the longest look-back needs."""
    segment_starts: Int[Array, "B M"]
    """The first position of each position's segment, M = L; M = 0 if the row is one text."""
    patches: Int[Array, "B L+1"]
    """The patch of each position, known before its byte is, unless that byte starts a segment."""
    ended: Int[Array, "B L"]
    """1 where a patch ended. Here no wrong guess shows at a byte that would start a segment."""
    histograms: Int[Array, "B M"]
    """`patching.histogram_entropy` of each position, M = L if the model reads it, else 0."""
    patcher: Caches
    encoder: Caches
    states: Float[Array, "B L D"]
    """The encoder's byte states; a complete patch takes their maximum."""
    pooled: KeyValueCache
    """Keys and values of those states for pooling, [B, G, L, K]."""
    global_layers: Float[Array, "B C N J"]
    """Keys and values of each patch in all layers of the global transformer, by head."""
    memory: Float[Array, "B N E"]
    """Keys and values of each patch's vectors, [M, G, K], for all layers of the decoder."""
    decoder: Caches
    global_calls: Int[Array, ""]
    """Rounds in which the global transformer ran."""


def init_cache(model: "BLT", batch: int, length: int) -> BLTCache:
    """An empty cache."""
    c, dtype = model.config, model.to_logits.kernel[...].dtype
    local, patches = model.encoder.transformer, c.budget(length)
    head = (c.encoder_kv_heads or c.encoder_heads, c.local_dim // c.encoder_heads)
    pooled = jnp.zeros((batch, head[0], length, head[1]), dtype)
    return BLTCache(
        ids=jnp.full(
            (batch, patch_rules.look_back(c) - 1 + length), patch_rules.NO_BYTE, jnp.int32
        ),
        segment_starts=empty_segment_starts(batch, length, c),
        patches=jnp.zeros((batch, length + 1), jnp.int32),
        ended=jnp.zeros((batch, length), jnp.int32),
        histograms=jnp.zeros((batch, length if c.reads_histograms else 0), jnp.int32),
        patcher=model.patcher.init_cache(batch, length).layers if c.patcher == "entropy" else (),
        encoder=local.empty_caches(batch, length, dtype),
        states=jnp.zeros((batch, length, c.local_dim), dtype),
        pooled=KeyValueCache(pooled, pooled),
        global_layers=pack_heads(model.global_transformer.empty_caches(batch, patches, dtype), 1),
        memory=pack(_empty_memory(c, (batch, patches), dtype), 2),
        decoder=model.decoder.transformer.empty_caches(batch, length, dtype),
        global_calls=jnp.zeros((), jnp.int32),
    )


def prefill(model: "BLT", ids: Integer[Array | np.ndarray, "B T"], cache: BLTCache) -> BLTCache:
    """Runs the forward pass over the prompt and writes the parts of it into the cache."""
    c, length = model.config, ids.shape[1]
    if length == 0:
        return cache
    segment_starts, entropies = segment_starts_of(ids, c), None
    shifted, patcher = shift_right(ids, c.vocab.bos_id, segment_starts), cache.patcher
    if c.patcher == "entropy":
        logits, written = model.patcher.predict_cached(shifted, segment_starts)
        entropies, patcher = entropy(logits), write_prefix(patcher, written)
    starts = patching.patch_starts(c, shifted, entropies, segment_starts)
    capacity = cache.memory.shape[1]
    counted = patching.present(shifted, c.vocab, segment_starts)
    plan = patching.plan_patches(starts, counted, min(capacity, length), segment_starts)

    embedded = model.embed(shifted, segment_starts)
    states, encoder = model.encoder.transformer(embedded, segment_starts=segment_starts)
    patches, pooled = model.encoder.pool(states, plan.patch_of, min(capacity, length))
    histograms = model.histograms(shifted, counted, segment_starts)
    patch_entropy = model.patch_entropy(histograms, shifted, plan, patches.dtype)
    patches, global_layers = model.global_transformer(
        model.widen(patches), patch_entropy=patch_entropy, segment_starts=plan.segment_starts
    )
    _, memory, decoder = model.decoder(states, patches, plan.read_of, segment_starts=segment_starts)
    first = patch_rules.look_back(c) - 1
    return cache._replace(
        ids=cache.ids.at[:, first : first + length].set(shifted.astype(jnp.int32)),
        segment_starts=write_segment_starts(cache.segment_starts, segment_starts),
        patches=cache.patches.at[:, : length + 1].set(plan.numbers),
        ended=cache.ended.at[:, :length].set(jnp.diff(plan.numbers, axis=1)),
        histograms=cache.histograms.at[:, : histograms.shape[1]].set(histograms),
        patcher=patcher,
        encoder=write_prefix(cache.encoder, encoder),
        states=cache.states.at[:, :length].set(states),
        pooled=write_heads_at(cache.pooled, pooled, 0),
        global_layers=write_heads_at(cache.global_layers, pack_heads(global_layers, 2), 0),
        memory=write_at(cache.memory, pack(memory, 2), 0),
        decoder=write_prefix(cache.decoder, decoder),
    )


def extend(
    model: "BLT",
    before: Integer[Array | np.ndarray, "B T"],
    cache: BLTCache,
    index: Index,
    within_patch: bool = False,
) -> tuple[Float[Array, "B T V"], BLTCache, Int[Array, " B"]]:
    """Runs the local stacks on T bytes of each row, the global transformer where patches end.

    Also gives how many of the logits hold: all, or `within_patch` those before the next patch ends.
    """
    index = in_each_row(index, before.shape[0])
    byte, buffer, starts = extend_shifted(before, index, cache.segment_starts, model.config)
    cache, recent = _remember(
        model.config, cache._replace(segment_starts=buffer), byte, index, starts
    )
    cache, ends, numbers, first = _mark(model, cache, byte, recent, index, starts)

    x = _embed_recent(model, byte, recent, index, starts)
    x, encoder = model.encoder.transformer.extend(x, cache.encoder, index, starts)
    new = model.encoder.cross_attention.keys_values(x)
    cache = cache._replace(
        encoder=encoder,
        states=write_at(cache.states, x, index),
        pooled=write_heads_at(cache.pooled, new, index),
    )
    ending, reach = _Ending(x, new, byte, ends, numbers, first, index), byte.shape[1]
    if within_patch:
        later = ends & (jnp.arange(reach) > 0)[None, :]
        reach = jnp.where(later.any(axis=1), jnp.argmax(later, axis=1), reach)
        ending = jax.tree.map(lambda part: part[:, :1], ending._replace(start=index[:, None]))
        ending = ending._replace(start=index)
    cache = _finish_patches(model, cache, ending)
    newest = jnp.where(ends, numbers, numbers - 1)
    x, decoder = _decode(model, cache, x, newest, first, index, starts)
    reach = jnp.broadcast_to(jnp.asarray(reach, jnp.int32), index.shape)
    return model.to_logits(x), cache._replace(decoder=decoder), reach


def draft(
    model: "BLT", before: Integer[Array | np.ndarray, "B 1"], cache: BLTCache, index: Index
) -> tuple[Float[Array, "B 1 V"], BLTCache]:
    """As `extend` for one byte, but as if no patch ended after the last that `extend` has read.

    The local stacks alone, which go on past the end of their patch: a guess at what follows.
    """
    index = in_each_row(index, before.shape[0])
    byte, buffer, starts = extend_shifted(before, index, cache.segment_starts, model.config)
    cache, recent = _remember(
        model.config, cache._replace(segment_starts=buffer), byte, index, starts
    )
    number = take_at(cache.patches, index[:, None])
    cache = cache._replace(patches=write_at(cache.patches, number, index + 1))
    x = _embed_recent(model, byte, recent, index, starts)
    x, encoder = model.encoder.transformer.extend(x, cache.encoder, index, starts)
    first = None if starts is None else take_at(cache.patches, starts)
    x, decoder = _decode(model, cache, x, number - 1, first, index, starts)
    return model.to_logits(x), cache._replace(encoder=encoder, decoder=decoder)


def _decode(
    model: "BLT",
    cache: BLTCache,
    x: Array,
    newest: Array,
    first: Array | None,
    index: Array,
    segment_starts: Array | None,
) -> tuple[Array, Caches]:
    """The decoder on byte states, each of which reads the patch numbered `newest`."""
    if first is not None:
        # A row in a segment that starts past the budget reads past the end, and so zeros.
        capacity = cache.memory.shape[1]
        newest = jnp.where(first < capacity, newest, capacity)
    read = take_at(cache.memory, newest)
    template = _empty_memory(model.config, (1, 1), read.dtype)
    if layer_weights(model.decoder.cross_attentions[0], x) is not None:
        memory = packed_vectors(read[:, 0], template)
    else:
        memory = unpack(read, template)
    return model.decoder.extend(x, memory, cache.decoder, index, segment_starts)


def _remember(
    config: BLTConfig,
    cache: BLTCache,
    byte: Array,
    index: Array,
    segment_starts: Array | None,
) -> tuple[BLTCache, Array]:
    """The cache with the T bytes of s written, and the ids [B, T, N] that end at each of them."""
    span, count = patch_rules.look_back(config), byte.shape[1]
    ids = write_at(cache.ids, byte.astype(jnp.int32), index + span - 1)
    near = read_at(ids, index, span + count - 1)
    recent = jnp.stack([near[:, t : t + span] for t in range(count)], axis=1)
    if segment_starts is not None:
        behind = positions_from(index, count)[..., None] + jnp.arange(1 - span, 1)[None, None]
        recent = jnp.where(behind >= segment_starts[..., None], recent, patch_rules.NO_BYTE)
    histograms = cache.histograms
    if config.reads_histograms:
        values = patching.to_bytes(recent[..., -patch_rules.WINDOWS[-1] :], config.vocab)
        entropies = patching.histogram_entropy(values)
        entropies = jnp.where(byte == config.vocab.pad_id, 0, entropies)
        histograms = write_at(histograms, entropies, index)
    return cache._replace(ids=ids, histograms=histograms), recent


def _mark(
    model: "BLT",
    cache: BLTCache,
    byte: Array,
    recent: Array,
    index: Array,
    segment_starts: Array | None,
) -> tuple[BLTCache, Array, Array, Array | None]:
    """The cache with the patch of each next byte; whether a patch ends at each of T; its number.

    Also gives the number of the first patch of each one's segment, if the model resets.
    """
    c, capacity, count = model.config, cache.memory.shape[1], byte.shape[1]
    patcher, entropies = cache.patcher, None
    if c.patcher == "entropy":
        logits, patcher = model.patcher.predict_next(byte, patcher, index, segment_starts)
        entropies = entropy(logits)
    positions = positions_from(index, count)
    inside = positions if segment_starts is None else positions - segment_starts
    values = patching.to_bytes(recent[..., -patch_rules.CONTEXT :], c.vocab)
    behind = jnp.maximum(index - 1, 0)[:, None]
    before = take_at(cache.patches, behind)[:, 0]
    number = before + jnp.where(index > 0, take_at(cache.ended, behind)[:, 0], 0)
    # What the patch has before the first of the T bytes, if that byte starts no segment.
    summed, new = None, take_at(cache.histograms, positions) if c.reads_histograms else None
    if c.patcher == "histogram":
        summed = jnp.where(_in_patch(cache, number, index - 1), cache.histograms, 0).sum(axis=1)
    is_first, is_byte = inside == 0, byte != c.vocab.pad_id
    # Only the histogram's sums depend on where the patch before ended.
    marked = None if summed is not None else patching.boundary_after(c, values, inside, entropies)
    numbers, ends = [], []
    for t in range(count):
        if segment_starts is not None:
            # A segment starts with a patch, whatever the patcher decided before it.
            starts = is_first[:, t] & (positions[:, t] > 0)
            next_one = jnp.minimum(before + 1, capacity)
            if summed is not None:
                summed = jnp.where(starts & (number == before), 0, summed)
            number = jnp.where(starts, next_one, number)
        if summed is not None and new is not None:
            summed = summed + new[:, t]
        after = (
            patching.boundary_after(c, values[:, t], inside[:, t], None, summed)
            if marked is None
            else marked[:, t]
        )
        ended = (after | is_first[:, t]) & is_byte[:, t] & (number < capacity)
        numbers.append(number)
        ends.append(ended)
        before, number = number, number + ended
        if summed is not None:
            summed = jnp.where(ended, 0, summed)
    all_numbers, all_ends = jnp.stack([*numbers, number], axis=1), jnp.stack(ends, axis=1)
    cache = cache._replace(
        patcher=patcher,
        patches=write_at(cache.patches, all_numbers, index),
        ended=write_at(cache.ended, all_ends.astype(jnp.int32), index),
    )
    first = None if segment_starts is None else take_at(cache.patches, segment_starts)
    return cache, all_ends, all_numbers[:, :-1], first


class _Ending(NamedTuple):
    """T new bytes of each row, whose patches may end among them."""

    states: Array
    """[B, T, D], and their keys and values for pooling."""
    pooled: KeyValueCache
    byte: Array
    ends: Array
    """Whether a patch ends at each byte [B, T], the number of its patch and its segment's first."""
    numbers: Array
    first: Array | None
    start: Array


def _finish_patches(model: "BLT", cache: BLTCache, new: _Ending) -> BLTCache:
    """Runs the patches that end here, if any, through the global transformer.

    T bytes end at most T patches, numbered from that of the first byte on. Those that end later
    than the first began among these bytes, so only the first reads the cache.
    """
    batch, count = new.ends.shape
    capacity, number = cache.memory.shape[1], new.numbers[:, 0]
    slots = positions_from(number, count)
    is_slot = new.numbers[:, None, :] == slots[:, :, None]
    ended = (is_slot & new.ends[:, None, :]).any(axis=2)
    first = None
    if new.first is not None:
        first = jnp.where(is_slot, new.first[:, None, :], 0).max(axis=2)

    def run() -> tuple[Array, Array]:
        patches = _pool(model, cache, new)
        template = model.global_transformer.empty_caches(batch, capacity, patches.dtype)
        patches = model.widen(patches)
        if layer_weights(model.global_transformer.layers[0], patches) is not None:
            layers = packed_columns(cache.global_layers, template)
        else:
            layers = unpack_heads(cache.global_layers, template, 1)
        patch_entropy = _patch_entropy_of(model.config, cache, new, patches.dtype)
        patches, new_layers = model.global_transformer.extend_rows(
            patches, layers, number, patch_entropy, first
        )
        vectors = model.decoder.split(patches)
        read = tuple(cross.keys_values(vectors) for cross in model.decoder.cross_attentions)
        return pack_heads(new_layers, 2), pack(read, 2)

    def skip() -> tuple[Array, Array]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))

    some = ended.any()
    layers, memory = jax.lax.cond(some, run, skip)
    # A slot past the end is dropped: a patch that goes on writes nothing.
    at = jnp.where(ended, slots, capacity)
    return cache._replace(
        global_layers=write_heads_at(cache.global_layers, layers, at),
        memory=write_at(cache.memory, memory, at),
        global_calls=cache.global_calls + some,
    )


def _pool(model: "BLT", cache: BLTCache, new: _Ending) -> Float[Array, "B T W"]:
    """The patches from that of the first byte on, the first of all its bytes in the cache."""
    first, count = _first_patch(cache, new), new.ends.shape[1]
    patches = model.encoder.pool_one(cache.states, cache.pooled, first)
    if count == 1:
        return patches
    queries = segment_max(new.states, _later_patch(new), count - 1)
    later = model.encoder.pool_cached(queries, new.pooled, _later_patch(new))
    return jnp.concatenate([patches, later], axis=1)


def _first_patch(cache: BLTCache, new: _Ending) -> Bool[Array, "B L"]:
    """The positions of the patch of the first of the new bytes, up to the last of these."""
    return _in_patch(cache, new.numbers[:, 0], new.start + new.ends.shape[1] - 1)


def _later_patch(new: _Ending) -> Int[Array, "B T"]:
    """The patch of each new byte, counted from the second; T for those of the first."""
    later = new.numbers - new.numbers[:, :1] - 1
    return jnp.where(later >= 0, later, later.shape[1])


def _empty_memory(config: BLTConfig, lead: tuple[int, ...], dtype: jnp.dtype) -> Caches:
    """Keys and values of patches' vectors for each layer of the decoder, [*lead, M, G, K]."""
    c = config
    read = (c.decoder_kv_heads or c.decoder_heads, c.local_dim // c.decoder_heads)
    empty = jnp.zeros((*lead, c.patch_queries, *read), dtype)
    return (KeyValueCache(empty, empty),) * c.decoder_layers


def _in_patch(cache: BLTCache, number: Array, index: Array) -> Bool[Array, "B L"]:
    """The positions up to `index` that belong to the patch `number` of each row."""
    positions = jnp.arange(cache.states.shape[1])[None, :]
    return (cache.patches[:, :-1] == number[:, None]) & (positions <= index[:, None])


def _patch_entropy_of(
    config: BLTConfig, cache: BLTCache, new: _Ending, dtype: jnp.dtype
) -> Float[Array, "B T"] | None:
    """`BLT.patch_entropy` of the patches of `_pool`."""
    if not config.entropy_attention:
        return None
    wide, count = jnp.promote_types(dtype, jnp.float32), new.ends.shape[1]
    ids = cache.ids[:, patch_rules.look_back(config) - 1 :]
    mask = _first_patch(cache, new)
    real = mask & (patching.to_bytes(ids, config.vocab) >= 0)
    bits = jnp.where(mask, cache.histograms.astype(wide), 0).sum(axis=1, keepdims=True)
    counted = real.sum(axis=1, keepdims=True).astype(wide)
    if count > 1:
        histograms = take_at(cache.histograms, positions_from(new.start, count)).astype(wide)
        is_byte = (patching.to_bytes(new.byte, config.vocab) >= 0).astype(wide)
        both = jnp.stack([histograms, is_byte], axis=-1)
        later = segment_sum(both, _later_patch(new), count - 1)
        bits = jnp.concatenate([bits, later[..., 0]], axis=1)
        counted = jnp.concatenate([counted, later[..., 1]], axis=1)
    return bits / (patch_rules.MOST * jnp.maximum(counted, 1))


def _embed_recent(
    model: "BLT", byte: Array, recent: Array, index: Array, segment_starts: Array | None
) -> Array:
    """`BLT.embed` for T positions, given the ids that end at each, −1 before the first."""
    x, c = model.encoder.embed(byte), model.config
    position = positions_at(index, byte.shape[1], segment_starts)
    if not c.ngram_tables:
        return model.add_positions(x, position)
    grams = jnp.maximum(recent, 0)[..., -max(c.ngram_sizes) :]
    inside = (byte != c.vocab.pad_id)[..., None]
    rows = jnp.where(inside, ngram_rows(grams, c), c.ngram_tables * c.ngram_rows)
    # Without the barrier a GPU recomputes the hashes for each element of the embedding.
    rows = jax.lax.optimization_barrier(rows)
    return model.add_positions(model.add_ngrams(x, rows), position)
