"""Exact bits per byte: the code length of every byte, each counted once."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor

from bytelm_torch.layers.ids import as_ids
from bytelm_torch.training import parallel
from bytelm_torch.training.loss import bits_per_byte, token_nats


class Evaluation(NamedTuple):
    """Summed nats and how many ids they cover (bytes, and end-of-document ids where asked)."""

    nats: float
    count: int

    @property
    def bits_per_byte(self) -> float:
        """Mean code length in bits."""
        return bits_per_byte(self.nats, self.count)


RowNats = Callable[[Integer[Tensor, "B T"]], Float[Tensor, " B"]]


def make_row_nats(
    model: Any, pad_id: int, dtype: torch.dtype, end_id: int | None = None
) -> RowNats:
    """The function from ids to the summed nats of each row, pads left out; dropout is off.

    `end_id` is left out, too: the ends of documents, where the model reads them and bytes count.
    """

    def row_nats(ids: Integer[Tensor, "B T"]) -> Float[Tensor, " B"]:
        ids = as_ids(ids)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), parallel.autocast(ids.device, dtype):
                nats = token_nats(model(ids), ids)
        finally:
            model.train(was_training)
        left_out = ids == pad_id if end_id is None else (ids == pad_id) | (ids == end_id)
        return nats.masked_fill(left_out, 0.0).sum(dim=1)

    return row_nats


def evaluate(
    row_nats: RowNats,
    batches: Iterable[np.ndarray],
    pad_id: int,
    group: parallel.Group,
    end_id: int | None = None,
) -> Evaluation:
    """Sums over this process's `batches` of ids int[B, T] and over all processes.

    Pads are left out, and `end_id` as in `make_row_nats`. Rows are added exactly (`math.fsum`), so
    neither their order nor the number of processes counts.
    """
    nats: list[float] = []
    count = 0
    for ids in batches:
        count += int(((ids != pad_id) & (ids != (pad_id if end_id is None else end_id))).sum())
        nats.extend(row_nats(torch.from_numpy(ids).to(group.device)).tolist())
    gathered: list[Any] = [(nats, count)]
    if group.size > 1:
        gathered = [None] * group.size
        dist.all_gather_object(gathered, (nats, count))
    total = math.fsum(each for part, _ in gathered for each in part)
    return Evaluation(total, sum(number for _, number in gathered))
