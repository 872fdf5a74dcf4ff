"""Cached decoding of MEGABYTE, for the methods of `models.megabyte.Megabyte`.

One round is one patch, and the global transformer runs once per round. With `reset_on` a round is
one byte, and the global transformer runs when a patch starts in some row. Axes: B batch, T bytes, L
positions of a cache, P bytes per patch, D width, K head width, V vocabulary. The mirror of
`bytelm_jax/models/megabyte_decoding.py`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from bytelm_torch.layers.attention import KeyValueCache, Scope
from bytelm_torch.layers.ids import as_ids
from bytelm_torch.layers.resets import ends_segment, find_segment_starts, lay_out, scope_of
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


class ResetCache(NamedTuple):
    """The state of cached decoding with `reset_on`, where rows differ in their patch boundaries.

    Everything is stored by position, so that later entries may hold anything. L positions, S = P −
    1 + L and I = P + L, including the padding in front.
    """

    layers: tuple[KeyValueCache, ...]
    """The global layers' keys and values, [B, L, K]; read where a patch starts."""
    local: tuple[KeyValueCache, ...]
    """The local layers' keys and values, [B, S, K], after P − 1 zeros."""
    shares: Float[Tensor, "B S D"]
    """Each byte's share of its patch's context, including the bytes of the unfinished patch."""
    ids: Int[Tensor, "B I"]
    """The ids, after P pads."""
    segment_starts: Int[Tensor, "B L"]
    """Where the segment of each position starts."""


def init_cache(model: "Megabyte", batch: int, length: int) -> MegabyteCache | ResetCache:
    """A `ResetCache` if the model resets within a row, otherwise a `MegabyteCache`."""
    model.check_length(length)
    patch, weight = model.config.patch_size, model.to_logits.weight
    if model.config.reset_on == "none":
        patches = -(-length // patch)
        return MegabyteCache(model.global_transformer.empty_caches(batch, patches, weight.dtype))
    capacity = length + patch - 1
    ids = torch.full((batch, patch + length), model.config.vocab.pad_id, device=weight.device)
    return ResetCache(
        model.global_transformer.empty_caches(batch, length, weight.dtype),
        model.local_transformer.empty_caches(batch, capacity, weight.dtype),
        weight.new_zeros(batch, capacity, model.config.local_dim),
        ids,
        torch.zeros(batch, length, dtype=torch.int64, device=weight.device),
    )


def prefill(
    model: "Megabyte", ids: Integer[Tensor, "B T"], cache: MegabyteCache | ResetCache
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
    previous: Integer[Tensor, "B P"],
    index: int,
    choose: Choose,
) -> tuple[MegabyteCache | ResetCache, Int[Tensor, "B P"]]:
    """Runs the global transformer once, on the previous round, then the local one byte by byte."""
    previous = as_ids(previous)
    if isinstance(cache, ResetCache):
        return _decode_byte(model, cache, previous, index, choose)
    cache, state, byte = start_round(model, cache, previous, index)
    chosen = []
    for i in range(previous.shape[1]):
        logits, state = round_logits(model, state, byte, i)
        byte = as_ids(choose(logits, i))
        chosen.append(byte)
    return cache, torch.stack(chosen, dim=1)


def start_round(
    model: "Megabyte", cache: MegabyteCache, previous: Int[Tensor, "B P"], index: int
) -> tuple[MegabyteCache, Round, Int[Tensor, " B"]]:
    """Runs the global transformer on the previous round; also gives the byte before the first."""
    batch, patch = previous.shape
    inputs = model.global_input(previous[:, None, :], index * patch)
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


def _prefill_segments(model: "Megabyte", ids: Tensor, cache: ResetCache) -> ResetCache:
    c, (batch, length) = model.config, ids.shape
    # The patch that the prompt leaves unfinished also needs the shares of its remaining bytes.
    padded = F.pad(ids, (0, c.patch_size - 1), value=c.vocab.pad_id)
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

    def at_bytes(x: Tensor, slots: Tensor) -> Tensor:
        flat = x.reshape(batch, -1, x.shape[-1])
        return flat.take_along_dim(slots[..., None], dim=1)

    slots = layout.slots[:, :length]
    for caches, new_caches, where in (
        (cache.layers, layers, slots // c.patch_size),
        (cache.local, local, slots),
    ):
        start = c.patch_size - 1 if caches is cache.local else 0
        for buffers, values in zip(caches, new_caches, strict=True):
            for buffer, value in zip(buffers, values, strict=True):
                buffer[:, start : start + length] = at_bytes(value, where)
    cache.shares[:, :most] = at_bytes(shares, layout.slots)
    cache.ids[:, c.patch_size : c.patch_size + length] = ids
    cache.segment_starts[:, :length] = find_segment_starts(ids, c.vocab, c.reset_on)
    return cache


def _decode_byte(
    model: "Megabyte", cache: ResetCache, previous: Tensor, index: int, choose: Choose
) -> tuple[ResetCache, Tensor]:
    c, pad = model.config, model.config.vocab.pad_id
    is_segment_start = ends_segment(previous[:, 0], c.vocab, c.reset_on)
    is_segment_start = is_segment_start if index else torch.ones_like(is_segment_start)
    segment_start = torch.where(is_segment_start, index, cache.segment_starts[:, max(index - 1, 0)])
    position = index - segment_start
    segment_position, offset = position // c.patch_size, position % c.patch_size
    cache.ids[:, index + c.patch_size - 1] = previous[:, 0]
    cache.segment_starts[:, index] = segment_start
    _start_patches(model, cache, segment_start, segment_position, offset == 0, index)

    share = cache.shares[:, index : index + 1]
    first = is_segment_start if c.variant == "in_action" else offset == 0
    hidden = model.local_input(torch.where(first[:, None], pad, previous)) + share
    near = tuple(  # views: writing to them writes to the cache
        KeyValueCache(*(buffer[:, index : index + c.patch_size] for buffer in buffers))
        for buffers in cache.local
    )
    slots = torch.arange(c.patch_size, device=previous.device)[None, :]
    inside = slots - (c.patch_size - 1 - offset)[:, None]
    scope = Scope((inside >= 0)[:, None, :], inside.clamp(min=0))
    hidden, _ = model.local_transformer.extend(hidden, near, c.patch_size - 1, scope)
    return cache, as_ids(choose(model.to_logits(hidden)[:, 0], 0))[:, None]


def _start_patches(
    model: "Megabyte",
    cache: ResetCache,
    segment_start: Tensor,
    segment_position: Tensor,
    starts: Tensor,
    index: int,
) -> None:
    """Runs the patches that start at `index`, in the rows `starts`, through the global stack.

    The other rows write keys at positions where none of their patches starts, which are never read.
    """
    if not bool(starts.any()):
        return
    patch, pad = model.config.patch_size, model.config.vocab.pad_id
    most = model.config.patches(model.config.max_length)
    recent = cache.ids[:, index : index + patch]
    recent = torch.where((segment_position == 0)[:, None], pad, recent)[:, None]
    slots = torch.arange(cache.segment_starts.shape[1], device=segment_start.device)[None, :]
    inside = slots - segment_start[:, None]
    seen = (inside >= 0) & (inside % patch == 0) & (slots <= index)
    scope = Scope(seen[:, None, :], inside.clamp(min=0) // patch)
    inputs = model.global_input_at(recent, segment_position[:, None], most)
    context, _ = model.global_transformer.extend(inputs, cache.layers, index, scope)
    shares = cache.shares[:, index : index + patch]
    shares[:] = torch.where(starts[:, None, None], model.split(context)[:, 0], shares)
