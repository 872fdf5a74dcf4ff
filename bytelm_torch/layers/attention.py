"""Multi-query causal attention (Shazeer 2019, arXiv 1911.02150) with optional ALiBi.

Axes: B batch, T query positions, S key positions, H heads, K head width, D width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.positions import alibi_bias
from bytelm_torch.layers.caches import Index, positions_from, write_at
from bytelm_torch.layers.norm import LayerNorm


class KeyValueCache(NamedTuple):
    """Keys and values of one layer's past positions, each [B, S, K]; unwritten rows are zeros."""

    keys: Tensor
    values: Tensor


class Scope(NamedTuple):
    """Which keys the queries of each row see, where a row holds several segments."""

    mask: Bool[Tensor, "B T S"]
    segment_positions: Int[Tensor, "B S"]
    """The position of each key within its segment, from 0."""


def fused_attention(
    q: Float[Tensor, "*batch T H J"],
    k: Float[Tensor, "*batch S G J"],
    v: Float[Tensor, "*batch S G K"],
    mask: Bool[Tensor, "*rows #T S"] | None,
) -> Float[Tensor, "*batch T H K"]:
    """Softmax attention by the kernel that torch has for it; scale K^-0.5.

    H/G heads in a row share a key and value head. Without a `mask` each position sees itself and
    everything before it.
    """
    batch, heads = q.shape[:-3], q.shape[-2]
    rows = math.prod(batch)
    if mask is not None and mask.ndim > 2:
        mask = mask.expand(*batch, *mask.shape[-2:]).reshape(rows, 1, *mask.shape[-2:])
    out = F.scaled_dot_product_attention(
        *(x.reshape(rows, *x.shape[-3:]).transpose(1, 2) for x in (q, k, v)),
        attn_mask=mask,
        is_causal=mask is None,
        scale=v.shape[-1] ** -0.5,
        enable_gqa=heads != k.shape[-2],
    )
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def multi_query_attention(
    q: Float[Tensor, "*batch T H K"],
    k: Float[Tensor, "*batch S K"],
    v: Float[Tensor, "*batch S K"],
    mask: Bool[Tensor, "*rows T S"] | None,
    bias: Float[Tensor, "*kinds H S"] | None = None,
) -> Float[Tensor, "*batch T H K"]:
    """Softmax attention in which all heads share one key and one value head; scale K^-0.5.

    `mask` and `bias` may each have a batch axis or not; no mask is a causal one, and takes no
    `bias`. Scores and softmax are in at least float32. Every query must see at least one key.
    """
    if bias is None:
        return fused_attention(q, k[..., None, :], v[..., None, :], mask)
    assert mask is not None
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("...thk,...sk->...hts", q, k).to(wide) * q.shape[-1] ** -0.5
    scores = scores + bias[..., :, None, :].to(wide)
    weights = scores.masked_fill(~mask[..., None, :, :], -torch.inf).softmax(dim=-1)
    return torch.einsum("...hts,...sk->...thk", weights.to(v.dtype), v)


class MultiQueryAttention(nn.Module):
    """LayerNorm → causal multi-query attention → Linear, all linear layers without bias."""

    def __init__(self, dim: int, heads: int, init_std: float, alibi: bool):
        super().__init__()
        self.heads, self.head_dim, self.alibi = heads, dim // heads, alibi
        inner = self.heads * self.head_dim
        self.norm = LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * self.head_dim, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        for linear in (self.to_q, self.to_kv, self.to_out):
            nn.init.normal_(linear.weight, std=init_std)

    def forward(
        self, x: Float[Tensor, "*batch T D"], scope: Scope | None = None
    ) -> Float[Tensor, "*batch T D"]:
        """Each position sees itself and everything before it, or what `scope` says."""
        q, k, v = self._project(x)
        if scope is not None:
            return self._attend(q, k, v, *scope)
        if not self.alibi:
            return self._attend(q, k, v, None)
        length = x.shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        return self._attend(q, k, v, mask)

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        cache: KeyValueCache,
        index: Index | Int[Tensor, "B T"],
        scope: Scope | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """Cached version of `forward`: T positions from `index` on attend to `cache`.

        The cache's tensors are written in place, and returned. With a `scope` the positions may be
        any, [B, T].
        """
        q, k, v = self._project(x)
        cache = write_at(cache, KeyValueCache(k, v), index)
        if scope is not None:
            return self._attend(q, *cache, *scope), cache
        stop = cache.keys.shape[1]
        stop = min(index + x.shape[1], stop) if isinstance(index, int) else stop
        position = positions_from(index, x.shape[1], x.device)[..., None]
        mask = torch.arange(stop, device=x.device) <= position
        return self._attend(q, cache.keys[:, :stop], cache.values[:, :stop], mask), cache

    def empty_cache(self, batch: int, length: int, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for `length` positions."""
        shape = (batch, length, self.head_dim)
        device = self.to_kv.weight.device
        return KeyValueCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv"))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm(x)
        q = self.to_q(x).reshape(*x.shape[:-1], self.heads, self.head_dim)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return q, k, v

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        segment_positions: Tensor | None = None,
    ) -> Tensor:
        bias = None
        if self.alibi:
            bias = torch.from_numpy(alibi_bias(self.heads, k.shape[-2])).to(q.device)
            bias = bias if segment_positions is None else bias[:, segment_positions].movedim(0, -2)
        return self.to_out(multi_query_attention(q, k, v, mask, bias).flatten(-2))
