"""Learned activations: a weighted SiLU plus a cubic B-spline in each channel.

Liu et al. 2024, arXiv 2404.19756, section 2.2, inside a feed-forward layer. Axes: B batch, T
positions, D width, F channels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.config.blt import SPLINE_BASES, SPLINE_EDGE, SPLINE_INTERVALS
from bytelm_torch.layers.initializers import fan_in_normal
from bytelm_torch.layers.norm import RMSNorm


def bump(distance: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The uniform cubic B-spline at a distance from its middle, in intervals; 0 from 2 on.

    Written in powers of the distances to the ends of its pieces, it needs no case distinctions, and
    automatic differentiation gives the right derivative at the knots, too.
    """
    away = distance.abs()
    return ((2 - away).clamp(min=0) ** 3 - 4 * (1 - away).clamp(min=0) ** 3) / 6


def spline_activation(
    x: Float[Tensor, "*batch F"], gain: Float[Tensor, " F"], coefficients: Float[Tensor, "F 11"]
) -> Float[Tensor, "*batch F"]:
    """gain · SiLU(x) + Σ_i coefficients_i · B_i(x), in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    position = (wide + SPLINE_EDGE) * (
        SPLINE_INTERVALS / (2 * SPLINE_EDGE)
    ) + 1  # 0 at the middle of B_0, 1 at that of B_1, …
    out = gain.to(wide.dtype) * F.silu(wide)
    for i in range(SPLINE_BASES):
        out = out + coefficients[:, i].to(wide.dtype) * bump(position - i)
    return out.to(x.dtype)


class Spline(nn.Module):
    """One learned activation per channel; starts as SiLU with a small random spline."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.coefficients = nn.Parameter(torch.empty(channels, SPLINE_BASES))
        nn.init.normal_(self.coefficients, std=0.1 / SPLINE_INTERVALS)

    def forward(self, x: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
        return spline_activation(x, self.gain, self.coefficients)


class SplineFeedForward(nn.Module):
    """RMSNorm → Linear(D, F) → one spline per channel → Linear(F, D), without biases."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.spline = Spline(hidden_dim)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        for linear in (self.up, self.down):
            fan_in_normal(linear.in_features)(linear.weight)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down(self.spline(self.up(self.norm(x))))
