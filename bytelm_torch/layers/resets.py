"""Where a text starts anew: behind each newline, or behind each document.

To a model with `reset_on`, what lies between two resets is a text of its own: its logits are those
of that text alone. Axes: B batch, T bytes.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bytelm_torch.config import ByteVocab


def ends_segment(
    ids: Int[Tensor, "*batch"], vocab: ByteVocab, reset_on: str
) -> Bool[Tensor, "*batch"]:
    """Whether the text starts anew behind each id: a newline, or with "document" an `eos_id`."""
    match reset_on:
        case "newline":
            return ids == vocab.offset + ord("\n")
        case "document":
            return ids == vocab.eos_id
        case _:
            return torch.zeros_like(ids, dtype=torch.bool)


def segment_begins(ids: Int[Tensor, "B T"], vocab: ByteVocab, reset_on: str) -> Int[Tensor, "B T"]:
    """The position at which the segment of each position begins; the id that ends it belongs to it.

    `ids` are the ids to be predicted, unshifted; a position's own id does not decide about it.
    """
    length = ids.shape[1]
    numbers = 1 + torch.arange(length, device=ids.device)[None, :]
    behind = torch.where(ends_segment(ids, vocab, reset_on), numbers, 0)
    begins = torch.nn.functional.pad(behind, (1, 0))[:, :length]
    return torch.cummax(begins, dim=1).values if length else begins
