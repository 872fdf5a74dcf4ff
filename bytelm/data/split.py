"""Held-out documents."""

from __future__ import annotations

import numpy as np

from bytelm.config import require
from bytelm.data.corpus import Corpus

FEWEST_DOCUMENTS = 50
"""A corpus of fewer is not split by content: one document would be too large a part of it."""


def split(
    corpus: Corpus, fraction: float, seed: int, rule: str = "content"
) -> tuple[Corpus, Corpus]:
    """(training, validation): split by document, about `fraction` of them in validation.

    `rule` is what decides a document's side, besides `seed`. "content" is its bytes, so that adding
    and removing documents moves no other, and equal documents are on one side. "rank" is its index,
    in runs begun before there was a choice.

    With fewer than 50 documents by content, and if one side would be empty, the last `fraction` of
    all bytes is validation instead, at least one byte on each side. With `fraction=0` validation is
    an empty corpus. Raises `ValueError` for a fraction outside [0, 1) and for a corpus too small to
    split.
    """
    require(0 <= fraction < 1, f"fraction={fraction}: must be at least 0 and below 1")
    require(rule in ("content", "rank"), f"rule={rule!r}: choose content or rank")
    if fraction == 0:
        return corpus, corpus.subset([])
    if rule == "rank" or corpus.documents >= FEWEST_DOCUMENTS:
        keys = corpus.digests() if rule == "content" else _ranks(corpus.documents)
        held_out = _mix(seed, keys) < np.uint64(int(fraction * 2**64))
        if held_out.any() and not held_out.all():
            return corpus.subset(np.flatnonzero(~held_out)), corpus.subset(np.flatnonzero(held_out))
    total = corpus.total_bytes
    require(total >= 2, f"fraction={fraction}: {total} bytes cannot be split; give more data")
    return corpus.cut(total - min(max(1, round(total * fraction)), total - 1))


_GOLDEN = 0x9E3779B97F4A7C15


def _ranks(count: int) -> np.ndarray:
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)


def _mix(seed: int, keys: np.ndarray) -> np.ndarray:
    """Hashes uint64 of (seed, key): SplitMix64 (Steele et al. 2014), seeded twice.

    Integer arithmetic, so the same on every machine and numpy version.
    """

    def scramble(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    # Scrambled first: otherwise seeds that differ by the golden constant share shifted hashes.
    origin = scramble(np.array([(seed + _GOLDEN) % 2**64], np.uint64))
    return scramble(origin + keys)
