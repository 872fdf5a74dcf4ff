"""What `bytelm_torch.hf` is called with: every argument is honoured, or refused by name.

B rows, T columns of ids, of which a mask may leave some out.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bytelm.config import ByteVocab, require
from bytelm_torch.layers.ids import check_ids


class Rows(NamedTuple):
    """Rows of ids without what the mask leaves out."""

    ids: Tensor
    """int64 [B, T]: the real ids of each row in their order, pads behind them."""
    lengths: Tensor
    """[B] real ids of each row."""
    counts: Tensor
    """[B, T] real ids up to each column, itself included."""


def left_justify(ids: Tensor, real: Tensor | None, pad_id: int) -> Rows:
    """The rows of `ids` [B, T] where `real` [B, T] is true; without it, everywhere."""
    batch, length = ids.shape
    if real is None:
        counts = torch.arange(1, length + 1, device=ids.device).expand(batch, length)
        return Rows(ids, torch.full((batch,), length, device=ids.device), counts)
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    held = ids.masked_fill(~real, pad_id).gather(1, order)
    return Rows(held, real.sum(dim=1), real.cumsum(dim=1))


def largest(lengths: Tensor) -> int:
    """The largest of the lengths [B], 0 of none; waits for the device."""
    return int(lengths.max()) if len(lengths) else 0


def checked_ids(input_ids: Any, vocab: ByteVocab) -> Tensor:
    """`input_ids` as int64 [B, T]; raises `ValueError` for anything that is not rows of ids."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids={type(input_ids).__name__}: give a tensor of ids, [B, T]")
    return check_ids(input_ids, vocab.size).long()


def checked_mask(attention_mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Whether each column is real, bool of `shape`; None where no mask is given."""
    if attention_mask is None:
        return None
    given, zero_or_one = tuple(attention_mask.shape), (attention_mask == 0) | (attention_mask == 1)
    require(
        given == shape,
        f"attention_mask: shape {given}; expected {shape}, the rows and all ids seen so far",
    )
    require(bool(zero_or_one.all()), "attention_mask: must hold 0 for padding and 1 for ids alone")
    return attention_mask != 0


def check_positions(position_ids: Tensor | None, real: Tensor | None, expected: Tensor) -> None:
    """Raises `ValueError` unless `position_ids` are `expected` [B, T], those of one text a row.

    What stands under padding does not count.
    """
    if position_ids is None:
        return
    given, shape = tuple(position_ids.shape), tuple(expected.shape)
    require(given in (shape, (1, shape[1])), f"position_ids: shape {given}; expected {shape}")
    wrong = position_ids != expected
    wrong = wrong if real is None else wrong & real
    if not bool(wrong.any()):
        return
    row, column = wrong.nonzero()[0].tolist()
    found = int(position_ids.expand(shape)[row, column])
    raise ValueError(
        f"position_ids: {found} in row {row}, column {column}, where the id is number "
        f"{int(expected[row, column])} of its row; give each text a row of its own"
    )


def check_labels(labels: Tensor | None, shape: tuple[int, int]) -> None:
    """Raises `ValueError` unless there is a label for each of the ids."""
    given = shape if labels is None else tuple(labels.shape)
    require(given == shape, f"labels: shape {given}; expected {shape}, that of input_ids")


def refuse(others: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first argument that asks for something."""
    for name, value in others.items():
        asks = value is not None and value is not False
        require(not asks, f"{name}: these models have no such argument; leave it out")
