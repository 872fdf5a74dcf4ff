"""Cached decoding of the Byte Latent Transformer, for the methods of `models.blt.BLT`.

One round is one byte, and the global transformer runs when a patch ends in some row. Axes: B batch,
T bytes, L positions and N patches of a cache, M vectors per patch, G key heads, K head width, D
width, V vocabulary. `segment_start` holds the start of each row's segment, None if the row is one
text. The mirror of `bytelm_jax/models/blt_decoding.py`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from bytelm import patch_rules
from bytelm.config import BLTConfig
from bytelm_torch.layers.attention import KeyValueCache
from bytelm_torch.layers.ids import as_ids
from bytelm_torch.layers.ngram import ngram_rows
from bytelm_torch.layers.transformer import Caches, position_in
from bytelm_torch.models import patching
from bytelm_torch.models.entropy import (
    empty_segment_starts,
    entropy,
    segment_starts_of,
    shift_right,
    write_prefix,
    write_segment_start,
    write_segment_starts,
)
from bytelm_torch.models.interface import Choose

if TYPE_CHECKING:
    from bytelm_torch.models.blt import BLT


class BLTCache(NamedTuple):
    """The state of cached decoding, by position in s or by patch, so that a round can be repeated.

    L positions, N patches. Anything that a prefill wrote past the true prompt is overwritten by the
    round of its position, or of its patch, before it is read. The tensors are written in place.
    """

    ids: Int[Tensor, "B L"]
    """s, preceded by as many −1 as the longest look-back needs."""
    segment_starts: Int[Tensor, "B M"]
    """The first position of each position's segment, M = L; M = 0 if the row is one text."""
    patches: Int[Tensor, "B L+1"]
    """The patch of each position, known before its byte is, unless that byte starts a segment."""
    histograms: Int[Tensor, "B M"]
    """`patching.histogram_entropy` of each position, M = L if the model reads it, else 0."""
    patcher: Caches
    encoder: Caches
    states: Float[Tensor, "B L D"]
    """The encoder's byte states; a complete patch takes their maximum."""
    pooled: KeyValueCache
    """Keys and values of those states for pooling, [B, L, G, K]."""
    global_layers: Caches
    memory: Caches
    """Keys and values of each patch's vectors for every layer of the decoder, [B, N, M, G, K]."""
    decoder: Caches
    global_calls: Int[Tensor, ""]
    """Rounds in which the global transformer ran."""


def init_cache(model: "BLT", batch: int, length: int) -> BLTCache:
    """An empty cache."""
    c, weight = model.config, model.to_logits.weight
    local, patches = model.encoder.transformer, c.budget(length)
    head = (c.encoder_kv_heads or c.encoder_heads, c.local_dim // c.encoder_heads)
    read = (c.decoder_kv_heads or c.decoder_heads, c.local_dim // c.decoder_heads)

    def empty(*shape: int) -> KeyValueCache:
        return KeyValueCache(weight.new_zeros(shape), weight.new_zeros(shape))

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=weight.device)

    memory = (empty(batch, patches, c.patch_queries, *read) for _ in range(c.decoder_layers))
    return BLTCache(
        ids=integers(batch, patch_rules.look_back(c) - 1 + length).fill_(patch_rules.NO_BYTE),
        segment_starts=empty_segment_starts(batch, length, c, weight.device),
        patches=integers(batch, length + 1),
        histograms=integers(batch, length if c.reads_histograms else 0),
        patcher=model.patcher.init_cache(batch, length).layers if c.patcher == "entropy" else (),
        encoder=local.empty_caches(batch, length, weight.dtype),
        states=weight.new_zeros((batch, length, c.local_dim)),
        pooled=empty(batch, length, *head),
        global_layers=model.global_transformer.empty_caches(batch, patches, weight.dtype),
        memory=tuple(memory),
        decoder=model.decoder.transformer.empty_caches(batch, length, weight.dtype),
        global_calls=integers(),
    )


def prefill(model: "BLT", ids: Integer[Tensor, "B T"], cache: BLTCache) -> BLTCache:
    """Runs the forward pass over the prompt and writes the parts of it into the cache."""
    c, length = model.config, ids.shape[1]
    if length == 0:
        return cache
    segment_starts, entropies = segment_starts_of(ids, c), None
    shifted = shift_right(ids, c.vocab.bos_id, segment_starts)
    if c.patcher == "entropy":
        logits, written = model.patcher.predict_cached(shifted, segment_starts)
        entropies = entropy(logits)
        write_prefix(cache.patcher, written)
    starts = patching.patch_starts(c, shifted, entropies, segment_starts)
    capacity = cache.memory[0].keys.shape[1]
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
    cache.ids[:, first : first + length] = shifted
    write_segment_starts(cache.segment_starts, segment_starts)
    cache.patches[:, : length + 1] = plan.numbers
    cache.histograms[:, : histograms.shape[1]] = histograms
    cache.states[:, :length] = states
    write_prefix((cache.pooled,), (pooled,))
    write_prefix(cache.encoder, encoder)
    write_prefix(cache.global_layers, global_layers)
    write_prefix(cache.memory, memory)
    write_prefix(cache.decoder, decoder)
    return cache


def decode_round(
    model: "BLT", cache: BLTCache, previous: Integer[Tensor, "B 1"], index: int, choose: Choose
) -> tuple[BLTCache, Int[Tensor, "B 1"]]:
    """Runs the local stacks on one byte, and the global transformer if a patch ends with it."""
    byte, segment_start = write_segment_start(previous, index, cache.segment_starts, model.config)
    recent = _remember(model.config, cache, byte, index, segment_start)
    ends, number, first = _mark(model, cache, byte, recent, index, segment_start)

    x = _embed_recent(model, byte, recent, index, segment_start)
    x, _ = model.encoder.transformer.extend(x, cache.encoder, index, segment_start)
    new = model.encoder.cross_attention.keys_values(x)
    cache.states[:, index] = x[:, 0]
    cache.pooled.keys[:, index], cache.pooled.values[:, index] = (part[:, 0] for part in new)
    _finish_patches(model, cache, ends, number, first, index)
    memory = _newest(cache, torch.where(ends, number, number - 1), first)
    x, _ = model.decoder.extend(x, memory, cache.decoder, index, segment_start)
    chosen = as_ids(choose(model.to_logits(x)[:, 0], 0))
    return cache, chosen[:, None]


def _remember(
    config: BLTConfig, cache: BLTCache, byte: Tensor, index: int, segment_start: Tensor | None
) -> Tensor:
    """Writes s_index; gives the ids of its segment that end there."""
    span = patch_rules.look_back(config)
    cache.ids[:, index + span - 1] = byte[:, 0]
    recent = cache.ids[:, index : index + span]
    if segment_start is not None:
        positions = torch.arange(index + 1 - span, index + 1, device=byte.device)
        recent = recent.where(positions >= segment_start[:, None], patch_rules.NO_BYTE)
    if config.reads_histograms:
        values = patching.to_bytes(recent[:, -patch_rules.WINDOWS[-1] :], config.vocab)
        entropies = patching.histogram_entropy(values)
        cache.histograms[:, index] = entropies.where(byte[:, 0] != config.vocab.pad_id, 0)
    return recent


def _mark(
    model: "BLT",
    cache: BLTCache,
    byte: Tensor,
    recent: Tensor,
    index: int,
    segment_start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Writes the patch of the next byte; gives whether a patch ends here, and its number.

    Also gives the number of the segment's first patch, if the model resets.
    """
    c, capacity = model.config, cache.memory[0].keys.shape[1]
    entropies = summed = None
    if c.patcher == "entropy":
        logits, _ = model.patcher.extend(byte, cache.patcher, index, segment_start)
        entropies = entropy(logits)
    number = cache.patches[:, index]
    position, first = torch.full_like(number, index), None
    if segment_start is not None:
        # A segment starts with a patch, whatever the patcher decided before it.
        is_segment_start = (cache.patches[:, max(index - 1, 0)] + 1).clamp(max=capacity)
        number = torch.where((segment_start == index) & (index > 0), is_segment_start, number)
        cache.patches[:, index] = number
        first = cache.patches.gather(1, segment_start[:, None])[:, 0]
        position = position - segment_start
    if c.patcher == "histogram":
        mask = _in_patch(cache, number, index)
        summed = cache.histograms.where(mask, 0).sum(dim=1)
    values = patching.to_bytes(recent[:, -patch_rules.CONTEXT :], c.vocab)
    starts = patching.boundary_after(c, values, position, entropies, summed) | (position == 0)
    ends = starts & (byte[:, 0] != c.vocab.pad_id) & (number < capacity)
    cache.patches[:, index + 1] = number + ends
    return ends, number, first


def _finish_patches(
    model: "BLT", cache: BLTCache, ends: Tensor, number: Tensor, first: Tensor | None, index: int
) -> None:
    """Runs the patches that end here, if any, through the global transformer."""
    if not ends.any():
        return
    mask = _in_patch(cache, number, index)
    patch = model.widen(model.encoder.pool_one(cache.states, cache.pooled, mask))
    patch_entropy = _patch_entropy_of(model.config, cache, mask, patch.dtype)
    patch, layers = model.global_transformer.extend_rows(
        patch, cache.global_layers, number, patch_entropy, first
    )
    vectors = model.decoder.split(patch)[:, 0]
    memory = [cross.keys_values(vectors) for cross in model.decoder.cross_attentions]  # pyright: ignore
    rows = ends.nonzero()[:, 0]
    slot = number[rows]
    pairs = zip((*cache.global_layers, *cache.memory), (*layers, *memory), strict=True)
    for buffers, new_values in pairs:
        for old, new in zip(buffers, new_values, strict=True):
            old[rows, slot] = new[rows].to(old.dtype)  # narrower than the cache under autocast
    cache.global_calls.add_(1)


def _newest(cache: BLTCache, newest: Tensor, first: Tensor | None) -> Caches:
    """Keys and values of the patch `newest` of each row, zeros if its segment has none yet."""
    rows = torch.arange(newest.shape[0], device=newest.device)
    newest_caches = (KeyValueCache(*(part[rows, newest] for part in pair)) for pair in cache.memory)
    if first is None:
        return tuple(newest_caches)
    # A segment that starts past the budget has no patch of its own.
    past = (first >= cache.memory[0].keys.shape[1])[:, None, None, None]
    return tuple(
        KeyValueCache(*(part.masked_fill(past, 0) for part in pair)) for pair in newest_caches
    )


def _in_patch(cache: BLTCache, number: Tensor, index: int) -> Bool[Tensor, "B L"]:
    """The positions up to `index` that belong to the patch `number` of each row."""
    positions = torch.arange(cache.states.shape[1], device=number.device)[None, :]
    return (cache.patches[:, :-1] == number[:, None]) & (positions <= index)


def _patch_entropy_of(
    config: BLTConfig, cache: BLTCache, mask: Tensor, dtype: torch.dtype
) -> Float[Tensor, "B 1"] | None:
    """`BLT.patch_entropy` for one patch per row; `mask` selects its bytes from the cached ones."""
    if not config.entropy_attention:
        return None
    wide = torch.promote_types(dtype, torch.float32)
    ids = cache.ids[:, patch_rules.look_back(config) - 1 :]
    real = mask & (patching.to_bytes(ids, config.vocab) >= 0)
    total = cache.histograms.to(wide).where(mask, 0).sum(dim=1, keepdim=True)
    count = real.sum(dim=1, keepdim=True).clamp(min=1).to(wide)
    return total / (patch_rules.MOST * count)


def _embed_recent(
    model: "BLT", byte: Tensor, recent: Tensor, index: int, segment_start: Tensor | None
) -> Tensor:
    """`BLT.embed` for one position, given the ids that end there, −1 before the first."""
    x, c = model.encoder.embed(byte), model.config
    position = position_in(index, segment_start, x.device)
    if not c.ngram_tables:
        return model.add_positions(x, position)
    grams = recent.clamp(min=0)[:, None, -max(c.ngram_sizes) :]
    inside = (byte != c.vocab.pad_id)[..., None]
    rows = ngram_rows(grams, c).where(inside, c.ngram_tables * c.ngram_rows)
    return model.add_positions(model.add_ngrams(x, rows), position)
