"""Embeddings of hashed byte n-grams (Pagnoni et al. 2024, arXiv 2412.09871, section 3.2.1).

Axes: B batch, T bytes, E tables, D width. A hash is Σ_j id_j · prime^j, j = 0 the oldest id, in
wrapping signed 64-bit arithmetic, then the remainder (never negative) by the rows of a table.
"""

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn

from bytelm.config import BLTConfig
from bytelm.config.blt import HASH_PRIMES
from bytelm_torch.layers.initializers import fan_in_normal


def polynomial_hash(
    grams: Integer[Tensor, "*batch n"], prime: int, rows: int
) -> Int[Tensor, "*batch"]:
    """Hash of the last axis, oldest id first: ids from 0 to 65535, result from 0 to rows − 1."""
    total = torch.zeros(grams.shape[:-1], dtype=torch.int64, device=grams.device)
    for j in range(grams.shape[-1]):
        factor = pow(prime, j, 2**64)
        total += grams[..., j].long() * (factor - 2**64 if factor >= 2**63 else factor)
    return total % rows


def ngram_rows(grams: Integer[Tensor, "*batch n"], config: BLTConfig) -> Int[Tensor, "*batch E"]:
    """Row of the fused table for each table, function-major, then by size in the config's order.

    `grams` holds the ids that end at each byte, oldest first, as many as the largest size, with
    id 0 before the first one.
    """
    rows, table_size = [], config.ngram_rows
    for prime in HASH_PRIMES[: config.ngram_functions]:
        for size in config.ngram_sizes:
            hashed = polynomial_hash(grams[..., grams.shape[-1] - size :], prime, table_size)
            rows.append(hashed + len(rows) * table_size)
    return torch.stack(rows, dim=-1)


class NgramEmbedding(nn.Embedding):
    """One fused table [tables · rows, D]; the rows of a byte are looked up and summed."""

    def __init__(self, count: int, dim: int):
        super().__init__(count, dim)
        fan_in_normal(dim)(self.weight)

    def forward(self, rows: Int[Tensor, "*batch E"]) -> Float[Tensor, "*batch D"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Embeddings of `rows` from `ngram_rows`; a row past the table adds nothing (padding)."""
        inside = rows < self.num_embeddings
        embedded = super().forward(rows.where(inside, 0))
        return embedded.masked_fill(~inside[..., None], 0).sum(dim=-2)
