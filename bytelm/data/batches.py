"""Batches of windows: every one once and in order, and the endless order of training."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32

from bytelm.config import require, require_number
from bytelm.data.mixture import Mixture
from bytelm.data.shuffle import shuffled_index
from bytelm.data.windows import Windows

_SHUFFLE_LIMIT = 1 << 32  # grain permutes 32-bit indices and silently wraps larger ones


class Batch(NamedTuple):
    """Rows of ids and, in a mixture, the source of each: an index of its names.

    `counted` says which ids are; None where all but pads are.
    """

    ids: Int32[np.ndarray, "B T"]
    sources: Int32[np.ndarray, " B"] | None = None
    counted: Bool[np.ndarray, "B T"] | None = None

    def cut(self, length: int) -> Batch:
        """The same ids in rows of `length`, which divides that of these rows."""
        pieces = self.ids.shape[1] // length
        sources = None if self.sources is None else self.sources.repeat(pieces)
        counted = None if self.counted is None else self.counted.reshape(-1, length)
        return Batch(self.ids.reshape(-1, length), sources, counted)

    def rest(self) -> dict[str, Any]:
        """What there is beside `ids`, by name: keyword arguments of train steps."""
        return {k: v for k, v in self._asdict().items() if k != "ids" and v is not None}


def evaluation_batches(
    windows: Windows | Mixture,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every window once and in order, ids int32 [batch_size // process_count, length].

    The last batch is padded with rows of `pad_id`. `limit` takes at most that many windows, evenly
    spaced. Process p gets the p-th of the equal parts of each batch. Raises `ValueError`
    immediately for a corpus without bytes and for sizes that do not fit.
    """
    rows = process_rows(windows, batch_size, process_index, process_count)
    require(limit is None or limit >= 1, f"limit={limit}: must be at least 1")
    count = len(windows) if limit is None else min(limit, len(windows))

    def generate() -> Iterator[Batch]:
        for begin in range(process_index * rows, -(-count // batch_size) * batch_size, batch_size):
            batch = np.full((rows, windows.length), windows.vocab.pad_id, np.int32)
            counted = np.zeros(batch.shape, bool) if windows.is_masked else None
            for row, number in enumerate(range(begin, min(begin + rows, count))):
                index = number * len(windows) // count
                batch[row] = windows[index]
                if counted is not None:
                    counted[row] = windows.counted(index)
            yield Batch(batch, counted=counted)

    return generate()


class TrainingRows:
    """The endless order of the rows that a run trains on; a random-access sequence.

    Each source is shuffled by itself, anew in each of its epochs. `seed` and `order` are
    `DataConfig.shuffle_seed` and `.order`; a named source has a seed of its own. Raises
    `ValueError` for a seed that does not fit and for more than 2**32 windows.
    """

    def __init__(self, windows: Windows | Mixture, seed: int, order: str) -> None:
        require_number("shuffle_seed", seed)
        self._mixture = windows if isinstance(windows, Mixture) else None
        named = windows.sources if isinstance(windows, Mixture) else {"": windows}
        self._parts = [(part, _source_seed(seed, name)) for name, part in named.items()]
        self._order, self._masked = order, windows.is_masked
        fits = all(len(part) <= _SHUFFLE_LIMIT for part, _ in self._parts)
        require(fits, f"length={windows.length}: more than 2**32 windows; choose longer ones")

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """The row at a position, as fields of a `Batch`."""
        source, position = 0, operator.index(index)
        if self._mixture:
            source, position = self._mixture.locate(position)
        windows, seed = self._parts[source]
        number = shuffled_index(position, len(windows), seed, self._order)
        row: dict[str, np.ndarray] = {"ids": windows[number]}
        if self._mixture:
            row["sources"] = np.array(source, np.int32)
        if self._masked:
            row["counted"] = windows.counted(number)
        return row


def _source_seed(seed: int, name: str) -> int:
    """Sources of equally many windows would otherwise all be in the same order."""
    digest = blake2b(name.encode(), digest_size=4).digest() if name else b""
    return (seed + int.from_bytes(digest, "little")) % 2**32


def process_rows(
    windows: Windows | Mixture, batch_size: int, process_index: int, process_count: int
) -> int:
    """Rows of each batch that belong to one process."""
    require(len(windows) > 0, "corpus: holds no bytes; give data, or hold out less of it")
    known = 0 <= process_index < process_count
    require(known, f"process_index={process_index}: must be from 0 to {process_count - 1}")
    require(
        batch_size >= 1 and batch_size % process_count == 0,
        f"batch_size={batch_size}: must be a positive multiple of process_count={process_count}",
    )
    return batch_size // process_count
