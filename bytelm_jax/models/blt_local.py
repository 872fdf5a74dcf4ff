"""The local stacks of the Byte Latent Transformer: the byte encoder and the byte decoder.

Axes: B batch, T bytes, N patches, M vectors per patch (W together), G key heads, K head width, D
width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from bytelm.config import BLTConfig
from bytelm_jax.layers.attention import KeyValueCache
from bytelm_jax.layers.cross_attention import CrossAttention
from bytelm_jax.layers.dropout import fold_rows
from bytelm_jax.layers.embedding import ByteEmbedding
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.ngram import NgramEmbedding
from bytelm_jax.layers.norm import RMSNorm
from bytelm_jax.layers.segments import segment_max
from bytelm_jax.layers.transformer import Caches, Transformer, positions_at, positions_in


class Encoder(nnx.Module):
    """Bytes → byte states, and the pooling of a patch's states into M vectors."""

    def __init__(self, config: BLTConfig, *, rngs: nnx.Rngs):
        c, dim = config, config.local_dim
        self.queries = c.patch_queries
        init = fan_in_normal(dim)
        self.embed = ByteEmbedding(c.vocab.size, dim, init, rngs=rngs)
        if c.ngram_tables:
            self.ngrams = NgramEmbedding(c.ngram_tables * c.ngram_rows, dim, rngs=rngs)
        heads = (c.encoder_heads, c.encoder_kv_heads)
        sizes = (dim, c.encoder_layers, *heads, c.encoder_hidden_dim, c.local_window)
        kind = (c.rotation_base, c.dropout, c.feedforward)
        self.transformer = Transformer(*sizes, *kind, rngs=rngs)
        self.to_queries = nnx.Linear(
            dim, c.patch_queries * dim, use_bias=False, kernel_init=init, rngs=rngs
        )
        self.cross_attention = CrossAttention(dim, *heads, rngs=rngs)

    def pool(
        self,
        states: Float[Array, "B T D"],
        patch_of: Int[Array, "B T"],
        count: int,
        is_sorted: bool = False,
    ) -> tuple[Float[Array, "B {count} W"], KeyValueCache]:
        """Patches of byte states, and the keys and values [B, T, G, K] that pooled them.

        `is_sorted` says that `patch_of` never falls along a row.
        """
        cache = self.cross_attention.keys_values(states)
        top = segment_max(states, patch_of, count, is_sorted)
        return self.pool_cached(top, cache, patch_of, is_sorted), cache

    def pool_one(
        self, states: Float[Array, "B L D"], cache: KeyValueCache, mask: Bool[Array, "B L"]
    ) -> Float[Array, "B 1 W"]:
        """Version of `pool` for one patch per row; `mask` marks its bytes among the cached ones."""
        top = jnp.where(mask[:, :, None], states, -jnp.inf).max(axis=1, keepdims=True)
        queries = self._split(self.to_queries(top))[:, 0]
        pooled = self.cross_attention.pool_one(queries, cache, mask)
        return pooled.reshape(top.shape[0], 1, -1)

    def pool_cached(
        self,
        top: Float[Array, "B N D"],
        cache: KeyValueCache,
        patch_of: Int[Array, "B T"],
        is_sorted: bool = False,
    ) -> Float[Array, "B N W"]:
        """Version of `pool` given the maxima of the patches and the bytes' keys and values."""
        pooled = self.cross_attention.pool_cached(
            self._split(self.to_queries(top)), cache, patch_of, is_sorted
        )
        return pooled.reshape(*top.shape[:2], -1)

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.queries, -1)


class Decoder(nnx.Module):
    """Byte states and patches → byte states that include the newest complete patch."""

    def __init__(self, config: BLTConfig, *, rngs: nnx.Rngs):
        c, dim = config, config.local_dim
        self.queries = c.patch_queries
        heads = (c.decoder_heads, c.decoder_kv_heads)
        sizes = (dim, c.decoder_layers, *heads, c.decoder_hidden_dim, c.local_window)
        self.to_memory = nnx.Linear(
            c.global_dim,
            c.patch_queries * dim,
            use_bias=False,
            kernel_init=fan_in_normal(c.global_dim),
            rngs=rngs,
        )
        self.cross_attentions = nnx.List(
            [CrossAttention(dim, *heads, rngs=rngs) for _ in range(c.decoder_layers)]
        )
        kind = (c.rotation_base, c.dropout, c.feedforward)
        self.transformer = Transformer(*sizes, *kind, rngs=rngs)
        self.norm = RMSNorm(dim)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        patches: Float[Array, "B N W"],
        read_of: Int[Array, "B T"],
        keys: Key[Array, " B"] | None = None,
        remat: bool = False,
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches, Caches]:
        """The output, then keys and values of the patches' vectors and of the bytes by layer."""
        rope = self.transformer.rope(positions_in(x.shape[1], segment_starts), x.dtype)
        memory, read, written = self.split(patches), [], []
        for i, (cross, layer) in enumerate(self._layers()):
            if remat:
                cross, layer = jax.checkpoint(cross.read), jax.checkpoint(layer)
            else:
                cross = cross.read
            x, vectors = cross(x, memory, read_of)
            x, cache = layer(x, rope, fold_rows(keys, i), None, segment_starts)
            read.append(vectors)
            written.append(cache)
        return self.norm(x), tuple(read), tuple(written)

    def extend(
        self,
        x: Float[Array, "B T D"],
        memory: Caches,
        caches: Caches,
        index: Int[Array, " B"],
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """Cached version of `__call__` for T positions of each row, from `index` on.

        `memory` is the patch that each of them reads, [B, T, M, G, K].
        """
        positions, written = positions_at(index, x.shape[1], segment_starts), []
        rope = self.transformer.rope(positions, x.dtype)
        for (cross, layer), vectors, cache in zip(self._layers(), memory, caches, strict=True):
            x, cache = layer.extend(cross.read_each(x, vectors), rope, cache, index, segment_starts)
            written.append(cache)
        return self.norm(x), tuple(written)

    def split(self, patches: Float[Array, "B N W"]) -> Float[Array, "B N M D"]:
        """The M vectors of each patch."""
        return self.to_memory(patches).reshape(*patches.shape[:2], self.queries, -1)

    def _layers(self) -> zip:
        return zip(self.cross_attentions, self.transformer.layers, strict=True)
