"""The shuffled order of rows: grain's without grain, so that both packages train on the same
batches, and one that visits every row where grain's leaves one out.

A block cipher permutes the numbers below 2^B and is applied until the result is small enough
(cycle walking; Black & Rogaway 2002). The cipher is Simon (Beaulieu et al. 2013) with four rounds,
whose keys come from C++'s `std::seed_seq`; nothing about it is secure. A cross-check holds it equal
to `grain.MapDataset.source(...).seed(seed).shuffle().repeat(None)`.
"""

import functools
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

_ROUNDS = 4
_WORD = 2**32
_DEPTH = 1
"""The number of datasets between `seed` and `shuffle`, which grain mixes into the seed."""


def skips_last_row(count: int) -> bool:
    """Whether grain's order of `count` rows leaves the last one out and draws another one twice.

    For a greatest index of 2^B its block has B bits, one too few, so another row stands in for row
    2^B. It rounds B up to an even number of at least 16, which cures the others.
    """
    bits = (count - 1).bit_length() - 1
    return bits >= 16 and bits % 2 == 0 and count - 1 == 1 << bits


def shuffled_index(position: int, count: int, seed: int, order: str = "exact") -> int:
    """Index of the row at `position` in an endless order of `count` rows, shuffled each epoch.

    `order` is "exact", which visits every row once an epoch, or "grain": see `skips_last_row`.
    """
    epoch, index = divmod(position, count)
    if count == 1:
        return 0
    keys = _round_keys((_shuffle_seed(seed) + epoch) % _WORD)
    bits = max(16, (count - 2 if order == "grain" else count - 1).bit_length())
    half = (bits + bits % 2) // 2
    if half > 8:  # so that the block holds at most four times as many numbers as there are rows
        index = _encrypt(index, half, keys)
        while index >= count:
            index = _encrypt(index, half, keys)
        return index
    walk = _smallest_block(keys)
    index = walk[index % len(walk)]
    while index >= count:
        index = walk[index]
    return index


@functools.lru_cache(maxsize=256)
def _smallest_block(keys: tuple[int, ...]) -> Sequence[int]:
    """The whole permutation of 16 bits, cached: with few rows the cycle walk is long."""
    return array("H", _encrypt(np.arange(2**16), 8, keys).astype(np.uint16).tobytes())


def _encrypt(value: Any, half: int, keys: tuple[int, ...]) -> Any:
    """Simon's Feistel network on two words of `half` bits each, for an integer or an array."""
    mask = (1 << half) - 1

    def rotate(word: Any, by: int) -> Any:
        return (word << by | word >> (half - by)) & mask

    left, right = value >> half & mask, value & mask
    for key in keys:
        mixed = rotate(right, 1) & rotate(right, 8) ^ rotate(right, 2)
        left, right = right, left ^ mixed ^ (key & mask)
    return left << half | right


@functools.cache
def _shuffle_seed(seed: int) -> int:
    return int(np.random.SeedSequence([seed, _DEPTH]).generate_state(1, np.uint32)[0])


@functools.lru_cache(maxsize=1024)
def _round_keys(seed: int) -> tuple[int, ...]:
    """`std::seed_seq{seed}.generate` of four words (C++ standard, [rand.util.seedseq])."""
    n, seeds = _ROUNDS, (seed,)
    words = [0x8B8B8B8B] * n
    near, far = 1, 2  # p and q of the standard for n = 4

    def scrambled(word: int, factor: int) -> int:
        word %= _WORD
        return factor * (word ^ word >> 27) % _WORD

    for k in range(n):
        mixed = words[k] ^ words[(k + near) % n] ^ words[(k - 1) % n]
        first = scrambled(mixed, 1664525)
        extra = len(seeds) if k == 0 else k + (seeds[k - 1] if k <= len(seeds) else 0)
        second = (first + extra) % _WORD
        words[(k + near) % n] = (words[(k + near) % n] + first) % _WORD
        words[(k + far) % n] = (words[(k + far) % n] + second) % _WORD
        words[k] = second
    for k in range(n):
        mixed = words[k] + words[(k + near) % n] + words[(k - 1) % n]
        first = scrambled(mixed, 1566083941)
        second = (first - k) % _WORD
        words[(k + near) % n] ^= first
        words[(k + far) % n] ^= second
        words[k] = second
    return tuple(words)
