"""Cached decoding of MEGABYTE, for the methods of `models.megabyte.Megabyte`.

One round is one patch, and the global transformer runs once per round. With `reset_on` a round is
one byte, and the global transformer runs when a patch starts in some row. Axes: B batch, T bytes, L
positions of a cache, P bytes per patch, D width, K head width, V vocabulary. The mirror of
`bytelm_jax/models/megabyte_decoding.py`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from bytelm_torch.layers.attention import KeyValueCache, Scope
from bytelm_torch.layers.caches import (
    Index,
    in_each_row,
    positions_from,
    read_at,
    take_at,
    write_at,
)
from bytelm_torch.layers.ids import as_ids
from bytelm_torch.layers.resets import extend_segment_starts, find_segment_starts, lay_out, scope_of
from bytelm_torch.models.interface import Choose

if TYPE_CHECKING:
    from bytelm_torch.models.megabyte import Megabyte


class MegabyteCache(NamedTuple):
    """The state of cached decoding: the global layers' keys and values, S = patches."""

    layers: tuple[KeyValueCache, ...]


class Round(NamedTuple):
    """The state within a round: each byte's share of the context, the local keys and values."""

    context: Float[Tensor, "B P D"]
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
    contexts: Float[Tensor, "B L W"]
    """What the global transformer made of the patch that starts at a position, W = P·D_G."""
    ids: Int[Tensor, "B I"]
    """The ids, after P pads."""
    segment_starts: Int[Tensor, "B L"]
    """Where the segment of each position starts; all 0 without `reset_on`."""


Cache = MegabyteCache | ByteCache


def init_cache(model: "Megabyte", batch: int, length: int, by_byte: bool) -> Cache:
    """A `ByteCache` if the model resets within a row or if asked for, else a `MegabyteCache`."""
    model.check_length(length)
    patch, weight = model.config.patch_size, model.to_logits.weight
    if model.config.reset_on == "none" and not by_byte:
        patches = -(-length // patch)
        return MegabyteCache(model.global_transformer.empty_caches(batch, patches, weight.dtype))
    capacity = length + patch - 1
    ids = torch.full((batch, patch + length), model.config.vocab.pad_id, device=weight.device)
    return ByteCache(
        model.global_transformer.empty_caches(batch, length, weight.dtype),
        model.local_transformer.empty_caches(batch, capacity, weight.dtype),
        weight.new_zeros(batch, length, model.config.global_width),
        ids,
        torch.zeros(batch, length, dtype=torch.int64, device=weight.device),
    )


def prefill(model: "Megabyte", ids: Integer[Tensor, "B T"], cache: Cache) -> Cache:
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
    previous: Integer[Tensor, "B T"],
    cache: MegabyteCache,
    index: Index,
) -> MegabyteCache:
    """Runs more patches through the global transformer, each after its `previous` one."""
    c, batch = model.config, previous.shape[0]
    patches = as_ids(previous).reshape(batch, -1, c.patch_size)
    numbers = positions_from(index, patches.shape[1], previous.device).expand(batch, -1)
    inputs = model.global_input_at(patches, numbers, c.patches(c.max_length))
    _, layers = model.global_transformer.extend(inputs, cache.layers, index)
    return MegabyteCache(layers)


def decode_round(
    model: "Megabyte",
    cache: MegabyteCache,
    previous: Integer[Tensor, "B P"],
    index: Index,
    choose: Choose,
) -> tuple[MegabyteCache, Int[Tensor, "B P"]]:
    """Runs the global transformer once, on the previous round, then the local one byte by byte."""
    previous = as_ids(previous)
    cache, state, byte = start_round(model, cache, previous, index)
    chosen = []
    for i in range(previous.shape[1]):
        logits, state = round_logits(model, state, byte, i)
        byte = as_ids(choose(logits, i))
        chosen.append(byte)
    return cache, torch.stack(chosen, dim=1)


def start_round(
    model: "Megabyte", cache: MegabyteCache, previous: Int[Tensor, "B P"], index: Index
) -> tuple[MegabyteCache, Round, Int[Tensor, " B"]]:
    """Runs the global transformer on the previous round; also gives the byte before the first."""
    (batch, patch), c = previous.shape, model.config
    number = in_each_row(index, batch, previous.device)[:, None]
    inputs = model.global_input_at(previous[:, None], number, c.patches(c.max_length))
    context, layers = model.global_transformer.extend(inputs, cache.layers, index)
    context = model.split(context)[:, 0]
    local = model.local_transformer.empty_caches(batch, patch, context.dtype)
    first = torch.full_like(previous[:, 0], model.config.vocab.pad_id)
    before = previous[:, -1] if model.config.variant == "in_action" else first
    return MegabyteCache(layers), Round(context, local), before


def round_logits(
    model: "Megabyte", state: Round, before: Int[Tensor, " B"], i: int
) -> tuple[Float[Tensor, "B V"], Round]:
    """Runs the local transformer on the round's byte number i."""
    hidden = model.local_input(before[:, None]) + state.context[:, i : i + 1]
    hidden, local = model.local_transformer.extend(hidden, state.local, i)
    return model.to_logits(hidden)[:, 0], Round(state.context, local)


def _prefill_segments(model: "Megabyte", ids: Tensor, cache: ByteCache) -> ByteCache:
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

    def at_bytes(x: Tensor, slots: Tensor) -> Tensor:
        flat = x.reshape(batch, -1, x.shape[-1])
        return flat.take_along_dim(slots[..., None], dim=1)

    slots = layout.slots
    layers = _each(layers, lambda x: at_bytes(x, slots // c.patch_size))
    write_at(cache.layers, layers, 0)
    write_at(cache.local, _each(local, lambda x: at_bytes(x, slots)), c.patch_size - 1)
    write_at(cache.contexts, at_bytes(context, slots // c.patch_size), 0)
    write_at(cache.ids, ids, c.patch_size)
    write_at(cache.segment_starts, find_segment_starts(ids, c.vocab, c.reset_on), 0)
    return cache


def extend(
    model: "Megabyte",
    before: Integer[Tensor, "B T"],
    cache: ByteCache,
    index: Index,
    within_patch: bool = False,
) -> tuple[Float[Tensor, "B T V"], ByteCache, Int[Tensor, " B"]]:
    """Runs the local transformer on T bytes of each row, the global one where patches start.

    Also gives how many of the logits hold: all, or `within_patch` those before the next patch.
    """
    c, pad, before = model.config, model.config.vocab.pad_id, as_ids(before)
    count, behind = before.shape[1], c.patch_size - 1
    starts = extend_segment_starts(before, index, cache.segment_starts, c.vocab, c.reset_on)
    positions = positions_from(index, count, before.device).expand(before.shape)
    inside = positions - starts
    segment_positions, offsets = inside // c.patch_size, inside % c.patch_size
    write_at(cache.ids, before, index + behind)
    write_at(cache.segment_starts, starts, index)
    patch_starts, those = offsets == 0, slice(None)
    reach = torch.full((len(before),), count, device=before.device)
    if within_patch:
        later, those = patch_starts[:, 1:], slice(1)
        if count > 1:
            reach = (1 + later.long().argmax(dim=1)).where(later.any(dim=1), reach)
    columns = (starts, segment_positions, patch_starts, positions)
    _start_patches(model, cache, *(column[:, those] for column in columns))

    is_first = starts == positions if c.variant == "in_action" else offsets == 0
    first = positions - offsets
    hidden = model.local_input(before.masked_fill(is_first, pad))
    hidden = hidden + model.share(take_at(cache.contexts, first), offsets)
    # Each byte sees the bytes of its own patch, among the P − 1 before these T and themselves.
    near = read_at(cache.local, index, behind + count)
    slots = positions_from(index - behind, behind + count, before.device)
    mask = (slots[:, None] >= first[..., None]) & (slots[:, None] <= positions[..., None])
    earlier = slots[:, :behind] - first[:, :1]
    inside = torch.cat([earlier.clamp(min=0), offsets], dim=1)
    hidden, near = model.local_transformer.extend(hidden, near, behind, Scope(mask, inside))
    write_at(cache.local, _each(near, lambda x: x[:, behind:]), index + behind)
    return model.to_logits(hidden), cache, reach


def _start_patches(
    model: "Megabyte",
    cache: ByteCache,
    segment_starts: Tensor,
    segment_positions: Tensor,
    starts: Tensor,
    positions: Tensor,
) -> None:
    """Runs the patches that start at some of T positions, `starts`, through the global stack."""
    if not bool(starts.any()):
        return
    c, (batch, count), device = model.config, starts.shape, starts.device
    patch, length = c.patch_size, cache.segment_starts.shape[1]
    # The positions of the starts come first, as many as there can be.
    most = 1 + (count - 1) // patch if c.reset_on == "none" else count
    order = torch.argsort((~starts).long(), dim=1, stable=True)[:, :most]
    real, at, start, number = (
        x.gather(1, order) for x in (starts, positions, segment_starts, segment_positions)
    )

    behind = at[..., None] + torch.arange(patch, device=device)  # the ids are P further on
    recent = take_at(cache.ids, behind.reshape(batch, most * patch)).reshape(batch, most, patch)
    recent = recent.masked_fill((number == 0)[..., None], c.vocab.pad_id)
    slots = torch.arange(length, device=device)
    # Those past the end see its last slot: nobody reads them, but they are finite.
    inside = slots - start[..., None].clamp(max=length - 1)
    seen = (inside >= 0) & (inside % patch == 0) & (slots <= at[..., None])
    # A slot's number within its segment, wherever it is seen.
    number_of = ((slots - cache.segment_starts) // patch).clamp(min=0)
    inputs = model.global_input_at(recent, number, c.patches(c.max_length))
    # What does not start a patch goes past the end, where it is dropped.
    scope, written = Scope(seen, number_of), at.where(real, length)
    context, _ = model.global_transformer.extend(inputs, cache.layers, written, scope)
    write_at(cache.contexts, context, written)


def _each(caches: tuple[KeyValueCache, ...], change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(KeyValueCache(*map(change, pair)) for pair in caches)
