"""Byte and position embeddings."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from bytelm_torch.layers.ids import as_ids


class ByteEmbedding(nn.Embedding):
    """A table [V, D] looked up by id.

    `init_std` is the standard deviation of a normal initialisation, or a function that fills the
    weight.
    """

    def __init__(self, size: int, dim: int, init_std: float | Callable[[Tensor], Tensor]):
        super().__init__(size, dim)
        if callable(init_std):
            init_std(self.weight)
        else:
            nn.init.normal_(self.weight, std=init_std)

    def forward(self, ids: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(as_ids(ids))


class PositionEmbedding(nn.Embedding):
    """A learned table [T_MAX, D] whose rows are read in order."""

    def __init__(self, length: int, dim: int, init_std: float):
        super().__init__(length, dim)
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, start: int, count: int) -> Float[Tensor, "{count} D"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.weight[start : start + count]

    def patches(
        self, numbers: Int[Tensor, "B N"], count: int, patch: int
    ) -> Float[Tensor, "B N W"]:
        """The rows of the patches numbered `numbers`, concatenated; `count` exceeds all of them."""
        return F.embedding(numbers, self.weight[: count * patch].reshape(count, -1))


def sinusoidal_positions(
    start: int, count: int, dim: int, dtype: torch.dtype, device: torch.device | None = None
) -> Float[Tensor, "{count} {dim}"]:
    """`sinusoids` for `count` positions from `start` on."""
    return sinusoids(torch.arange(start, start + count, device=device), dim, dtype)


def sinusoids(
    positions: Int[Tensor, "*batch T"], dim: int, dtype: torch.dtype
) -> Float[Tensor, "*batch T {dim}"]:
    """sin and cos, interleaved, of position / 10000^(2i / D) (Vaswani et al. 2017, section 3.5).

    The frequencies come from float64 and the angles are rounded to at least float32, so that both
    packages and every length give a position the same angles.
    """
    wide, device = torch.promote_types(dtype, torch.float32), positions.device
    pair = np.arange(dim) // 2
    frequencies = torch.from_numpy(10_000.0 ** (-2 * pair / dim)).to(device, wide)
    angles = positions.to(wide)[..., None] * frequencies
    even = torch.arange(dim, device=device) % 2 == 0
    return torch.where(even, angles.sin(), angles.cos()).to(dtype)
