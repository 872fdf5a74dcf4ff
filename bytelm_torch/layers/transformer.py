"""The stack that the Byte Latent Transformer is made of: pre-norm, RMSNorm, rotary, gated.

Bytropix leaves the rotation out, puts splines in the gate's place and guides the attention.
Axes: B batch, T positions, D width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytelm_torch.layers.attention import KeyValueCache
from bytelm_torch.layers.dropout import dropout
from bytelm_torch.layers.feedforward import GatedFeedForward
from bytelm_torch.layers.grouped_attention import GroupedAttention
from bytelm_torch.layers.rotary import Rotation, rotation
from bytelm_torch.layers.spline import SplineFeedForward

Caches = tuple[KeyValueCache, ...]
"""Keys and values, one pair a layer."""


class TransformerLayer(nn.Module):
    """Pre-norm residual layer: x += attention(x); x += feedforward(x)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        hidden_dim: int,
        window: int,
        rate: float,
        feedforward: str = "gated",
        guided: bool = False,
    ):
        super().__init__()
        self.rate = rate
        self.attention = GroupedAttention(dim, heads, kv_heads, window, guided)
        made = GatedFeedForward if feedforward == "gated" else SplineFeedForward
        self.feedforward = made(dim, hidden_dim)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        turn: Rotation | None,
        unrest: Float[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """Also gives the attention's keys and values."""
        attended, cache = self.attention(x, turn, unrest)
        x = x + dropout(attended, self.rate, self.training)
        return x + dropout(self.feedforward(x), self.rate, self.training), cache

    def extend(
        self, x: Float[Tensor, "B 1 D"], turn: Rotation | None, cache: KeyValueCache, index: int
    ) -> tuple[Float[Tensor, "B 1 D"], KeyValueCache]:
        """The same for the position `index`, with the past taken from `cache`."""
        attended, cache = self.attention.extend(x, turn, cache, index)
        x = x + attended
        return x + self.feedforward(x), cache

    def extend_rows(
        self,
        x: Float[Tensor, "B 1 D"],
        turn: Rotation | None,
        cache: KeyValueCache,
        index: Int[Tensor, " B"],
        unrest: Float[Tensor, "B 1"] | None = None,
    ) -> tuple[Float[Tensor, "B 1 D"], KeyValueCache]:
        """The same for another position in each row; gives the new key and value [B, G, K]."""
        attended, new = self.attention.extend_rows(x, turn, cache, index, unrest)
        x = x + attended
        return x + self.feedforward(x), new


class Transformer(nn.Module):
    """A stack of layers without a final norm.

    `theta` is the base of the rotary frequencies, 0 for none; `feedforward` is gated or spline;
    `guided` attention is given `unrest`, one number a position (`grouped_attention.guide`).
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int,
        hidden_dim: int,
        window: int,
        theta: float,
        rate: float,
        feedforward: str = "gated",
        guided: bool = False,
    ):
        super().__init__()
        self.head_dim, self.theta = dim // heads, theta
        sizes = (dim, heads, kv_heads, hidden_dim, window, rate, feedforward, guided)
        self.layers = nn.ModuleList([TransformerLayer(*sizes) for _ in range(layers)])

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        remat: bool = False,
        unrest: Float[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Caches]:
        """Also gives every layer's keys and values, [B, T, G, K]."""
        positions = torch.arange(x.shape[1], device=x.device)[None, :]
        turn, written = self.turn(positions, x.dtype), []
        for layer in self.layers:
            if remat:
                x, cache = checkpoint(layer, x, turn, unrest, use_reentrant=False)  # pyright: ignore[reportGeneralTypeIssues]
            else:
                x, cache = layer(x, turn, unrest)
            written.append(cache)
        return x, tuple(written)

    def extend(
        self, x: Float[Tensor, "B 1 D"], caches: Caches, index: int
    ) -> tuple[Float[Tensor, "B 1 D"], Caches]:
        """The same for the position `index`, with the past taken from `caches`."""
        turn, written = self.turn(torch.full((1, 1), index, device=x.device), x.dtype), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.extend(x, turn, cache, index)  # pyright: ignore[reportCallIssue]
            written.append(cache)
        return x, tuple(written)

    def extend_rows(
        self,
        x: Float[Tensor, "B 1 D"],
        caches: Caches,
        index: Int[Tensor, " B"],
        unrest: Float[Tensor, "B 1"] | None = None,
    ) -> tuple[Float[Tensor, "B 1 D"], Caches]:
        """The same for another position in each row; gives the new keys and values [B, G, K]."""
        turn, made = self.turn(index[:, None], x.dtype), []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, new = layer.extend_rows(x, turn, cache, index, unrest)  # pyright: ignore[reportCallIssue]
            made.append(new)
        return x, tuple(made)

    def turn(self, positions: Int[Tensor, "B T"], dtype: torch.dtype) -> Rotation | None:
        """The rotation of keys and queries at these positions; None where `theta` is 0."""
        return rotation(positions, self.head_dim, self.theta, dtype) if self.theta else None

    def empty_caches(self, batch: int, length: int, dtype: torch.dtype) -> Caches:
        """One cache a layer for `length` positions."""
        return tuple(layer.attention.empty_cache(batch, length, dtype) for layer in self.layers)  # pyright: ignore
