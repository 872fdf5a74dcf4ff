"""Shuffled batches for training, in grain's order and read ahead by torch's loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32
from torch.utils.data import DataLoader

from bytelm.config import require, require_number
from bytelm.data.shuffle import shuffled_index
from bytelm.data.windows import SHUFFLE_LIMIT, Windows, process_rows


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
    Nothing before `start_step` is read. `order` is `DataConfig.order`; either is that of
    `bytelm_jax`. Raises `ValueError` immediately for a corpus without bytes and for sizes that do
    not fit.
    """
    rows = process_rows(windows, batch_size, process_index, process_count)
    require_number("shuffle_seed", shuffle_seed)
    require(start_step >= 0, f"start_step={start_step}: must be at least 0")
    fits = len(windows) <= SHUFFLE_LIMIT
    require(fits, f"length={windows.length}: more than 2**32 windows; choose longer ones")

    def indices() -> Iterator[list[int]]:
        for step in itertools.count(start_step):
            begin = step * batch_size + process_index * rows
            yield [
                shuffled_index(position, len(windows), shuffle_seed, order)
                for position in range(begin, begin + rows)
            ]

    return iter(DataLoader(windows, batch_sampler=indices(), collate_fn=np.stack))  # pyright: ignore
