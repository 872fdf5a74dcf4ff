"""Sums, maxima and reads over the patches of a text, in time linear in its bytes.

Axes: B batch, T bytes, N patches, F features. `patch_of` [B, T] holds the patch of each byte, at
most N; a byte whose patch is N belongs to none: it adds nothing and reads zeros.
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def segment_sum(
    x: Float[Tensor, "B T F"], patch_of: Int[Tensor, "B T"], count: int
) -> Float[Tensor, "B {count} F"]:
    """Sum over the bytes of each patch; 0 for a patch without bytes."""
    total = x.new_zeros((x.shape[0], count + 1, x.shape[2]))
    return total.scatter_add(1, patch_of[..., None].expand_as(x), x)[:, :count]


def take_segments(
    x: Float[Tensor, "B N F"], patch_of: Int[Tensor, "B T"]
) -> Float[Tensor, "B T F"]:
    """The row of `x` that belongs to the patch of each byte."""
    index = patch_of[..., None].expand(-1, -1, x.shape[2])
    return F.pad(x, (0, 0, 0, 1)).gather(1, index)


def segment_max(
    x: Float[Tensor, "B T F"], patch_of: Int[Tensor, "B T"], count: int
) -> Float[Tensor, "B {count} F"]:
    """Maximum over the bytes of each patch; 0 for a patch without bytes.

    Bytes that share a maximum share its gradient equally.
    """
    start = x.new_zeros((x.shape[0], count + 1, x.shape[2]))
    index = patch_of[..., None].expand_as(x)
    return start.scatter_reduce(1, index, x, "amax", include_self=False)[:, :count]
