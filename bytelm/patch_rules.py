"""What both packages know of patches: how far a patcher looks back, entropies as integers, bytes.

A byte may be an array or a tensor of bytes: what is asked of it needs operators alone.
"""

import math
from typing import Any

from bytelm.config import BLTConfig

NO_BYTE = -1
"""Stands for an id that is not a byte, and for positions before the first byte."""

CONTEXT = 3
"""Number of bytes a patcher looks back: a UTF-8 character is unfinished for three at most."""

WINDOWS = (3, 5, 7)
"""Numbers of bytes in the windows whose histograms `histogram_entropy` reads."""

BIT = 2**22
"""Histogram entropies are integers, this many per bit: their sums are exact in any order."""

SHARES = [
    [round(math.log2(n / c) / n / len(WINDOWS) * BIT) if 0 < c <= n else 0 for c in range(8)]
    for n in range(8)
]
"""What a byte that occurs c times among n adds to the mean entropy of the windows."""

MOST = BIT * math.log2(WINDOWS[-1])
"""The entropy of seven different bytes; entropies are divided by it."""


def look_back(config: BLTConfig) -> int:
    """The number of ids up to and including a byte that patcher and hashes need."""
    windows = WINDOWS if config.reads_histograms else ()
    return max((CONTEXT, *windows, *config.ngram_sizes))


def is_space_like(byte: Any) -> Any:
    """Whether a byte is neither a Latin letter, a digit nor a UTF-8 continuation byte."""
    lower = byte | 0x20
    letter = (lower >= ord("a")) & (lower <= ord("z"))
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    return ~letter & ~digit & ~is_continuation(byte)


def is_separator(byte: Any) -> Any:
    """Whether a byte is neither a letter, a digit nor part of a non-ASCII character."""
    return is_space_like(byte) & (byte >= 0) & (byte < 0x80)


def is_continuation(byte: Any) -> Any:
    """Whether a byte continues a UTF-8 character."""
    return (byte >= 0x80) & (byte <= 0xBF)
