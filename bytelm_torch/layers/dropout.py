"""Dropout. JAX draws its bits per global row from explicit keys, torch from its own generator."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def dropout(x: Float[Tensor, " B *rest"], rate: float, training: bool) -> Float[Tensor, " B *rest"]:
    """Zeroes each value with probability `rate` and scales the others by 1 / (1 − rate)."""
    return F.dropout(x, rate, training) if rate > 0 else x
