"""The local stacks of the Byte Latent Transformer: the byte encoder and the byte decoder.

Axes: B batch, T bytes, N patches, M vectors per patch (W together), G key heads, K head width, D
width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytelm.config import BLTConfig
from bytelm_torch.layers.attention import KeyValueCache
from bytelm_torch.layers.caches import Index
from bytelm_torch.layers.cross_attention import CrossAttention
from bytelm_torch.layers.embedding import ByteEmbedding
from bytelm_torch.layers.initializers import fan_in_normal
from bytelm_torch.layers.ngram import NgramEmbedding
from bytelm_torch.layers.norm import RMSNorm
from bytelm_torch.layers.segments import segment_max
from bytelm_torch.layers.transformer import Caches, Transformer, positions_at, positions_in


def bias_free(inputs: int, outputs: int, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """A linear layer without bias, initialised by fan-in."""
    linear = kind(inputs, outputs, bias=False)
    fan_in_normal(inputs)(linear.weight)
    return linear


class Encoder(nn.Module):
    """Bytes → byte states, and the pooling of a patch's states into M vectors."""

    def __init__(self, config: BLTConfig):
        super().__init__()
        c, dim = config, config.local_dim
        self.queries = c.patch_queries
        self.embed = ByteEmbedding(c.vocab.size, dim, fan_in_normal(dim))
        if c.ngram_tables:
            self.ngrams = NgramEmbedding(c.ngram_tables * c.ngram_rows, dim)
        heads = (c.encoder_heads, c.encoder_kv_heads)
        sizes = (dim, c.encoder_layers, *heads, c.encoder_hidden_dim, c.local_window)
        kind = (c.rotation_base, c.dropout, c.feedforward)
        self.transformer = Transformer(*sizes, *kind)
        self.to_queries = bias_free(dim, c.patch_queries * dim)
        self.cross_attention = CrossAttention(dim, *heads)

    def pool(
        self, states: Float[Tensor, "B T D"], patch_of: Int[Tensor, "B T"], count: int
    ) -> tuple[Float[Tensor, "B {count} W"], KeyValueCache]:
        """Patches of byte states, and the keys and values [B, T, G, K] that pooled them."""
        cache = self.cross_attention.keys_values(states)
        return self.pool_cached(segment_max(states, patch_of, count), cache, patch_of), cache

    def pool_one(
        self, states: Float[Tensor, "B L D"], cache: KeyValueCache, mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B 1 W"]:
        """Version of `pool` for one patch per row; `mask` marks its bytes among the cached ones."""
        top = states.masked_fill(~mask[:, :, None], -torch.inf).amax(dim=1)
        pooled = self.cross_attention.pool_one(self._split(self.to_queries(top)), cache, mask)
        return pooled.flatten(1)[:, None]

    def pool_cached(
        self, top: Float[Tensor, "B N D"], cache: KeyValueCache, patch_of: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B N W"]:
        """Version of `pool` given the maxima of the patches and the bytes' keys and values."""
        queries = self._split(self.to_queries(top))
        return self.cross_attention.pool_cached(queries, cache, patch_of).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.queries, -1))


class Decoder(nn.Module):
    """Byte states and patches → byte states that include the newest complete patch."""

    def __init__(self, config: BLTConfig):
        super().__init__()
        c, dim = config, config.local_dim
        self.queries = c.patch_queries
        heads = (c.decoder_heads, c.decoder_kv_heads)
        sizes = (dim, c.decoder_layers, *heads, c.decoder_hidden_dim, c.local_window)
        self.to_memory = bias_free(c.global_dim, c.patch_queries * dim)
        self.cross_attentions = nn.ModuleList(
            [CrossAttention(dim, *heads) for _ in range(c.decoder_layers)]
        )
        kind = (c.rotation_base, c.dropout, c.feedforward)
        self.transformer = Transformer(*sizes, *kind)
        self.norm = RMSNorm(dim)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        patches: Float[Tensor, "B N W"],
        read_of: Int[Tensor, "B T"],
        remat: bool = False,
        segment_starts: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Caches, Caches]:
        """The output, then keys and values of the patches' vectors and of the bytes by layer."""
        rope = self.transformer.rope(positions_in(x.shape[1], segment_starts, x.device), x.dtype)
        memory, read, written = self.split(patches), [], []
        for cross, layer in self._layers():
            if remat:
                x, vectors = checkpoint(cross.read, x, memory, read_of, use_reentrant=False)
                x, cache = checkpoint(layer, x, rope, None, segment_starts, use_reentrant=False)
            else:
                x, vectors = cross.read(x, memory, read_of)
                x, cache = layer(x, rope, None, segment_starts)
            read.append(vectors)
            written.append(cache)
        return self.norm(x), tuple(read), tuple(written)

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        memory: Caches,
        caches: Caches,
        index: Index,
        segment_starts: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Caches]:
        """Cached version of `forward` for T positions of each row, from `index` on.

        `memory` is the patch that each of them reads, [B, T, M, G, K].
        """
        positions, written = positions_at(index, x.shape[:2], segment_starts, x.device), []
        rope = self.transformer.rope(positions, x.dtype)
        for (cross, layer), vectors, cache in zip(self._layers(), memory, caches, strict=True):
            x, cache = layer.extend(cross.read_each(x, vectors), rope, cache, index, segment_starts)
            written.append(cache)
        return self.norm(x), tuple(written)

    def split(self, patches: Float[Tensor, "B N W"]) -> Float[Tensor, "B N M D"]:
        """The M vectors of each patch."""
        return self.to_memory(patches).unflatten(-1, (self.queries, -1))

    def _layers(self) -> zip:
        return zip(self.cross_attentions, self.transformer.layers, strict=True)
