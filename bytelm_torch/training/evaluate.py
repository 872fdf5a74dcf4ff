"""Exact bits per byte: the code length of every byte, each counted once."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from bytelm.config import default_length
from bytelm.config.lfbyte import require_prediction
from bytelm.data import Batch, Corpus, evaluation_batches, scored_windows
from bytelm.metrics import Evaluation
from bytelm_torch.layers.ids import as_ids
from bytelm_torch.models.interface import inference
from bytelm_torch.training import parallel
from bytelm_torch.training.loss import counted_ids, token_nats


def evaluate(
    model: Any,
    data: bytes | Sequence[bytes] | Corpus,
    length: int | None = None,
    batch_size: int = 16,
    stride: int = 0,
) -> Evaluation:
    """The exact code length of `data` under `model`: every byte counted once, dropout off.

    `data` is a document, several, or a corpus (`bytelm.data.open_corpus`). They are joined and cut
    into windows of `length` bytes, each of which the model sees alone. By default they have the
    training length, or if the model does not know it, 512 bytes or the model's longest input if
    that is less. With a `stride` below the length windows overlap, and each byte is counted where
    it has most before it. `batch_size` windows are computed at once, on the model's device and in
    the dtype of its parameters. Raises `ValueError` for data without bytes, for windows that are
    too long, and for a model whose logits depend on the bytes they should predict.
    """
    require_prediction(model.config)
    length = default_length(model.config, model.training_length) if length is None else length
    windows, end_id = scored_windows(model.config, data, length, stride)
    weight = model.to_logits.weight
    alone, pad_id = parallel.Group(0, 1, weight.device), windows.vocab.pad_id
    row_nats = make_row_nats(model, pad_id, torch.float32, end_id)
    batches = evaluation_batches(windows, min(batch_size, len(windows)))
    return evaluate_batches(row_nats, batches, pad_id, alone, end_id)


RowNats = Callable[..., Float[Tensor, " B"]]


def make_row_nats(
    model: Any, pad_id: int, dtype: torch.dtype, end_id: int | None = None
) -> RowNats:
    """The function from ids to the summed nats of each row, without pads; dropout is off.

    `end_id` is excluded, too: the ends of documents, for models that read them where only bytes
    count. A second argument, bool[B, T], says which ids are counted. Products are in `dtype` if it
    is narrower than the parameters.
    """

    def row_nats(
        ids: Integer[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None = None
    ) -> Float[Tensor, " B"]:
        ids = as_ids(ids)
        left_out = ~counted_ids(ids, pad_id, mask)
        left_out = left_out if end_id is None else left_out | (ids == end_id)
        with inference(model), parallel.autocast(ids.device, dtype):
            return token_nats(model(ids), ids).masked_fill(left_out, 0.0).sum(dim=1)

    return row_nats


def evaluate_batches(
    row_nats: RowNats,
    batches: Iterable[Batch],
    pad_id: int,
    group: parallel.Group,
    end_id: int | None = None,
) -> Evaluation:
    """Sums over this process's rows of `batches` and over all processes.

    Pads are excluded, and `end_id` as in `make_row_nats`. Rows are added exactly (`math.fsum`), so
    neither their order nor the number of processes matters.
    """
    nats: list[float] = []
    count = 0
    for batch in batches:
        ids, mask = batch.ids, batch.counted
        counted = (ids != pad_id) & (ids != (pad_id if end_id is None else end_id))
        count += int((counted if mask is None else counted & mask).sum())
        arrays = [
            torch.from_numpy(each).to(group.device) for each in (ids, mask) if each is not None
        ]
        nats.extend(row_nats(*arrays).tolist())
    gathered: list[Any] = [(nats, count)]
    if group.size > 1:
        gathered = [None] * group.size
        dist.all_gather_object(gathered, (nats, count))
    total = math.fsum(each for part, _ in gathered for each in part)
    return Evaluation(total, sum(number for _, number in gathered))
