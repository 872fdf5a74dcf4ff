"""The stack that the Byte Latent Transformer is built from: pre-norm, RMSNorm, rotary, gated.

Bytropix omits the rotation, uses splines instead of gates and guides the attention. Axes: B batch,
T positions, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from bytelm.config.block import PAPER, BlockConfig
from bytelm_jax.kernels.decode_layer import decode_layer
from bytelm_jax.kernels.decode_weights import (
    Heads,
    LayerWeights,
    as_columns,
    layer_weights,
    product_of,
)
from bytelm_jax.layers.attention import KeyValueCache
from bytelm_jax.layers.caches import positions_from
from bytelm_jax.layers.dropout import dropout, fold_rows
from bytelm_jax.layers.feedforward import GatedFeedForward
from bytelm_jax.layers.grouped_attention import GroupedAttention
from bytelm_jax.layers.norm import RMSNorm
from bytelm_jax.layers.rotary import Rotation, rotation
from bytelm_jax.layers.spline import SplineFeedForward

Caches = tuple[KeyValueCache, ...]
"""Keys and values, one pair per layer."""


class TransformerLayer(nnx.Module):
    """Residual layer: x += attention(x); x += feedforward(x), each with its norm."""

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
        block: BlockConfig = PAPER,
        *,
        rngs: nnx.Rngs,
    ):
        self.rate, self.block = rate, block
        self.attention = GroupedAttention(dim, heads, kv_heads, window, guided, block, rngs=rngs)
        if feedforward == "gated":
            self.feedforward = GatedFeedForward(dim, hidden_dim, block, rngs=rngs)
        else:
            self.feedforward = SplineFeedForward(dim, hidden_dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rotation | None,
        keys: Key[Array, " B"] | None = None,
        patch_entropy: Float[Array, "B T"] | None = None,
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """The output, and the attention's keys and values."""
        attended, cache = self.attention(x, rope, patch_entropy, segment_starts)
        x = x + dropout(attended, self.rate, fold_rows(keys, 0))
        return x + dropout(self.feedforward(x), self.rate, fold_rows(keys, 1)), cache

    def extend(
        self,
        x: Float[Array, "B T D"],
        rope: Rotation | None,
        cache: KeyValueCache,
        index: Int[Array, " B"],
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """Cached version of `__call__` for T positions of each row, from `index` on.

        Also gives the new cache.
        """
        weights = layer_weights(self, x)
        if weights is not None:
            return self._decode(x, weights, rope, cache, index, segment_starts, write=True)
        attended, cache = self.attention.extend(x, rope, cache, index, segment_starts)
        x = x + attended
        return x + self.feedforward(x), cache

    def extend_rows(
        self,
        x: Float[Array, "B T D"],
        rope: Rotation | None,
        cache: KeyValueCache,
        index: Int[Array, " B"],
        patch_entropy: Float[Array, "B T"] | None = None,
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """Version of `extend` that gives the new keys and values [B, T, G, K] alone."""
        weights = layer_weights(self, x)
        if weights is not None:
            return self._decode(x, weights, rope, cache, index, segment_starts, write=False)
        attended, new = self.attention.extend_rows(
            x, rope, cache, index, patch_entropy, segment_starts
        )
        x = x + attended
        return x + self.feedforward(x), new

    def decode_weights(self) -> LayerWeights | None:
        """The weights as sums read them (`kernels.decode_sums`), if these compute the layer."""
        attention, feedforward = self.attention, self.feedforward
        if attention.guided or self.block != PAPER or not isinstance(feedforward, GatedFeedForward):
            return None
        return LayerWeights(
            attention.norm.as_stored(),
            product_of(attention.to_q, attention.to_k, attention.to_v),
            product_of(attention.to_out),
            feedforward.norm.as_stored(),
            product_of(feedforward.gate, feedforward.up),
            product_of(feedforward.down),
        )

    def _decode(
        self,
        x: Array,
        weights: LayerWeights,
        rope: Rotation | None,
        cache: Any,
        index: Array,
        segment_starts: Array | None,
        write: bool,
    ) -> tuple[Array, KeyValueCache]:
        attention, first = self.attention, jnp.zeros_like(index)
        if attention.window:
            first = jnp.maximum(first, index - attention.window + 1)
        if segment_starts is not None:
            first = jnp.maximum(first, segment_starts[:, 0])
        heads = Heads(attention.heads, attention.kv_heads, attention.head_dim)
        columns = as_columns(cache.keys), as_columns(cache.values)
        x, *new = decode_layer(
            x, weights, "silu", columns, index, first, rope, heads, write, attention.window
        )
        if not write:
            new = [part.reshape(len(x), 1, heads.groups, heads.width) for part in new]
        return x, KeyValueCache(*new)


class Transformer(nnx.Module):
    """A stack of layers, without a final norm unless `block` says so.

    `theta` is the base of the rotary frequencies, 0 for none; `feedforward` is gated or spline;
    `guided` attention takes `patch_entropy`, one value per position (`grouped_attention.guide`).
    `block` says what else differs from the paper's layers; its `rope_theta` replaces `theta`.
    `segment_starts` holds the first position of each position's segment: positions count from there
    and nothing before it is seen. Without it the row is one text.
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
        block: BlockConfig = PAPER,
        *,
        rngs: nnx.Rngs,
    ):
        self.head_dim, self.block = block.head_width(dim, heads), block
        self.theta = theta and (block.rope_theta or theta)
        sizes = (dim, heads, kv_heads, hidden_dim, window, rate, feedforward, guided, block)
        self.layers = nnx.List([TransformerLayer(*sizes, rngs=rngs) for _ in range(layers)])
        if block.final_norm:
            self.norm = RMSNorm(dim, block.norm_eps)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        keys: Key[Array, " B"] | None = None,
        remat: bool = False,
        patch_entropy: Float[Array, "B T"] | None = None,
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """The output, and every layer's keys and values, [B, T, G, K]; unused ones cost nothing."""
        rope, written = self.rope(positions_in(x.shape[1], segment_starts), x.dtype), []
        for i, layer in enumerate(self.layers):
            run = jax.checkpoint(layer) if remat else layer
            x, cache = run(x, rope, fold_rows(keys, i), patch_entropy, segment_starts)
            written.append(cache)
        return self._end(x), tuple(written)

    def extend(
        self,
        x: Float[Array, "B T D"],
        caches: Caches,
        index: Int[Array, " B"],
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """Cached version of `__call__` for T positions of each row, from `index` on.

        Also gives the new caches.
        """
        positions, written = positions_at(index, x.shape[1], segment_starts), []
        rope = self.rope(positions, x.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.extend(x, rope, cache, index, segment_starts)
            written.append(cache)
        return self._end(x), tuple(written)

    def extend_rows(
        self,
        x: Float[Array, "B T D"],
        caches: Caches,
        index: Int[Array, " B"],
        patch_entropy: Float[Array, "B T"] | None = None,
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """Version of `extend` that gives the new keys and values [B, T, G, K] alone."""
        positions, new_caches = positions_at(index, x.shape[1], segment_starts), []
        rope = self.rope(positions, x.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            x, new = layer.extend_rows(x, rope, cache, index, patch_entropy, segment_starts)
            new_caches.append(new)
        return self._end(x), tuple(new_caches)

    def rope(self, positions: Int[Array, "B T"], dtype: jnp.dtype) -> Rotation | None:
        """The rotation of keys and queries at these positions; None if `theta` is 0."""
        if not self.theta:
            return None
        return rotation(positions, self.head_dim, self.theta, dtype, self.block)

    def _end(self, x: Array) -> Array:
        return self.norm(x) if self.block.final_norm else x

    def empty_caches(self, batch: int, length: int, dtype: jnp.dtype) -> Caches:
        """One empty cache per layer for `length` positions."""
        return tuple(layer.attention.empty_cache(batch, length, dtype) for layer in self.layers)


def positions_in(length: int, segment_starts: Int[Array, "B T"] | None) -> Int[Array, "#B T"]:
    """0 to T − 1, counted from the first position of each position's segment."""
    positions = jnp.arange(length)[None, :]
    return positions if segment_starts is None else positions - segment_starts


def positions_at(
    index: Int[Array, " B"], count: int, segment_starts: Int[Array, "B T"] | None
) -> Int[Array, "B {count}"]:
    """Version of `positions_in` for the positions of each row from `index` on."""
    positions = positions_from(index, count)
    return positions if segment_starts is None else positions - segment_starts
