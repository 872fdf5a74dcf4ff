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
from torch.utils._pytree import tree_map

from bytelm import patch_rules
from bytelm.config import BLTConfig
from bytelm_torch.layers.attention import KeyValueCache
from bytelm_torch.layers.caches import (
    Index,
    positions_from,
    read_at,
    swap_heads,
    take_at,
    write_at,
    write_heads_at,
)
from bytelm_torch.layers.ngram import ngram_rows
from bytelm_torch.layers.segments import segment_max, segment_sum
from bytelm_torch.layers.transformer import Caches, positions_at
from bytelm_torch.models import patching
from bytelm_torch.models.entropy import (
    empty_segment_starts,
    entropy,
    extend_shifted,
    segment_starts_of,
    shift_right,
    write_prefix,
    write_segment_starts,
)

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
    ended: Int[Tensor, "B L"]
    """1 where a patch ended. Here no wrong guess shows at a byte that would start a segment."""
    histograms: Int[Tensor, "B M"]
    """`patching.histogram_entropy` of each position, M = L if the model reads it, else 0."""
    patcher: Caches
    encoder: Caches
    states: Float[Tensor, "B L D"]
    """The encoder's byte states; a complete patch takes their maximum."""
    pooled: KeyValueCache
    """Keys and values of those states for pooling, [B, G, L, K]."""
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
        ended=integers(batch, length),
        histograms=integers(batch, length if c.reads_histograms else 0),
        patcher=model.patcher.init_cache(batch, length).layers if c.patcher == "entropy" else (),
        encoder=local.empty_caches(batch, length, weight.dtype),
        states=weight.new_zeros((batch, length, c.local_dim)),
        pooled=empty(batch, head[0], length, head[1]),
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
    cache.ended[:, :length] = plan.numbers.diff(dim=1)
    cache.histograms[:, : histograms.shape[1]] = histograms
    cache.states[:, :length] = states
    write_heads_at(cache.pooled, pooled, 0)
    write_prefix(cache.encoder, encoder)
    write_prefix(cache.global_layers, global_layers)
    write_at(cache.memory, memory, 0)
    write_prefix(cache.decoder, decoder)
    return cache


def extend(
    model: "BLT",
    before: Integer[Tensor, "B T"],
    cache: BLTCache,
    index: Index,
    within_patch: bool = False,
) -> tuple[Float[Tensor, "B T V"], BLTCache, Int[Tensor, " B"]]:
    """Runs the local stacks on T bytes of each row, the global transformer where patches end.

    Also gives how many of the logits hold: all, or `within_patch` those before the next patch ends.
    """
    byte, starts = extend_shifted(before, index, cache.segment_starts, model.config)
    recent = _remember(model.config, cache, byte, index, starts)
    ends, numbers, first = _mark(model, cache, byte, recent, index, starts)

    x = _embed_recent(model, byte, recent, index, starts)
    x, _ = model.encoder.transformer.extend(x, cache.encoder, index, starts)
    new = model.encoder.cross_attention.keys_values(x)
    write_at((cache.states, swap_heads(cache.pooled)), (x, new), index)
    ending, count = _Ending(x, new, byte, ends, numbers, first, index), byte.shape[1]
    reach = torch.full((len(byte),), count, device=byte.device)
    if within_patch:
        later = ends[:, 1:]
        if count > 1:
            reach = (1 + later.long().argmax(dim=1)).where(later.any(dim=1), reach)
        first_of = lambda part: part[:, :1] if isinstance(part, Tensor) else part  # noqa: E731
        ending = tree_map(first_of, ending._replace(start=None))._replace(start=index)
    _finish_patches(model, cache, ending)
    newest = numbers.where(ends, numbers - 1)
    return model.to_logits(_decode(model, cache, x, newest, first, index, starts)), cache, reach


def draft(
    model: "BLT", before: Integer[Tensor, "B 1"], cache: BLTCache, index: Index
) -> tuple[Float[Tensor, "B 1 V"], BLTCache]:
    """As `extend` for one byte, but as if no patch ended after the last that `extend` has read.

    The local stacks alone, which go on past the end of their patch: a guess at what follows.
    """
    byte, starts = extend_shifted(before, index, cache.segment_starts, model.config)
    recent = _remember(model.config, cache, byte, index, starts)
    number = read_at(cache.patches, index, 1)
    write_at(cache.patches, number, index + 1)
    x = _embed_recent(model, byte, recent, index, starts)
    x, _ = model.encoder.transformer.extend(x, cache.encoder, index, starts)
    first = None if starts is None else take_at(cache.patches, starts)
    x = _decode(model, cache, x, number - 1, first, index, starts)
    return model.to_logits(x), cache


def _decode(
    model: "BLT",
    cache: BLTCache,
    x: Tensor,
    newest: Tensor,
    first: Tensor | None,
    index: Index,
    segment_starts: Tensor | None,
) -> Tensor:
    """The decoder on byte states, each of which reads the patch numbered `newest`."""
    if first is not None:
        # A row in a segment that starts past the budget reads past the end, and so zeros.
        capacity = cache.memory[0].keys.shape[1]
        newest = newest.where(first < capacity, capacity)
    memory = tuple(
        KeyValueCache(*(take_at(part, newest) for part in pair)) for pair in cache.memory
    )
    x, _ = model.decoder.extend(x, memory, cache.decoder, index, segment_starts)
    return x


def _remember(
    config: BLTConfig,
    cache: BLTCache,
    byte: Tensor,
    index: Index,
    segment_starts: Tensor | None,
) -> Tensor:
    """Writes the T bytes of s; gives the ids [B, T, N] that end at each of them."""
    span, count = patch_rules.look_back(config), byte.shape[1]
    write_at(cache.ids, byte, index + span - 1)
    recent = read_at(cache.ids, index, span + count - 1).unfold(1, span, 1)
    if segment_starts is not None:
        behind = positions_from(index, count, byte.device)[..., None]
        behind = behind + torch.arange(1 - span, 1, device=byte.device)
        recent = recent.where(behind >= segment_starts[..., None], patch_rules.NO_BYTE)
    if config.reads_histograms:
        values = patching.to_bytes(recent[..., -patch_rules.WINDOWS[-1] :], config.vocab)
        entropies = patching.histogram_entropy(values)
        entropies = entropies.masked_fill(byte == config.vocab.pad_id, 0)
        write_at(cache.histograms, entropies, index)
    return recent


def _mark(
    model: "BLT",
    cache: BLTCache,
    byte: Tensor,
    recent: Tensor,
    index: Index,
    segment_starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Writes the patch of each next byte; gives whether a patch ends at each of T, and its number.

    Also gives the number of the first patch of each one's segment, if the model resets.
    """
    c, capacity, (batch, count) = model.config, cache.memory[0].keys.shape[1], byte.shape
    entropies = summed = None
    if c.patcher == "entropy":
        logits, _ = model.patcher.predict_next(byte, cache.patcher, index, segment_starts)
        entropies = entropy(logits)
    positions = positions_from(index, count, byte.device).expand(batch, -1)
    inside = positions if segment_starts is None else positions - segment_starts
    values = patching.to_bytes(recent[..., -patch_rules.CONTEXT :], c.vocab)
    behind = (positions[:, :1] - 1).clamp(min=0)
    before = take_at(cache.patches, behind)[:, 0]
    number = before + take_at(cache.ended, behind)[:, 0].where(positions[:, 0] > 0, 0)
    if c.patcher == "histogram":
        in_patch = _in_patch(cache, number, positions[:, 0] - 1)
        # What the patch has before the first of the T bytes, if that byte starts no segment.
        summed = cache.histograms.where(in_patch, 0).sum(dim=1)
    new = read_at(cache.histograms, index, count) if summed is not None else None
    is_first, is_byte = inside == 0, byte != c.vocab.pad_id
    # Only the histogram's sums depend on where the patch before ended.
    marked = None if summed is not None else patching.boundary_after(c, values, inside, entropies)
    numbers, ends = [], []
    for t in range(count):
        if segment_starts is not None:
            # A segment starts with a patch, whatever the patcher decided before it.
            starts = is_first[:, t] & (positions[:, t] > 0)
            next_one = (before + 1).clamp(max=capacity)
            if summed is not None:
                summed = summed.masked_fill(starts & (number == before), 0)
            number = next_one.where(starts, number)
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
            summed = summed.masked_fill(ended, 0)
    all_numbers = torch.stack([*numbers, number], dim=1)
    all_ends = torch.stack(ends, dim=1)
    write_at((cache.patches, cache.ended), (all_numbers, all_ends), index)
    first = None if segment_starts is None else take_at(cache.patches, segment_starts)
    return all_ends, all_numbers[:, :-1], first


class _Ending(NamedTuple):
    """T new bytes of each row, whose patches may end among them."""

    states: Tensor
    """[B, T, D], and their keys and values for pooling."""
    pooled: KeyValueCache
    byte: Tensor
    ends: Tensor
    """Whether a patch ends at each byte [B, T], the number of its patch and its segment's first."""
    numbers: Tensor
    first: Tensor | None
    start: Index


def _finish_patches(model: "BLT", cache: BLTCache, new: _Ending) -> None:
    """Runs the patches that end here, if any, through the global transformer.

    T bytes end at most T patches, numbered from that of the first byte on. Those that end later
    than the first began among these bytes, so only the first reads the cache.
    """
    if not new.ends.any():
        return
    number, count = new.numbers[:, 0], new.ends.shape[1]
    slots = positions_from(number, count)
    is_slot = new.numbers[:, None, :] == slots[:, :, None]
    ended = (is_slot & new.ends[:, None, :]).any(dim=2)
    first = None
    if new.first is not None:
        first = new.first[:, None, :].where(is_slot, 0).amax(dim=2)
    patches = _pool(model, cache, new)
    patch_entropy = _patch_entropy_of(model.config, cache, new, patches.dtype)
    patches, layers = model.global_transformer.extend_rows(
        model.widen(patches), cache.global_layers, number, patch_entropy, first
    )
    vectors = model.decoder.split(patches)
    memory = tuple(cross.keys_values(vectors) for cross in model.decoder.cross_attentions)  # pyright: ignore
    # A slot past the end is dropped: a patch that goes on writes nothing.
    at = slots.where(ended, cache.memory[0].keys.shape[1])
    write_at((swap_heads(cache.global_layers), cache.memory), (layers, memory), at)
    cache.global_calls.add_(1)


def _pool(model: "BLT", cache: BLTCache, new: _Ending) -> Float[Tensor, "B T W"]:
    """The patches from that of the first byte on, the first of all its bytes in the cache."""
    first, count = _first_patch(cache, new), new.ends.shape[1]
    patches = model.encoder.pool_one(cache.states, cache.pooled, first)
    if count == 1:
        return patches
    queries = segment_max(new.states, _later_patch(new), count - 1)
    later = model.encoder.pool_cached(queries, new.pooled, _later_patch(new))
    return torch.cat([patches, later], dim=1)


def _first_patch(cache: BLTCache, new: _Ending) -> Bool[Tensor, "B L"]:
    """The positions of the patch of the first of the new bytes, up to the last of these."""
    count = new.ends.shape[1]
    last = positions_from(new.start, count, new.ends.device)[:, -1]
    return _in_patch(cache, new.numbers[:, 0], last)


def _later_patch(new: _Ending) -> Int[Tensor, "B T"]:
    """The patch of each new byte, counted from the second; T − 1 for those of the first."""
    later = new.numbers - new.numbers[:, :1] - 1
    return later.where(later >= 0, later.shape[1] - 1)


def _in_patch(cache: BLTCache, number: Tensor, index: Tensor) -> Bool[Tensor, "B L"]:
    """The positions up to `index` that belong to the patch `number` of each row."""
    positions = torch.arange(cache.states.shape[1], device=number.device)[None, :]
    return (cache.patches[:, :-1] == number[:, None]) & (positions <= index[:, None])


def _patch_entropy_of(
    config: BLTConfig, cache: BLTCache, new: _Ending, dtype: torch.dtype
) -> Float[Tensor, "B T"] | None:
    """`BLT.patch_entropy` of the patches of `_pool`."""
    if not config.entropy_attention:
        return None
    wide, count = torch.promote_types(dtype, torch.float32), new.ends.shape[1]
    ids = cache.ids[:, patch_rules.look_back(config) - 1 :]
    mask = _first_patch(cache, new)
    real = mask & (patching.to_bytes(ids, config.vocab) >= 0)
    bits = cache.histograms.to(wide).where(mask, 0).sum(dim=1, keepdim=True)
    counted = real.sum(dim=1, keepdim=True).to(wide)
    if count > 1:
        histograms = read_at(cache.histograms, new.start, count).to(wide)
        is_byte = (patching.to_bytes(new.byte, config.vocab) >= 0).to(wide)
        both = torch.stack([histograms, is_byte], dim=-1)
        later = segment_sum(both, _later_patch(new), count - 1)
        bits = torch.cat([bits, later[..., 0]], dim=1)
        counted = torch.cat([counted, later[..., 1]], dim=1)
    return bits / (patch_rules.MOST * counted.clamp(min=1))


def _embed_recent(
    model: "BLT", byte: Tensor, recent: Tensor, index: Index, segment_starts: Tensor | None
) -> Tensor:
    """`BLT.embed` for T positions, given the ids that end at each, −1 before the first."""
    x, c = model.encoder.embed(byte), model.config
    position = positions_at(index, byte.shape, segment_starts, x.device)
    if not c.ngram_tables:
        return model.add_positions(x, position)
    grams = recent.clamp(min=0)[..., -max(c.ngram_sizes) :]
    inside = (byte != c.vocab.pad_id)[..., None]
    rows = ngram_rows(grams, c).where(inside, c.ngram_tables * c.ngram_rows)
    return model.add_positions(model.add_ngrams(x, rows), position)
