"""Several named sources in fixed shares: to which source each row of an endless order belongs."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32

from bytelm.config import require
from bytelm.data.windows import Windows

BLOCK = 1 << 16
"""Rows after which the pattern of sources repeats: shares are exact to a row in so many."""


class Mixture:
    """The windows of named sources, each of which is drawn from in a fixed share of all rows.

    As a sequence it holds every window once, source after source. `locate` says what stands at a
    position of the endless order in which they are mixed: in every block of 65,536 rows each source
    has the rows of its share, rounded by largest remainders and at least one, spread evenly. So a
    position alone, without those before it, says which row of which source it is.

    Three sources at 3 : 2 : 1 give the pattern a b a c b a, were a block six rows long.
    """

    def __init__(
        self, sources: Mapping[str, Windows], weights: Mapping[str, float | int] | None = None
    ) -> None:
        """`weights` are numbers above 0 for each of the names; shares by bytes if it is None.

        Raises `ValueError` for a source without bytes and for windows that differ in length.
        """
        self.sources = dict(sources)
        first = next(iter(self.sources.values()))
        self.length, self.vocab, self.append_eos = first.length, first.vocab, first.append_eos
        for name, windows in self.sources.items():
            require(len(windows) > 0, f"{name}: holds no bytes; give data, or hold out less of it")
            same = windows.length == self.length
            require(same, f"{name}: windows of {windows.length}, others of {self.length}")
        self.is_masked = any(windows.is_masked for windows in self.sources.values())
        if weights is None:
            weights = {name: windows.corpus.total_bytes for name, windows in self.sources.items()}
        self._counts = _apportion([float(weights[name]) for name in self.sources])
        self._owners, self._ranks = _spread(self._counts)
        self._ends = np.cumsum([len(windows) for windows in self.sources.values()])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources, in the order of their indices."""
        return tuple(self.sources)

    @property
    def shares(self) -> dict[str, float]:
        """The part of all rows that each source has."""
        return {name: n / BLOCK for name, n in zip(self.sources, self._counts, strict=True)}

    def locate(self, position: int) -> tuple[int, int]:
        """(index of the source, position in that source's own endless order) of a row."""
        block, row = divmod(position, BLOCK)
        source = int(self._owners[row])
        return source, block * self._counts[source] + int(self._ranks[row])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: SupportsIndex) -> Int32[np.ndarray, " T"]:
        """Window `index`, int32 [length], of all sources joined."""
        number, count = operator.index(index), len(self)
        if not -count <= number < count:
            raise IndexError(f"window {number} of {count}")
        source, number = self._find(number % count)
        return source[number]

    def counted(self, index: int) -> Bool[np.ndarray, " T"]:
        """Which ids of window `index` are counted, bool [length]."""
        source, number = self._find(index)
        return source.counted(number)

    def _find(self, number: int) -> tuple[Windows, int]:
        source = int(np.searchsorted(self._ends, number, side="right"))
        before = int(self._ends[source - 1]) if source else 0
        return tuple(self.sources.values())[source], number - before


def _apportion(weights: list[float]) -> list[int]:
    """How many of a block's rows each has: largest remainders, but at least one."""
    require(len(weights) <= BLOCK, f"data.paths: {len(weights)} sources; at most {BLOCK}")
    total = math.fsum(weights)
    quotas = [weight / total * BLOCK for weight in weights]
    counts = [max(1, math.floor(quota)) for quota in quotas]
    while sum(counts) < BLOCK:
        counts[_largest([q - n for q, n in zip(quotas, counts, strict=True)])] += 1
    while sum(counts) > BLOCK:
        counts[_largest(counts)] -= 1
    return counts


def _largest(values: Sequence[Any]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _spread(counts: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each row of a block, and the number of that source's rows before it."""
    owners = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    ranks = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    # Row j of n stands at (j + 1/2) / n of the block; a stable sort gives ties to earlier sources.
    order = np.argsort((ranks + 0.5) / np.repeat(counts, counts), kind="stable")
    return owners[order], ranks[order]
