"""Where a segment of the text starts: after each newline, or after each document.

To a model with `reset_on` each segment is a text of its own: its logits are those of the segment
alone. Axes: B batch, T bytes, N patches of P bytes, S slots, D features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from bytelm.config import ByteVocab
from bytelm_torch.layers.attention import Scope
from bytelm_torch.layers.caches import Index, positions_from, take_at
from bytelm_torch.layers.ids import as_ids


def ends_segment(
    ids: Integer[Tensor, "*batch"], vocab: ByteVocab, reset_on: str
) -> Bool[Tensor, "*batch"]:
    """Whether a segment ends with each id: a newline, or with "document" an `eos_id`."""
    ids = as_ids(ids)
    match reset_on:
        case "newline":
            return ids == vocab.offset + ord("\n")
        case "document":
            return ids == vocab.eos_id
        case _:
            return torch.zeros_like(ids, dtype=torch.bool)


def find_segment_starts(
    ids: Integer[Tensor, "B T"], vocab: ByteVocab, reset_on: str
) -> Int[Tensor, "B T"]:
    """The position at which the segment of each position starts; its last id belongs to it.

    `ids` are the ids to be predicted, unshifted; a position's own id does not affect its segment.
    """
    length = ids.shape[1]
    numbers = 1 + torch.arange(length, device=ids.device)[None, :]
    next_start = torch.where(ends_segment(ids, vocab, reset_on), numbers, 0)
    segment_starts = F.pad(next_start, (1, 0))[:, :length]
    return torch.cummax(segment_starts, dim=1).values if length else segment_starts


def extend_segment_starts(
    before: Integer[Tensor, "B T"],
    index: Index,
    segment_starts: Int[Tensor, "B S"],
    vocab: ByteVocab,
    reset_on: str,
) -> Int[Tensor, "B T"]:
    """Cached version of `find_segment_starts` for T positions of each row, from `index` on.

    `before` holds the id before each position, `segment_starts` those of the positions before.
    """
    positions = positions_from(index, before.shape[1], before.device)
    starts = (positions == 0) | ends_segment(before, vocab, reset_on)
    last = take_at(segment_starts, (positions[:, :1] - 1).clamp(min=0))
    found = torch.cummax(positions.where(starts, 0), dim=1).values
    return torch.maximum(found, last.masked_fill(positions[:, :1] == 0, 0))


def position_in_segment(segment_starts: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The number of earlier positions in the same segment, for each position."""
    return (
        torch.arange(segment_starts.shape[1], device=segment_starts.device)[None, :]
        - segment_starts
    )


def pad_segment_starts(
    before: Int[Tensor, "B T"], segment_positions: Int[Tensor, "B T"], pad_id: int
) -> Int[Tensor, "B T"]:
    """`before`, the id before each position, with a pad where a segment starts."""
    return torch.where(segment_positions == 0, pad_id, before)


class Layout(NamedTuple):
    """Text cut into segments and these into patches of P bytes, the last of each one padded.

    S = N·P slots; an empty patch or slot belongs to position T.
    """

    patches: Int[Tensor, "B N P"]
    """The ids in the slots."""
    slots: Int[Tensor, "B T"]
    """The slot of each byte; no two are equal."""
    bytes: Int[Tensor, "B S"]
    """The position of the byte in each slot, T for an empty slot."""
    segment_starts: Int[Tensor, "B N"]
    """The position at which the segment of each patch starts, T for an empty patch."""
    segment_positions: Int[Tensor, "B N"]
    """The number of each patch within its segment, from 0."""
    overflow: Int[Tensor, " B"]
    """Resets that were skipped for lack of capacity."""


def lay_out(
    ids: Int[Tensor, "B T"], vocab: ByteVocab, reset_on: str, patch: int, capacity: int
) -> Layout:
    """The segments of `ids` in `capacity` patches of `patch` bytes; T patches always suffice.

    A segment starts only if the rest of the row, without further resets, still fits; otherwise the
    previous segment continues to the end of the row. So every byte has a slot, and its slot depends
    on earlier bytes and on T alone. `capacity` must be at least T / patch.
    """
    (batch, length), device = ids.shape, ids.device
    segment_starts = find_segment_starts(ids, vocab, reset_on)
    index = torch.arange(length, device=device)[None, :]
    used = (
        torch.cumsum(position_in_segment(segment_starts) % patch == 0, dim=1) - 1
    )  # patches before the one that starts here
    # The number of patches used and still needed can only grow from reset to reset: once one reset
    # does not fit, no later one does.
    fits = used - (-(length - index) // patch) <= capacity
    wanted = (segment_starts == index) & (index > 0)
    segment_starts = torch.where(wanted & fits, index, 0)
    segment_starts = torch.cummax(segment_starts, dim=1).values if length else segment_starts
    segment_positions = position_in_segment(segment_starts)
    slots = (
        torch.cumsum(segment_positions % patch == 0, dim=1) - 1
    ) * patch + segment_positions % patch
    byte_positions = torch.full((batch, capacity * patch), length, device=device)
    byte_positions = byte_positions.scatter(1, slots, index.expand(batch, -1))
    first = byte_positions[:, ::patch]
    starts = F.pad(segment_starts, (0, 1), value=length).gather(1, first)
    patches = F.pad(ids, (0, 1), value=vocab.pad_id).gather(1, byte_positions)
    overflow = (wanted & ~fits).sum(dim=1)
    patches = patches.reshape(batch, capacity, patch)
    return Layout(patches, slots, byte_positions, starts, (first - starts) // patch, overflow)


def scope_of(layout: Layout) -> Scope:
    """Each patch sees itself and the earlier patches of its segment."""
    same_segment = layout.segment_starts[:, :, None] == layout.segment_starts[:, None, :]
    return Scope(same_segment.tril(), layout.segment_positions)


def take_once(x: Float[Tensor, "B S D"], index: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """`x[b, index[b, t]]`, where no two indices of a row are equal."""
    return x.take_along_dim(index[..., None], dim=1)


def segmented_sums(
    x: Float[Tensor, "B T D"], segment_positions: Int[Tensor, "B T"]
) -> Float[Tensor, "B T D"]:
    """Running sums that restart at each segment, in the dtype of `x`.

    By doubling: each round adds the sum that ends as many positions earlier, if it lies in the
    segment. Nothing from before the segment is ever added, so nothing has to cancel, and a position
    has exactly the sum that it has in its segment alone.
    """
    reach = 1
    while reach < x.shape[1]:
        before = F.pad(x, (0, 0, reach, 0))[:, : x.shape[1]]
        x = x + before.masked_fill((segment_positions < reach)[..., None], 0)
        reach *= 2
    return x
