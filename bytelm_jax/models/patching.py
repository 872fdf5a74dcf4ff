"""Patch boundaries: pure functions of static shape, for whole texts and for one byte at a time.

Axes: B batch, T bytes, S = T + 1 bytes and the one still to come, N patches. All work on s = [BOS,
ids[:, :-1]], the model's shifted input. Whether a patch starts at s_j is decided from s_<j alone:
the decoder reads it before it predicts s_j, so a patcher that looked at s_j would leak it. Patches
start at 0, at 1, and at j ≥ 2 where `boundary_after`, given what ends at s_{j−1}, says so. Both
forms call that one function.

A row ends at its first pad: nothing from there on is counted, and no patch starts after it.

For a model that resets, `segment_starts` [B, T] holds the first position of each position's
segment, at which s holds BOS. All rules then apply within a segment as if it were a text alone.
That a segment starts is known only from the byte before it, a target: nothing but the segment
itself may read it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

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
from bytelm_jax.layers.ids import as_ids


class PatchPlan(NamedTuple):
    """Which byte belongs to which patch, for a budget of N patches.

    Patches past the budget merge into one open last patch, number N, which is neither pooled nor
    read, since it never ends.
    """

    patch_of: Int[Array, "B T"]
    """Patch of each byte, at most N; N also for padding."""
    read_of: Int[Array, "B T"]
    """The newest patch that is complete before s_{t+1}: what the decoder reads at position t.

    It is N, none, in a segment that starts past the budget.
    """
    lengths: Int[Array, "B N+1"]
    """Bytes in each patch; they sum to the row's bytes, including BOS but not padding."""
    overflow: Int[Array, " B"]
    """Boundaries that were removed because of the budget."""
    numbers: Int[Array, "B S"]
    """Patch of each byte and of the one still to come, if it starts no segment, at most N."""
    segment_starts: Int[Array, "B N"] | None
    """The first patch of each patch's segment; None if the row is one text."""

    @property
    def budget(self) -> int:
        """N, the number of patches that are pooled."""
        return self.lengths.shape[1] - 1


def to_bytes(ids: Integer[Array | np.ndarray, "*batch"], vocab: ByteVocab) -> Int[Array, "*batch"]:
    """Byte values 0 to 255 of ids, `NO_BYTE` for an id that is not a byte."""
    values = as_ids(ids) - vocab.offset
    return jnp.where((values >= 0) & (values < 256), values, NO_BYTE)


def inside_character(recent: Int[Array, "*batch 3"]) -> Bool[Array, "*batch"]:
    """Whether a text that ends in these bytes, oldest first, ends inside a UTF-8 character.

    It does if the end is the beginning of a valid character (Unicode 15, table 3-7): an overlong
    form, a surrogate or a stray continuation byte is not a character and never delays a boundary.
    """
    third, second, last = recent[..., 0], recent[..., 1], recent[..., 2]
    after_one = (last >= 0xC2) & (last <= 0xF4)
    after_two = (second >= 0xE0) & (second <= 0xF4) & _valid_second(second, last)
    after_three = (third >= 0xF0) & (third <= 0xF4) & _valid_second(third, second)
    return after_one | after_two | (after_three & is_continuation(last))


def histogram_entropy(recent: Int[Array, "*batch 7"]) -> Int[Array, "*batch"]:
    """Shannon entropy of the histograms of the last 3, 5 and 7 bytes, averaged, in 1 / `BIT` bits.

    `recent` holds the bytes that end there, oldest first; ids that are not bytes are not counted,
    so the windows of the first bytes are shorter.
    """
    shares, total = jnp.asarray(SHARES, jnp.int32).reshape(-1), 0
    for window in WINDOWS:
        last = recent[..., -window:]
        real = last >= 0
        same = (last[..., :, None] == last[..., None, :]) & real[..., None, :]
        among = jnp.broadcast_to(real.sum(axis=-1, keepdims=True), last.shape)
        seen = jnp.where(real, same.sum(axis=-1), 0)
        total = total + shares[among * 8 + seen].sum(axis=-1)
    return jnp.asarray(total, jnp.int32)


def recent_bytes(
    ids: Integer[Array | np.ndarray, "B T"],
    vocab: ByteVocab,
    count: int,
    segment_starts: Int[Array, "B T"] | None = None,
) -> Int[Array, "B T n"]:
    """The `count` bytes that end at each position, oldest first, padded with `NO_BYTE`."""
    values, back = to_bytes(ids, vocab), range(count - 1, -1, -1)
    return jnp.stack([shifted(values, n, NO_BYTE, segment_starts) for n in back], axis=-1)


def boundary_after(
    config: BLTConfig,
    recent: Int[Array, "*batch 3"],
    position: Int[Array, "*batch"],
    entropies: Float[Array, "*batch"] | None,
    summed: Int[Array, "*batch"] | None = None,
) -> Bool[Array, "*batch"]:
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
            return jnp.ones_like(position, dtype=bool)
    return boundary & ~inside_character(recent) if config.whole_characters else boundary


def patch_starts(
    config: BLTConfig,
    ids: Integer[Array | np.ndarray, "B T"],
    entropies: Float[Array, "B T"] | None = None,
    segment_starts: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B S"]:
    """Whether a patch starts at s_j for each j from 0 to T, T being the byte still to come.

    `ids` is s; `entropies` as in `boundary_after`. At the start of a segment this is what the
    patcher would have decided had the previous segment continued, which may be read there;
    `plan_patches` then adds the patch that starts in any case.
    """
    recent = recent_bytes(ids, config.vocab, CONTEXT, segment_starts)
    position = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :], ids.shape)
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
    return jnp.concatenate([jnp.ones_like(after[:, :1]), after], axis=1)


def held_back(
    config: BLTConfig,
    ids: Integer[Array | np.ndarray, "B T"],
    segment_starts: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """Whether no patch may start after each position because a character is unfinished there."""
    recent = recent_bytes(ids, config.vocab, CONTEXT, segment_starts)
    inside = inside_character(recent)
    return inside if config.whole_characters else jnp.zeros_like(inside)


def sums_since_start(
    values: Int[Array, "B T"],
    held: Bool[Array, "B T"],
    limit: int | Int[Array, ""],
    segment_starts: Int[Array, "B T"] | None = None,
) -> Int[Array, "B T"]:
    """Running sum of `values` ≥ 0 that restarts after a position where it exceeded `limit`.

    Where `held`, it continues instead. The first position of a segment always starts and ends a
    sum. log₂ T rounds of gathers replace a loop over T: first how far a sum from each position
    reaches, by doubling, then which positions are starts, by following those jumps twice as far
    each time.
    """
    length = values.shape[1]
    index = jnp.broadcast_to(jnp.arange(length + 1)[None, :], (values.shape[0], length + 1))
    read = lambda x, at: jnp.take_along_axis(x, jnp.minimum(at, length), axis=1)  # noqa: E731
    cap, powers = limit + 1, []
    sums = jnp.pad(jnp.minimum(values, cap), ((0, 0), (0, 1)), constant_values=cap)
    for k in range(length.bit_length()):
        powers.append(sums)  # of 2^k positions from each on, saturated
        sums = jnp.minimum(sums + read(sums, index + 2**k), cap)
    total, end = jnp.zeros_like(index), index
    for k in reversed(range(length.bit_length())):
        longer = total + read(powers[k], end)
        fits = longer <= limit
        total, end = jnp.where(fits, longer, total), jnp.where(fits, end + 2**k, end)
    free = jnp.where(jnp.pad(held, ((0, 0), (0, 1))), length, index)
    free = jax.lax.cummin(free, axis=1, reverse=True)
    is_segment_start = index == 0
    if segment_starts is not None:
        is_segment_start = jnp.pad(segment_starts == index[:, :-1], ((0, 0), (0, 1)))
    jump = jnp.where(is_segment_start, index + 1, jnp.minimum(read(free, end) + 1, length))
    if segment_starts is not None:  # no sum reaches past the next segment's first position
        ahead = jax.lax.cummin(jnp.where(is_segment_start, index, length), axis=1, reverse=True)
        jump = jnp.minimum(jump, jnp.pad(ahead[:, 1:], ((0, 0), (0, 1)), constant_values=length))
    rows = jnp.arange(values.shape[0])[:, None]
    starts = is_segment_start | (index <= 1)
    for _ in range(length.bit_length()):
        starts = starts | jnp.zeros_like(starts).at[rows, jump].max(starts)
        jump = read(jump, jump)
    upto = jnp.cumsum(values, axis=1)  # may wrap: differences are still right
    segment_start = jax.lax.cummax(jnp.where(starts[:, :-1], index[:, :-1], 0), axis=1)
    before = jnp.pad(upto, ((0, 0), (1, 0)))[:, :-1]
    return upto - jnp.take_along_axis(before, segment_start, axis=1)


def present(
    ids: Integer[Array | np.ndarray, "B T"],
    vocab: ByteVocab,
    segment_starts: Int[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """Whether each position comes before the first pad of the row, or of its segment."""
    pads = jnp.cumsum(as_ids(ids) == vocab.pad_id, axis=1)
    return pads == (
        0 if segment_starts is None else jnp.take_along_axis(pads, segment_starts, axis=1)
    )


def shifted(
    ids: Integer[Array | np.ndarray, "B T"],
    count: int,
    fill: int,
    segment_starts: Int[Array, "B T"] | None = None,
) -> Int[Array, "B T"]:
    """`ids` shifted right by `count`; `fill` replaces what lies before `segment_starts`."""
    moved = jnp.pad(as_ids(ids), ((0, 0), (count, 0)), constant_values=fill)[:, : ids.shape[1]]
    if segment_starts is None:
        return moved
    return jnp.where(jnp.arange(ids.shape[1])[None, :] - count >= segment_starts, moved, fill)


def starts_from_lengths(lengths: Int[Array, "B N"], length: int) -> Bool[Array, "B {length}+1"]:
    """Starts from the lengths of patches that cover `length` bytes.

    A length of 0 after the last patch says that the byte still to come starts a patch.
    """
    segment_starts = jnp.cumsum(lengths, axis=1) - lengths
    rows = jnp.arange(lengths.shape[0])[:, None]
    empty = jnp.zeros((lengths.shape[0], length + 1), bool)
    return empty.at[rows, segment_starts].set(True, mode="drop")


def plan_patches(
    starts: Bool[Array, "B S"],
    counted: Bool[Array, "B T"],
    budget: int,
    segment_starts: Int[Array, "B T"] | None = None,
) -> PatchPlan:
    """The patches of a text from their starts; `counted` excludes padding.

    Starts at the first two positions of each segment are added where they are missing: without a
    complete patch before every prediction there would be nothing to read.
    """
    starts = starts | (jnp.arange(starts.shape[1]) < 2)[None, :]
    after = starts[:, 1:]
    if segment_starts is not None:
        is_segment_start = segment_starts == jnp.arange(segment_starts.shape[1])[None, :]
        after = after | is_segment_start
        starts = jnp.pad(after, ((0, 0), (1, 0)), constant_values=True)
        starts = starts | jnp.pad(is_segment_start, ((0, 0), (0, 1)))
    number = jnp.cumsum(starts.astype(jnp.int32), axis=1) - 1
    capped = jnp.minimum(number, budget)
    rows = jnp.arange(starts.shape[0])[:, None]
    empty = jnp.zeros((starts.shape[0], budget + 1), jnp.int32)
    lengths = empty.at[rows, capped[:, :-1]].add(counted.astype(jnp.int32))
    patch_of = jnp.where(counted, capped[:, :-1], budget)
    lost = number[:, -1] - capped[:, -1]
    if segment_starts is None:
        return PatchPlan(patch_of, capped[:, 1:] - 1, lengths, lost, capped, None)
    first = jnp.take_along_axis(capped, segment_starts, axis=1)
    newest = jnp.minimum(number[:, :-1] + after, budget) - 1
    read_of = jnp.where(first < budget, newest, budget)
    firsts = empty.at[rows, capped[:, :-1]].max(first)[:, :budget]
    return PatchPlan(patch_of, read_of, lengths, lost, capped, firsts)


def _valid_second(lead: Array, value: Array) -> Array:
    """Whether `value` may follow `lead`, the first byte of a character of three or four bytes."""
    least = jnp.where(lead == 0xE0, 0xA0, jnp.where(lead == 0xF0, 0x90, 0x80))
    most = jnp.where(lead == 0xED, 0x9F, jnp.where(lead == 0xF4, 0x8F, 0xBF))
    return (value >= least) & (value <= most)
