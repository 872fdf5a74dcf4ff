"""Shuffled batches for training, read ahead by grain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from bytelm.config import require
from bytelm.data import Batch, Mixture, TrainingRows, Windows
from bytelm.data.batches import process_rows
from bytelm.data.shuffle import skips_last_row

_READ_THREADS = 4


_READY_BATCHES = 8


_COMPARED_ROWS = 16


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
    a mixture, each source has its own epochs: see `Mixture`. Nothing before `start_step` is read;
    threads read ahead. `order` is `DataConfig.order`. Raises `ValueError` immediately for a corpus
    without bytes and for sizes that do not fit.
    """
    rows = process_rows(windows, batch_size, process_index, process_count)
    ours = TrainingRows(windows, shuffle_seed, order)
    require(start_step >= 0, f"start_step={start_step}: must be at least 0")
    import grain  # here, since tokenizing and evaluation run on machines without it

    one = isinstance(windows, Windows) and not windows.is_masked
    if one and not (order == "exact" and skips_last_row(len(windows))):
        endless = grain.MapDataset.source(windows).seed(shuffle_seed).shuffle().repeat(None)
    else:
        endless = grain.MapDataset.source(ours)
    # Without drop_remainder grain rounds the endless length up to one that does not fit an int.
    parts = endless.batch(rows, drop_remainder=True)
    local_parts = parts[start_step * process_count + process_index :: process_count]
    options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READY_BATCHES)
    read = local_parts.to_iter_dataset(options)
    return (Batch(**each) if isinstance(each, dict) else Batch(each) for each in read)


def order_digest(windows: Windows | Mixture, shuffle_seed: int, order: str) -> str:
    """A digest of the first rows that a run trains on, in their order: of their ids and sources."""
    rows, digest = TrainingRows(windows, shuffle_seed, order), hashlib.sha256()
    for index in range(_COMPARED_ROWS if len(windows) else 0):
        for name, field in sorted(rows[index].items()):
            digest.update(name.encode() + field.tobytes())
    return digest.hexdigest()[:12]
