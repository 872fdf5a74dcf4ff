"""Byte and position embeddings."""

from collections.abc import Callable

from jaxtyping import Float, Int
from torch import Tensor, nn


class ByteEmbedding(nn.Embedding):
    """A table [V, D] looked up by id.

    `init_std` is the deviation of a normal initialisation; a function that fills the weight may
    stand in its place.
    """

    def __init__(self, size: int, dim: int, init_std: float | Callable[[Tensor], Tensor]):
        super().__init__(size, dim)
        if callable(init_std):
            init_std(self.weight)
        else:
            nn.init.normal_(self.weight, std=init_std)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(ids)


class PositionEmbedding(nn.Embedding):
    """A learned table [T_MAX, D] whose rows are read in order."""

    def __init__(self, length: int, dim: int, init_std: float):
        super().__init__(length, dim)
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, start: int, count: int) -> Float[Tensor, "{count} D"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.weight[start : start + count]
