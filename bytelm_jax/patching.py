"""Patch boundaries: pure functions of static shape, in a whole-text form and one byte at a time.

Axes: B batch, T bytes, S = T + 1 bytes and the one still to come, N patches. All work on
s = [BOS, ids[:, :-1]], the model's shifted input. Whether a patch starts at s_j is decided from
s_<j alone: the decoder reads it before it predicts s_j, so a patcher that looked at s_j would leak
it. Patches start at 0, at 1, and at j ≥ 2 where `boundary_after`, given what ends at s_{j−1}, says
so. Both forms call that one function.

A row ends at its first pad: nothing from there on is counted, and no patch starts behind it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bytelm_jax.config import BLTConfig, ByteVocab

NO_BYTE = -1
"""Stands for an id that is no byte, and for what lies before the first one."""

CONTEXT = 3
"""Bytes that a patcher looks back on: a UTF-8 character is unfinished for three at most."""


class PatchPlan(NamedTuple):
    """Which byte belongs to which patch, for a budget of N patches.

    Patches past the budget merge into one open last patch, number N, which is neither pooled nor
    read, since it never ends.
    """

    patch_of: Int[Array, "B T"]
    """Patch of each byte, at most N; N also for padding."""
    read_of: Int[Array, "B T"]
    """The newest patch that is complete before s_{t+1}: what the decoder reads at position t."""
    lengths: Int[Array, "B N+1"]
    """Bytes of each patch; they sum to the row's bytes, BOS included and padding not."""
    overflow: Int[Array, " B"]
    """Boundaries that the budget made disappear."""


def to_bytes(ids: Int[Array, "*batch"], vocab: ByteVocab) -> Int[Array, "*batch"]:
    """Byte values 0 to 255 of ids, `NO_BYTE` for an id that stands for none."""
    values = ids - vocab.offset
    return jnp.where((values >= 0) & (values < 256), values, NO_BYTE)


def inside_character(recent: Int[Array, "*batch 3"]) -> Bool[Array, "*batch"]:
    """Whether a text that ends in these bytes, oldest first, ends inside a UTF-8 character.

    So it does when the end is the beginning of a valid character (Unicode 15, table 3-7): an
    overlong form, a surrogate or a stray continuation byte is no character and holds nothing up.
    """
    third, second, last = recent[..., 0], recent[..., 1], recent[..., 2]
    after_one = (last >= 0xC2) & (last <= 0xF4)
    after_two = (second >= 0xE0) & (second <= 0xF4) & _valid_second(second, last)
    after_three = (third >= 0xF0) & (third <= 0xF4) & _valid_second(third, second)
    return after_one | after_two | (after_three & _continues(last))


def boundary_after(
    config: BLTConfig,
    recent: Int[Array, "*batch 3"],
    position: Int[Array, "*batch"],
    entropies: Float[Array, "*batch"] | None,
) -> Bool[Array, "*batch"]:
    """Whether a patch starts behind a byte, by the patcher of `config`.

    `recent` holds the bytes that end there, oldest first, `position` the index j ≥ 1 of the last of
    them in s, and `entropies`, which only the patcher `entropy` needs, that of the prediction after
    it, in nats.
    """
    match config.patcher:
        case "entropy":
            if entropies is None:
                raise ValueError("entropies=None: the patcher 'entropy' needs them; pass them")
            boundary = entropies > config.threshold
        case "space":
            # A run's end shows only in the byte behind it, so its first byte draws the boundary.
            boundary = _separates(recent[..., 2]) & ~_separates(recent[..., 1])
        case "fixed":
            boundary = position % config.patch_size == 0
        case "byte":
            return jnp.ones_like(position, dtype=bool)
    return boundary & ~inside_character(recent) if config.whole_characters else boundary


def patch_starts(
    config: BLTConfig, ids: Int[Array, "B T"], entropies: Float[Array, "B T"] | None = None
) -> Bool[Array, "B S"]:
    """Whether a patch starts at s_j for each j from 0 to T, T being the byte still to come.

    `ids` is s; `entropies` as in `boundary_after`.
    """
    values = to_bytes(ids, config.vocab)
    recent = jnp.stack([shifted(values, n, NO_BYTE) for n in range(CONTEXT - 1, -1, -1)], axis=-1)
    position = jnp.broadcast_to(jnp.arange(ids.shape[1])[None, :], ids.shape)
    after = boundary_after(config, recent, position, entropies)
    after = (after | (position == 0)) & present(ids, config.vocab)
    return jnp.concatenate([jnp.ones_like(after[:, :1]), after], axis=1)


def present(ids: Int[Array, "B T"], vocab: ByteVocab) -> Bool[Array, "B T"]:
    """Whether each position comes before the row's first pad."""
    return jnp.cumsum(ids == vocab.pad_id, axis=1) == 0


def shifted(ids: Int[Array, "B T"], count: int, fill: int) -> Int[Array, "B T"]:
    """`ids` moved right by `count`; `fill` comes in."""
    return jnp.pad(ids, ((0, 0), (count, 0)), constant_values=fill)[:, : ids.shape[1]]


def starts_from_lengths(lengths: Int[Array, "B N"], length: int) -> Bool[Array, "B {length}+1"]:
    """Starts from the lengths of patches that cover `length` bytes.

    A length of 0 behind the last patch says that the byte still to come starts a patch.
    """
    begins = jnp.cumsum(lengths, axis=1) - lengths
    rows = jnp.arange(lengths.shape[0])[:, None]
    empty = jnp.zeros((lengths.shape[0], length + 1), bool)
    return empty.at[rows, begins].set(True, mode="drop")


def plan_patches(starts: Bool[Array, "B S"], counted: Bool[Array, "B T"], budget: int) -> PatchPlan:
    """Patches of a text from its starts; `counted` leaves out the padding.

    Starts at 0 and 1 are added where they are missing: without a complete patch before every
    prediction there would be nothing to read.
    """
    starts = starts | (jnp.arange(starts.shape[1]) < 2)[None, :]
    number = jnp.cumsum(starts.astype(jnp.int32), axis=1) - 1
    capped = jnp.minimum(number, budget)
    rows = jnp.arange(starts.shape[0])[:, None]
    empty = jnp.zeros((starts.shape[0], budget + 1), jnp.int32)
    lengths = empty.at[rows, capped[:, :-1]].add(counted.astype(jnp.int32))
    patch_of = jnp.where(counted, capped[:, :-1], budget)
    return PatchPlan(patch_of, capped[:, 1:] - 1, lengths, number[:, -1] - capped[:, -1])


def _separates(value: Array) -> Array:
    """Whether a byte is neither letter, digit nor part of a character beyond ASCII."""
    lower = value | 0x20
    letter = (lower >= ord("a")) & (lower <= ord("z"))
    digit = (value >= ord("0")) & (value <= ord("9"))
    return (value >= 0) & (value < 0x80) & ~letter & ~digit


def _continues(value: Array) -> Array:
    return (value >= 0x80) & (value <= 0xBF)


def _valid_second(lead: Array, value: Array) -> Array:
    """Whether `value` may follow `lead`, the first byte of a character of three or four bytes."""
    least = jnp.where(lead == 0xE0, 0xA0, jnp.where(lead == 0xF0, 0x90, 0x80))
    most = jnp.where(lead == 0xED, 0x9F, jnp.where(lead == 0xF4, 0x8F, 0xBF))
    return (value >= least) & (value <= most)
