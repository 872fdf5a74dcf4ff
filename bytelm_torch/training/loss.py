"""Masked cross-entropy as (sum of nats, count of predicted ids)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

from bytelm_torch.layers.ids import as_ids


def cross_entropy(
    logits: Float[Tensor, "B T V"],
    ids: Integer[Tensor, "B T"],
    pad_id: int,
    counted: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Summed nats of `ids` under `logits`, and the number of counted ids: all but pads.

    `counted` says which of them are; it leaves out bytes that are read and not learned.

    Computed in at least float32. The mean is left to the caller, because devices and micro-batches
    must add nats and counts before they divide.
    """
    ids = as_ids(ids)
    counted = counted_ids(ids, pad_id, counted)
    nats = token_nats(logits, ids).masked_fill(~counted, 0.0)
    return nats.sum(), counted.sum()


def counted_ids(
    ids: Integer[Tensor, "B T"], pad_id: int, counted: Bool[Tensor, "B T"] | None
) -> Bool[Tensor, "B T"]:
    """Which ids are counted: all but pads, and only those that `counted` says, if it is given."""
    return ids != pad_id if counted is None else (ids != pad_id) & counted


def row_nats(
    logits: Float[Tensor, "B T V"],
    ids: Integer[Tensor, "B T"],
    pad_id: int,
    counted: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, " B"]:
    """`cross_entropy`'s nats, summed over each row alone."""
    ids = as_ids(ids)
    left_out = ~counted_ids(ids, pad_id, counted)
    return token_nats(logits, ids).masked_fill(left_out, 0.0).sum(dim=1)


def source_sums(
    values: Shaped[Tensor, " B"], sources: Int[Tensor, " B"], count: int
) -> Shaped[Tensor, " sources"]:
    """Sums of the rows' values over the rows of each of `count` sources."""
    theirs = sources[:, None] == torch.arange(count, device=sources.device)
    return values[:, None].masked_fill(~theirs, 0).sum(dim=0)


def token_nats(
    logits: Float[Tensor, "*batch V"], ids: Integer[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Surprise of each id in nats, in at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(wide.flatten(0, -2), as_ids(ids).flatten().long(), reduction="none")
    return flat.reshape(ids.shape)
