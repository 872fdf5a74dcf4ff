"""Shuffled batches for training, in grain's order and read ahead by torch's loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader

from bytelm.config import require
from bytelm.data import Batch, Mixture, TrainingRows, Windows
from bytelm.data.batches import process_rows


def training_batches(
    windows: Windows | Mixture,
    batch_size: int,
    shuffle_seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
    order: str = "exact",
) -> Iterator[Batch]:
    """Endless shuffled batches from `start_step` on, of batch_size // process_count rows each.

    The batch of step s is rows s * batch_size to (s + 1) * batch_size of an endless order in which
    every epoch visits each window once, reshuffled; process p gets the p-th of its equal parts. Of
    a mixture, each source has its own epochs: see `Mixture`. Nothing before `start_step` is read.
    `order` is `DataConfig.order`; either is that of `bytelm_jax`. Raises `ValueError` immediately
    for a corpus without bytes and for sizes that do not fit.
    """
    rows = process_rows(windows, batch_size, process_index, process_count)
    endless = TrainingRows(windows, shuffle_seed, order)
    require(start_step >= 0, f"start_step={start_step}: must be at least 0")

    def positions() -> Iterator[range]:
        for step in itertools.count(start_step):
            begin = step * batch_size + process_index * rows
            yield range(begin, begin + rows)

    return iter(DataLoader(endless, batch_sampler=positions(), collate_fn=_stack))  # pyright: ignore


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})
