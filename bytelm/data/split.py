"""Held-out documents."""

from __future__ import annotations

import numpy as np

from bytelm.config import require
from bytelm.data.corpus import Corpus


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """(training, validation): split by document, about `fraction` of them in validation.

    A document's side depends on `seed` and its index alone. If one side would be empty, as with a
    single document, the last `fraction` of all bytes is validation instead, at least one byte on
    each side. With `fraction=0` validation is an empty corpus. Raises `ValueError` for a fraction
    outside [0, 1) and for a corpus too small to split.
    """
    require(0 <= fraction < 1, f"fraction={fraction}: must be at least 0 and below 1")
    if fraction == 0:
        return corpus, corpus.subset([])
    held_out = _mix(seed, corpus.documents) < np.uint64(int(fraction * 2**64))
    if held_out.any() and not held_out.all():
        return corpus.subset(np.flatnonzero(~held_out)), corpus.subset(np.flatnonzero(held_out))
    total = corpus.total_bytes
    require(total >= 2, f"fraction={fraction}: {total} bytes cannot be split; give more data")
    return corpus.cut(total - min(max(1, round(total * fraction)), total - 1))


def _mix(seed: int, count: int) -> np.ndarray:
    """Hashes uint64 [count] of (seed, index): SplitMix64 (Steele et al. 2014), seeded twice.

    Integer arithmetic, so the same on every machine and numpy version.
    """
    golden = 0x9E3779B97F4A7C15

    def scramble(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    # Scrambled first: otherwise seeds that differ by the golden constant share shifted hashes.
    origin = scramble(np.array([(seed + golden) % 2**64], np.uint64))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(golden)
    return scramble(origin + steps)
