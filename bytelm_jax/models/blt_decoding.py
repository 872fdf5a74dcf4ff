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
from bytelm_jax.layers.attention import KeyValueCache
from bytelm_jax.layers.ids import as_ids
from bytelm_jax.layers.ngram import ngram_rows
from bytelm_jax.layers.transformer import Caches, position_in
from bytelm_jax.models import patching
from bytelm_jax.models.entropy import (
    empty_segment_starts,
    entropy,
    segment_starts_of,
    shift_right,
    write_prefix,
    write_segment_start,
    write_segment_starts,
)
from bytelm_jax.models.interface import Choose, pack, unpack, write_at

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
    histograms: Int[Array, "B M"]
    """`patching.histogram_entropy` of each position, M = L if the model reads it, else 0."""
    patcher: Caches
    encoder: Caches
    states: Float[Array, "B L D"]
    """The encoder's byte states; a complete patch takes their maximum."""
    pooled: KeyValueCache
    """Keys and values of those states for pooling, [B, L, G, K]."""
    global_layers: Float[Array, "B N F"]
    """Keys and values of each patch in all layers of the global transformer (`pack`)."""
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
    pooled = jnp.zeros((batch, length, *head), dtype)
    return BLTCache(
        ids=jnp.full(
            (batch, patch_rules.look_back(c) - 1 + length), patch_rules.NO_BYTE, jnp.int32
        ),
        segment_starts=empty_segment_starts(batch, length, c),
        patches=jnp.zeros((batch, length + 1), jnp.int32),
        histograms=jnp.zeros((batch, length if c.reads_histograms else 0), jnp.int32),
        patcher=model.patcher.init_cache(batch, length).layers if c.patcher == "entropy" else (),
        encoder=local.empty_caches(batch, length, dtype),
        states=jnp.zeros((batch, length, c.local_dim), dtype),
        pooled=KeyValueCache(pooled, pooled),
        global_layers=pack(model.global_transformer.empty_caches(batch, patches, dtype), 2),
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
        histograms=cache.histograms.at[:, : histograms.shape[1]].set(histograms),
        patcher=patcher,
        encoder=write_prefix(cache.encoder, encoder),
        states=cache.states.at[:, :length].set(states),
        pooled=write_prefix((cache.pooled,), (pooled,))[0],
        global_layers=write_at(cache.global_layers, pack(global_layers, 2), 0),
        memory=write_at(cache.memory, pack(memory, 2), 0),
        decoder=write_prefix(cache.decoder, decoder),
    )


def decode_round(
    model: "BLT",
    cache: BLTCache,
    previous: Integer[Array | np.ndarray, "B 1"],
    index: int | Int[Array, ""],
    choose: Choose,
) -> tuple[BLTCache, Int[Array, "B 1"]]:
    """Runs the local stacks on one byte, and the global transformer if a patch ends with it."""
    index = jnp.asarray(index)
    byte, segment_starts, segment_start = write_segment_start(
        previous, index, cache.segment_starts, model.config
    )
    cache = cache._replace(segment_starts=segment_starts)
    cache, recent = _remember(model.config, cache, byte, index, segment_start)
    cache, ends, number, first = _mark(model, cache, byte, recent, index, segment_start)

    x = _embed_recent(model, byte, recent, index, segment_start)
    x, encoder = model.encoder.transformer.extend(x, cache.encoder, index, segment_start)
    new = model.encoder.cross_attention.keys_values(x)
    states, pooled = (
        write_at(buffer, values, index)
        for buffer, values in ((cache.states, x), (cache.pooled, new))
    )
    cache = cache._replace(encoder=encoder, states=states, pooled=pooled)
    cache = _finish_patches(model, cache, ends, number, first, index)
    memory = _newest(model.config, cache, jnp.where(ends, number, number - 1), first)
    x, decoder = model.decoder.extend(x, memory, cache.decoder, index, segment_start)
    chosen = as_ids(choose(model.to_logits(x)[:, 0], 0))
    return cache._replace(decoder=decoder), chosen[:, None]


def _remember(
    config: BLTConfig, cache: BLTCache, byte: Array, index: Array, segment_start: Array | None
) -> tuple[BLTCache, Array]:
    """The cache with s_index written, and the ids of its segment that end there."""
    span = patch_rules.look_back(config)
    ids = write_at(cache.ids, byte.astype(jnp.int32), index + span - 1)
    recent = jax.lax.dynamic_slice_in_dim(ids, index, span, axis=1)
    if segment_start is not None:
        in_segment = index + jnp.arange(1 - span, 1)[None, :] >= segment_start[:, None]
        recent = jnp.where(in_segment, recent, patch_rules.NO_BYTE)
    histograms = cache.histograms
    if config.reads_histograms:
        values = patching.to_bytes(recent[:, -patch_rules.WINDOWS[-1] :], config.vocab)
        entropies = patching.histogram_entropy(values)
        entropies = jnp.where(byte[:, 0] == config.vocab.pad_id, 0, entropies)
        histograms = write_at(histograms, entropies[:, None], index)
    return cache._replace(ids=ids, histograms=histograms), recent


def _mark(
    model: "BLT",
    cache: BLTCache,
    byte: Array,
    recent: Array,
    index: Array,
    segment_start: Array | None,
) -> tuple[BLTCache, Array, Array, Array | None]:
    """The cache with the patch of the next byte; whether a patch ends here; its number.

    Also gives the number of the segment's first patch, if the model resets.
    """
    c, capacity = model.config, cache.memory.shape[1]
    patcher, entropies, summed = cache.patcher, None, None
    if c.patcher == "entropy":
        logits, patcher = model.patcher.extend(byte, patcher, index, segment_start)
        entropies = entropy(logits)
    number = jax.lax.dynamic_index_in_dim(cache.patches, index, axis=1, keepdims=False)
    position, first = jnp.full(number.shape, index), None
    if segment_start is not None:
        # A segment starts with a patch, whatever the patcher decided before it.
        before = jnp.take(cache.patches, jnp.maximum(index - 1, 0), axis=1)
        is_segment_start = jnp.minimum(before + 1, capacity)
        number = jnp.where((segment_start == index) & (index > 0), is_segment_start, number)
        cache = cache._replace(patches=write_at(cache.patches, number[:, None], index))
        first = jnp.take_along_axis(cache.patches, segment_start[:, None], axis=1)[:, 0]
        position = position - segment_start
    if c.patcher == "histogram":
        mask = _in_patch(cache, number, index)
        summed = jnp.where(mask, cache.histograms, 0).sum(axis=1)
    values = patching.to_bytes(recent[:, -patch_rules.CONTEXT :], c.vocab)
    starts = patching.boundary_after(c, values, position, entropies, summed) | (position == 0)
    ends = starts & (byte[:, 0] != c.vocab.pad_id) & (number < capacity)
    patches = write_at(cache.patches, (number + ends)[:, None], index + 1)
    return cache._replace(patcher=patcher, patches=patches), ends, number, first


def _finish_patches(
    model: "BLT", cache: BLTCache, ends: Array, number: Array, first: Array | None, index: Array
) -> BLTCache:
    """Runs the patches that end here, if any, through the global transformer."""
    mask = _in_patch(cache, number, index)
    batch, capacity = cache.memory.shape[:2]

    def run() -> tuple[Array, Array]:
        patch = model.widen(model.encoder.pool_one(cache.states, cache.pooled, mask))
        patch_entropy = _patch_entropy_of(model.config, cache, mask, patch.dtype)
        template = model.global_transformer.empty_caches(batch, capacity, patch.dtype)
        layers = unpack(cache.global_layers, template)
        patch, new_layers = model.global_transformer.extend_rows(
            patch, layers, number, patch_entropy, first
        )
        vectors = model.decoder.split(patch)[:, 0]
        read = tuple(cross.keys_values(vectors) for cross in model.decoder.cross_attentions)
        return pack(new_layers, 1), pack(read, 1)

    def skip() -> tuple[Array, Array]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))

    some = ends.any()
    layers, memory = jax.lax.cond(some, run, skip)
    rows, slot = jnp.arange(batch), jnp.where(ends, number, capacity)
    # A slot past the end is dropped: rows whose patch continues write nothing.
    return cache._replace(
        global_layers=cache.global_layers.at[rows, slot].set(layers, mode="drop"),
        memory=cache.memory.at[rows, slot].set(memory, mode="drop"),
        global_calls=cache.global_calls + some,
    )


def _newest(config: BLTConfig, cache: BLTCache, newest: Array, first: Array | None) -> Caches:
    """Keys and values of the patch `newest` of each row, zeros if its segment has none yet."""
    if first is not None:
        # A row in a segment that starts past the budget reads past the end, and so zeros.
        capacity = cache.memory.shape[1]
        newest = jnp.where(first < capacity, newest, capacity)
    rows = jnp.arange(newest.shape[0])
    read = cache.memory.at[rows, newest].get(mode="fill", fill_value=0)
    return unpack(read, _empty_memory(config, (1,), read.dtype))


def _empty_memory(config: BLTConfig, lead: tuple[int, ...], dtype: jnp.dtype) -> Caches:
    """Keys and values of patches' vectors for each layer of the decoder, [*lead, M, G, K]."""
    c = config
    read = (c.decoder_kv_heads or c.decoder_heads, c.local_dim // c.decoder_heads)
    empty = jnp.zeros((*lead, c.patch_queries, *read), dtype)
    return (KeyValueCache(empty, empty),) * c.decoder_layers


def _in_patch(cache: BLTCache, number: Array, index: Array) -> Bool[Array, "B L"]:
    """The positions up to `index` that belong to the patch `number` of each row."""
    positions = jnp.arange(cache.states.shape[1])[None, :]
    return (cache.patches[:, :-1] == number[:, None]) & (positions <= index)


def _patch_entropy_of(
    config: BLTConfig, cache: BLTCache, mask: Array, dtype: jnp.dtype
) -> Float[Array, "B 1"] | None:
    """`BLT.patch_entropy` for one patch per row; `mask` selects its bytes from the cached ones."""
    if not config.entropy_attention:
        return None
    wide = jnp.promote_types(dtype, jnp.float32)
    ids = cache.ids[:, patch_rules.look_back(config) - 1 :]
    real = mask & (patching.to_bytes(ids, config.vocab) >= 0)
    total = jnp.where(mask, cache.histograms.astype(wide), 0).sum(axis=1, keepdims=True)
    count = jnp.maximum(real.sum(axis=1, keepdims=True), 1).astype(wide)
    return total / (patch_rules.MOST * count)


def _embed_recent(
    model: "BLT", byte: Array, recent: Array, index: Array, segment_start: Array | None
) -> Array:
    """`BLT.embed` for one position, given the ids that end there, −1 before the first."""
    x, c, position = model.encoder.embed(byte), model.config, position_in(index, segment_start)
    if not c.ngram_tables:
        return model.add_positions(x, position)
    grams = jnp.maximum(recent, 0)[:, None, -max(c.ngram_sizes) :]
    inside = (byte != c.vocab.pad_id)[..., None]
    rows = jnp.where(inside, ngram_rows(grams, c), c.ngram_tables * c.ngram_rows)
    # Without the barrier a GPU recomputes the hashes for each element of the embedding.
    rows = jax.lax.optimization_barrier(rows)
    return model.add_positions(model.add_ngrams(x, rows), position)
