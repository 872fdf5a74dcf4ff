"""Patch boundaries: pure functions of static shape, for whole texts and for one byte at a time.

The mirror of `bytelm_jax/models/patching.py`, which explains the rules. Axes: B batch, T bytes, S =
T + 1 bytes and the one still to come, N patches. For a model that resets, `segment_starts` [B, T]
holds the first position of each position's segment.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from bytelm.config import BLTConfig, ByteVocab
from bytelm.patch_rules import (
    BIT,
    CONTEXT,
    NO_BYTE,
    SHARES,
    WINDOWS,
    is_continuation,
    is_separator,
    is_space_like,
)
from bytelm_torch.layers.ids import as_ids


class PatchPlan(NamedTuple):
    """Which byte belongs to which patch, for a budget of N patches.

    Patches past the budget merge into one open last patch, number N, which is neither pooled nor
    read, since it never ends.
    """

    patch_of: Int[Tensor, "B T"]
    """Patch of each byte, at most N; N also for padding."""
    read_of: Int[Tensor, "B T"]
    """The newest patch that is complete before s_{t+1}: what the decoder reads at position t.

    It is N, none, in a segment that starts past the budget.
    """
    lengths: Int[Tensor, "B N+1"]
    """Bytes in each patch; they sum to the row's bytes, including BOS but not padding."""
    overflow: Int[Tensor, " B"]
    """Boundaries that were removed because of the budget."""
    numbers: Int[Tensor, "B S"]
    """Patch of each byte and of the one still to come, if it starts no segment, at most N."""
    segment_starts: Int[Tensor, "B N"] | None
    """The first patch of each patch's segment; None if the row is one text."""

    @property
    def budget(self) -> int:
        """N, the number of patches that are pooled."""
        return self.lengths.shape[1] - 1


def to_bytes(ids: Integer[Tensor, "*batch"], vocab: ByteVocab) -> Int[Tensor, "*batch"]:
    """Byte values 0 to 255 of ids, `NO_BYTE` for an id that is not a byte."""
    values = as_ids(ids) - vocab.offset
    return torch.where((values >= 0) & (values < 256), values, NO_BYTE)


def inside_character(recent: Int[Tensor, "*batch 3"]) -> Bool[Tensor, "*batch"]:
    """Whether a text that ends in these bytes, oldest first, ends inside a UTF-8 character.

    It does if the end is the beginning of a valid character (Unicode 15, table 3-7): an overlong
    form, a surrogate or a stray continuation byte is not a character and never delays a boundary.
    """
    third, second, last = recent[..., 0], recent[..., 1], recent[..., 2]
    after_one = (last >= 0xC2) & (last <= 0xF4)
    after_two = (second >= 0xE0) & (second <= 0xF4) & _valid_second(second, last)
    after_three = (third >= 0xF0) & (third <= 0xF4) & _valid_second(third, second)
    return after_one | after_two | (after_three & is_continuation(last))


def histogram_entropy(recent: Int[Tensor, "*batch 7"]) -> Int[Tensor, "*batch"]:
    """Shannon entropy of the histograms of the last 3, 5 and 7 bytes, averaged, in 1 / `BIT` bits.

    `recent` holds the bytes that end there, oldest first; ids that are not bytes are not counted,
    so the windows of the first bytes are shorter.
    """
    shares = torch.tensor(SHARES, device=recent.device).flatten()
    total = torch.zeros_like(recent[..., 0])
    for window in WINDOWS:
        last = recent[..., -window:]
        real = last >= 0
        same = (last[..., :, None] == last[..., None, :]) & real[..., None, :]
        among = real.sum(dim=-1, keepdim=True).expand(last.shape)
        seen = same.sum(dim=-1).where(real, 0)
        total = total + shares[among * 8 + seen].sum(dim=-1)
    return total


def recent_bytes(
    ids: Integer[Tensor, "B T"],
    vocab: ByteVocab,
    count: int,
    segment_starts: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T n"]:
    """The `count` bytes that end at each position, oldest first, padded with `NO_BYTE`."""
    values, back = to_bytes(ids, vocab), range(count - 1, -1, -1)
    return torch.stack([shifted(values, n, NO_BYTE, segment_starts) for n in back], dim=-1)


def boundary_after(
    config: BLTConfig,
    recent: Int[Tensor, "*batch 3"],
    position: Int[Tensor, "*batch"],
    entropies: Float[Tensor, "*batch"] | None,
    summed: Int[Tensor, "*batch"] | None = None,
) -> Bool[Tensor, "*batch"]:
    """Whether a patch starts after a byte, by the patcher of `config`.

    `recent` holds the bytes that end there, oldest first, and `position` the index j ≥ 1 of the
    last of them in its segment of s. `entropies`, needed by the patcher `entropy` only, is that of
    the prediction after it, in nats; `summed`, needed by `histogram` only, is the sum of
    `histogram_entropy` since the patch began.
    """
    match config.patcher:
        case "entropy":
            if entropies is None:
                raise ValueError("entropies=None: the patcher 'entropy' needs them; pass them")
            boundary = entropies > config.threshold
        case "histogram":
            if summed is None:
                raise ValueError("summed=None: the patcher 'histogram' needs it; pass it")
            boundary = summed > math.floor(config.threshold * BIT)
        case "space":
            # As in the paper's code, BOS and other ids that are not bytes count as space-like, and
            # a patch ends after each of them.
            first = is_space_like(recent[..., 2]) & ~is_space_like(recent[..., 1])
            return first | (recent[..., 2] == NO_BYTE)
        case "word":
            # The end of a run of separators shows only in the byte after it, so the boundary
            # follows the first byte of the run.
            boundary = is_separator(recent[..., 2]) & ~is_separator(recent[..., 1])
        case "fixed":
            boundary = position % config.patch_size == 0
        case "byte":
            return torch.ones_like(position, dtype=torch.bool)
    return boundary & ~inside_character(recent) if config.whole_characters else boundary


def patch_starts(
    config: BLTConfig,
    ids: Integer[Tensor, "B T"],
    entropies: Float[Tensor, "B T"] | None = None,
    segment_starts: Int[Tensor, "B T"] | None = None,
) -> Bool[Tensor, "B S"]:
    """Whether a patch starts at s_j for each j from 0 to T, T being the byte still to come.

    `ids` is s; `entropies` as in `boundary_after`. At the start of a segment this is what the
    patcher would have decided had the previous segment continued, which may be read there;
    `plan_patches` then adds the patch that starts in any case.
    """
    recent = recent_bytes(ids, config.vocab, CONTEXT, segment_starts)
    position = torch.arange(ids.shape[1], device=ids.device)[None, :].expand(ids.shape)
    position = position if segment_starts is None else position - segment_starts
    summed = None
    if config.patcher == "histogram":
        values = histogram_entropy(recent_bytes(ids, config.vocab, WINDOWS[-1], segment_starts))
        limit = math.floor(config.threshold * BIT)
        summed = sums_since_start(
            values, held_back(config, ids, segment_starts), limit, segment_starts
        )
    after = boundary_after(config, recent, position, entropies, summed)
    after = (after | (position == 0)) & present(ids, config.vocab, segment_starts)
    return F.pad(after, (1, 0), value=True)


def held_back(
    config: BLTConfig, ids: Integer[Tensor, "B T"], segment_starts: Int[Tensor, "B T"] | None = None
) -> Bool[Tensor, "B T"]:
    """Whether no patch may start after each position because a character is unfinished there."""
    recent = recent_bytes(ids, config.vocab, CONTEXT, segment_starts)
    inside = inside_character(recent)
    return inside if config.whole_characters else torch.zeros_like(inside)


def sums_since_start(
    values: Int[Tensor, "B T"],
    held: Bool[Tensor, "B T"],
    limit: int,
    segment_starts: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T"]:
    """Running sum of `values` ≥ 0 that restarts after a position where it exceeded `limit`.

    Where `held`, it continues instead. The first position of a segment always starts and ends a
    sum. log₂ T rounds of gathers replace a loop over T: first how far a sum from each position
    reaches, by doubling, then which positions are starts, by following those jumps twice as far
    each time.
    """
    length = values.shape[1]
    index = torch.arange(length + 1, device=values.device)[None, :].expand(values.shape[0], -1)
    read = lambda x, at: x.gather(1, at.clamp(max=length))  # noqa: E731
    cap, powers = limit + 1, []
    sums = F.pad(values.clamp(max=cap), (0, 1), value=cap)
    for k in range(length.bit_length()):
        powers.append(sums)  # of 2^k positions from each on, saturated
        sums = (sums + read(sums, index + 2**k)).clamp(max=cap)
    total, end = torch.zeros_like(index), index
    for k in reversed(range(length.bit_length())):
        longer = total + read(powers[k], end)
        fits = longer <= limit
        total, end = longer.where(fits, total), torch.where(fits, end + 2**k, end)
    free = torch.where(F.pad(held, (0, 1)), length, index)
    free = free.flip(1).cummin(dim=1).values.flip(1)
    is_segment_start = index == 0
    if segment_starts is not None:
        is_segment_start = F.pad(segment_starts == index[:, :-1], (0, 1))
    jump = torch.where(is_segment_start, index + 1, (read(free, end) + 1).clamp(max=length))
    if segment_starts is not None:  # no sum reaches past the next segment's first position
        ahead = index.where(is_segment_start, length).flip(1).cummin(dim=1).values.flip(1)
        jump = jump.minimum(F.pad(ahead[:, 1:], (0, 1), value=length))
    starts = (is_segment_start | (index <= 1)).long()
    for _ in range(length.bit_length()):
        starts = starts.scatter_reduce(1, jump, starts, "amax")
        jump = read(jump, jump)
    upto = values.cumsum(dim=1)
    segment_start = torch.where(starts[:, :-1] > 0, index[:, :-1], 0).cummax(dim=1).values
    return upto - F.pad(upto, (1, 0))[:, :-1].gather(1, segment_start)


def present(
    ids: Integer[Tensor, "B T"], vocab: ByteVocab, segment_starts: Int[Tensor, "B T"] | None = None
) -> Bool[Tensor, "B T"]:
    """Whether each position comes before the first pad of the row, or of its segment."""
    pads = torch.cumsum(as_ids(ids) == vocab.pad_id, dim=1)
    return pads == (0 if segment_starts is None else pads.gather(1, segment_starts))


def shifted(
    ids: Integer[Tensor, "B T"],
    count: int,
    fill: int,
    segment_starts: Int[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B T"]:
    """`ids` shifted right by `count`; `fill` replaces what lies before `segment_starts`."""
    moved = F.pad(as_ids(ids), (count, 0), value=fill)[:, : ids.shape[1]]
    if segment_starts is None:
        return moved
    return moved.where(
        torch.arange(ids.shape[1], device=ids.device) - count >= segment_starts, fill
    )


def starts_from_lengths(lengths: Int[Tensor, "B N"], length: int) -> Bool[Tensor, "B {length}+1"]:
    """Starts from the lengths of patches that cover `length` bytes.

    A length of 0 after the last patch says that the byte still to come starts a patch.
    """
    segment_starts = torch.cumsum(lengths, dim=1) - lengths
    starts = lengths.new_zeros((lengths.shape[0], max(length, int(segment_starts.max())) + 1))
    return starts.scatter(1, segment_starts, 1)[:, : length + 1].bool()


def plan_patches(
    starts: Bool[Tensor, "B S"],
    counted: Bool[Tensor, "B T"],
    budget: int,
    segment_starts: Int[Tensor, "B T"] | None = None,
) -> PatchPlan:
    """The patches of a text from their starts; `counted` excludes padding.

    Starts at the first two positions of each segment are added where they are missing: without a
    complete patch before every prediction there would be nothing to read.
    """
    starts = starts | (torch.arange(starts.shape[1], device=starts.device) < 2)[None, :]
    after = starts[:, 1:]
    if segment_starts is not None:
        is_segment_start = (
            segment_starts
            == torch.arange(segment_starts.shape[1], device=segment_starts.device)[None, :]
        )
        after = after | is_segment_start
        starts = F.pad(after, (1, 0), value=True) | F.pad(is_segment_start, (0, 1))
    number = torch.cumsum(starts, dim=1) - 1
    capped = number.clamp(max=budget)
    lengths = number.new_zeros((starts.shape[0], budget + 1))
    lengths = lengths.scatter_add(1, capped[:, :-1], counted.to(lengths.dtype))
    patch_of = capped[:, :-1].where(counted, budget)
    lost = number[:, -1] - capped[:, -1]
    if segment_starts is None:
        return PatchPlan(patch_of, capped[:, 1:] - 1, lengths, lost, capped, None)
    first = capped.gather(1, segment_starts)
    newest = (number[:, :-1] + after).clamp(max=budget) - 1
    read_of = newest.where(first < budget, budget)
    firsts = torch.zeros_like(lengths).scatter_reduce(1, capped[:, :-1], first, "amax")
    return PatchPlan(patch_of, read_of, lengths, lost, capped, firsts[:, :budget])


def _valid_second(lead: Tensor, value: Tensor) -> Tensor:
    """Whether `value` may follow `lead`, the first byte of a character of three or four bytes."""
    least = torch.where(lead == 0xE0, 0xA0, torch.where(lead == 0xF0, 0x90, 0x80))
    most = torch.where(lead == 0xED, 0x9F, torch.where(lead == 0xF4, 0x8F, 0xBF))
    return (value >= least) & (value <= most)
