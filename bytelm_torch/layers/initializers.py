"""Initialisation by fan-in, as in the Byte Latent Transformer."""

from collections.abc import Callable

from torch import Tensor, nn


def fan_in_normal(fan_in: int) -> Callable[[Tensor], Tensor]:
    """Fills with normal numbers, σ = fan_in^-0.5, truncated at ±3σ (σ before the truncation)."""
    std = fan_in**-0.5
    return lambda weight: nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
