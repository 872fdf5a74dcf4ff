"""Cross-attention between bytes and patches, in time and memory linear in the bytes.

Pagnoni et al. 2024 (arXiv 2412.09871), section 3.2.2, as in the published weights. A byte belongs
to one patch, so pooling is a softmax over segments and reading back is a gather: the [N, T] matrix
of the dense form is never materialised.

Axes: B batch, T bytes, N patches, M vectors per patch (`patch_queries`), H heads in G groups of R,
K head width, D width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm_torch.layers.attention import KeyValueCache
from bytelm_torch.layers.caches import swap_heads
from bytelm_torch.layers.grouped_attention import grouped_attention
from bytelm_torch.layers.initializers import fan_in_normal
from bytelm_torch.layers.norm import RMSNorm
from bytelm_torch.layers.segments import segment_max, segment_sum, take_segments


class CrossAttention(nn.Module):
    """Queries x → 2x + attention(norm(x), norm(states)); no rotation, no bias, scale K^-0.5.

    The published layer adds its input and its caller adds it again; both happen here. Values are
    also projected from the normalised states.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, dim // heads
        grouped = self.kv_heads * self.head_dim
        self.q_norm = RMSNorm(dim)
        self.k_norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, grouped, bias=False)
        self.to_v = nn.Linear(dim, grouped, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        for linear in (self.to_q, self.to_k, self.to_v, self.to_out):
            fan_in_normal(dim)(linear.weight)

    def pool_cached(
        self,
        queries: Float[Tensor, "B N M D"],
        cache: KeyValueCache,
        patch_of: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B N M D"]:
        """The M queries of each patch attend to exactly the bytes of that patch.

        `cache` holds the bytes' keys and values; `patch_of` is N for a byte without a patch.
        """
        count, (keys, values) = queries.shape[1], cache
        wide = torch.promote_types(keys.dtype, torch.float32)
        q = self._queries(queries)
        near = take_segments(q.flatten(2), patch_of)
        near = near.reshape(*keys.shape[:2], q.shape[2], self.kv_heads, -1, self.head_dim)
        scores = torch.einsum("btmgrk,btgk->btmgr", near, keys).to(wide) * self.head_dim**-0.5
        flat = scores.flatten(2)
        most = segment_max(flat.detach(), patch_of, count)
        inside = (patch_of < count)[..., None]
        # The mask goes inside exp: outside, an infinity times a gradient of 0 would be NaN.
        weights = (flat - take_segments(most, patch_of)).masked_fill(~inside, -torch.inf).exp()
        total = segment_sum(weights, patch_of, count)
        share = weights.reshape(scores.shape)[..., None] * values[:, :, None, :, None, :]
        mixed = segment_sum(share.flatten(2), patch_of, count).unflatten(-1, (-1, self.head_dim))
        mixed = mixed / total.masked_fill(total == 0, 1)[..., None]  # 0 / 0 in a patch of no bytes
        return self._add(queries, mixed.reshape(q.shape).to(q.dtype))

    def pool_one(
        self, queries: Float[Tensor, "B M D"], cache: KeyValueCache, mask: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B M D"]:
        """Version of `pool_cached` for one patch per row; `mask` marks its bytes in `cache`.

        The cache is stored by head, [B, G, S, K].
        """
        keys, values = swap_heads(cache)
        mixed = grouped_attention(self._queries(queries), keys, values, mask[:, None, :])
        return self._add(queries, mixed)

    def read(
        self,
        x: Float[Tensor, "B T D"],
        memory: Float[Tensor, "B N M D"],
        read_of: Int[Tensor, "B T"],
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """Each byte attends to the M vectors of one patch, number `read_of`.

        Also gives the patches' keys and values, [B, N, M, G, K].
        """
        cache = self.keys_values(memory)
        # One gather for both: its backward pass, a segment sum, is the expensive part.
        both = torch.cat([part.flatten(2) for part in cache], dim=-1)
        near = take_segments(both, read_of).reshape(*x.shape[:2], 2, *cache.keys.shape[2:])
        q = self._queries(x)[:, :, None]
        mask = torch.ones(1, memory.shape[2], dtype=torch.bool, device=x.device)
        mixed = grouped_attention(q, near[:, :, 0], near[:, :, 1], mask)[:, :, 0]
        return self._add(x, mixed), cache

    def read_each(self, x: Float[Tensor, "B T D"], cache: KeyValueCache) -> Float[Tensor, "B T D"]:
        """Version of `read` given the keys and values of each byte's patch, [B, T, M, G, K]."""
        mask = torch.ones(1, cache.keys.shape[2], dtype=torch.bool, device=x.device)
        q = self._queries(x)
        if x.shape[1] == 1:
            k, v = (part[:, 0] for part in cache)
            return self._add(x, grouped_attention(q, k, v, mask))
        return self._add(x, grouped_attention(q[:, :, None], *cache, mask)[:, :, 0])

    def keys_values(self, states: Float[Tensor, "*batch D"]) -> KeyValueCache:
        """Keys and values [..., G, K] of bytes or of a patch's vectors."""
        states, shape = self.k_norm(states), (self.kv_heads, self.head_dim)
        return KeyValueCache(*(to(states).unflatten(-1, shape) for to in (self.to_k, self.to_v)))

    def _queries(self, x: Tensor) -> Tensor:
        return self.to_q(self.q_norm(x)).unflatten(-1, (self.heads, self.head_dim))

    def _add(self, x: Tensor, mixed: Tensor) -> Tensor:
        return x + (x + self.to_out(mixed.reshape(x.shape)))
