"""Shuffled batches for training, read ahead by grain."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32

from bytelm.config import require, require_number
from bytelm.data.shuffle import shuffled_index, skips_last_row
from bytelm.data.windows import SHUFFLE_LIMIT, Windows, process_rows

_READ_THREADS = 4


_READY_BATCHES = 8


class _Shuffled:
    """The endless exact order of windows, where grain's leaves one out."""

    def __init__(self, windows: Windows, seed: int) -> None:
        self._windows, self._seed = windows, seed

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Int32[np.ndarray, " T"]:
        count = len(self._windows)
        return self._windows[shuffled_index(operator.index(index), count, self._seed)]


def training_batches(
    windows: Windows,
    batch_size: int,
    shuffle_seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
    order: str = "exact",
) -> Iterator[Int32[np.ndarray, "B T"]]:
    """Endless shuffled batches from `start_step` on, int32 [batch_size // process_count, length].

    The batch of step s is rows s * batch_size to (s + 1) * batch_size of an endless order in which
    every epoch visits each window once, reshuffled; process p gets the p-th of its equal parts.
    Nothing before `start_step` is read; threads read ahead. `order` is `DataConfig.order`. Raises
    `ValueError` immediately for a corpus without bytes and for sizes that do not fit.
    """
    rows = process_rows(windows, batch_size, process_index, process_count)
    require_number("shuffle_seed", shuffle_seed)
    require(start_step >= 0, f"start_step={start_step}: must be at least 0")
    fits = len(windows) <= SHUFFLE_LIMIT
    require(fits, f"length={windows.length}: more than 2**32 windows; choose longer ones")
    import grain  # here, since tokenizing and evaluation run on machines without it

    if order == "exact" and skips_last_row(len(windows)):
        endless = grain.MapDataset.source(_Shuffled(windows, shuffle_seed))
    else:
        endless = grain.MapDataset.source(windows).seed(shuffle_seed).shuffle().repeat(None)
    # Without drop_remainder grain rounds the endless length up to one that does not fit an int.
    parts = endless.batch(rows, drop_remainder=True)
    local_parts = parts[start_step * process_count + process_index :: process_count]
    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READY_BATCHES)
    return iter(local_parts.to_iter_dataset(options))
