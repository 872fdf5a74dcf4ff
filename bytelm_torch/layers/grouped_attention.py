"""Causal self-attention with grouped heads, rotary positions and an optional window.

Axes: B batch, T query positions, S key positions, C chunks, H heads in G groups of R, K head
width, D width. Groups share a key and value head (Ainslie et al. 2023, arXiv 2305.13245).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.config.block import PAPER, BlockConfig
from bytelm.config.blt import GUIDE_FEATURES
from bytelm_torch.layers.attention import KeyValueCache, fused_attention
from bytelm_torch.layers.caches import (
    Index,
    positions_from,
    read_heads_at,
    swap_heads,
    take_at,
    write_heads_at,
)
from bytelm_torch.layers.initializers import fan_in_normal
from bytelm_torch.layers.norm import RMSNorm
from bytelm_torch.layers.rotary import Rotation, rotate


def grouped_attention(
    q: Float[Tensor, "*batch T H J"],
    k: Float[Tensor, "*batch S G J"],
    v: Float[Tensor, "*batch S G K"],
    mask: Bool[Tensor, "*lead #T S"] | None,
) -> Float[Tensor, "*batch T H K"]:
    """Softmax attention; scale K^-0.5, scores and softmax in at least float32.

    Heads gR … gR + R − 1 use key head g. J is K unless `guide` has added features. The axes of
    `mask` before S are those of q, or 1; leading ones may be missing; no mask is a causal one. A
    masked key has weight exactly 0, so a changed future changes nothing. Every query must see at
    least one key.
    """
    return fused_attention(q, k, v, mask)


def guide(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    patch_entropy: Float[Tensor, "B T"],
    gamma: Float[Tensor, " H"],
    beta: Float[Tensor, " H"],
) -> tuple[Float[Tensor, "B T H J"], Float[Tensor, "B T G J"]]:
    """Queries and keys whose scores are (1 + γ_h e_i) q_i·k_j / √K + β_h e_j, e the entropy.

    β_h e_j is an additional feature of the key, so any attention kernel can be used; J = K + 8
    keeps the width a multiple of 8 if K is one.
    """
    entropy = patch_entropy[:, :, None, None].to(q.dtype)
    tilt = (beta * q.shape[-1] ** 0.5).to(q.dtype)[:, None]
    q_more = F.pad(tilt.expand(*q.shape[:-1], 1), (0, GUIDE_FEATURES - 1))
    k_more = F.pad(entropy.expand(*k.shape[:-1], 1), (0, GUIDE_FEATURES - 1))
    q = q * (1 + gamma.to(q.dtype)[:, None] * entropy)
    return torch.cat([q, q_more], dim=-1), torch.cat([k, k_more], dim=-1)


def causal_attention(
    q: Float[Tensor, "B T H J"],
    k: Float[Tensor, "B T G J"],
    v: Float[Tensor, "B T G K"],
    window: int,
    segment_starts: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H K"]:
    """Each position sees itself and the `window` − 1 before it; all before it if `window=0`.

    It sees nothing before `segment_starts`, the first position of its segment. With a window,
    memory is linear in T: the text is cut into chunks of `window` positions, and a chunk sees the
    chunk before it and itself.
    """
    length, device = q.shape[1], q.device
    if window == 0 or length <= window:
        mask = None
        if segment_starts is not None:
            mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            mask = mask & (torch.arange(length, device=device) >= segment_starts[:, :, None])
        return grouped_attention(q, k, v, mask)
    count = -(-length // window)
    q, k, v = (_chunks(x, count, window) for x in (q, k, v))
    keys, values = (torch.cat([_chunk_before(x), x], dim=2) for x in (k, v))
    slots = torch.arange(2 * window, device=device)
    ahead = slots[None, :] - slots[:window, None]
    band = (ahead > 0) & (ahead <= window)
    real = (torch.arange(count, device=device) > 0)[:, None] | (slots >= window)[None, :]
    mask = band[None] & real[:, None]
    if segment_starts is not None:
        starts = F.pad(segment_starts, (0, count * window - length)).reshape(-1, count, window, 1)
        ahead = torch.arange(count, device=device)[:, None] * window + slots - window
        mask = mask & (ahead[:, None, :] >= starts)
    out = grouped_attention(q, keys, values, mask)
    return out.flatten(1, 2)[:, :length]


def _chunks(x: Tensor, count: int, window: int) -> Tensor:
    """[B, T, H, K] → [B, C, window, H, K], padded with zeros at the end."""
    padded = F.pad(x, (0, 0, 0, 0, 0, count * window - x.shape[1]))
    return padded.unflatten(1, (count, window))


def _chunk_before(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]


class GroupedAttention(nn.Module):
    """RMSNorm → causal attention → Linear, all linear layers without bias; K = D / heads.

    `guided` adds γ and β per head, initially 0, by which `patch_entropy` guides it (`guide`).
    `block` may set K, give biases, normalise queries and keys, and put the norm at the end.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        window: int,
        guided: bool = False,
        block: BlockConfig = PAPER,
    ):
        super().__init__()
        self.guided = guided
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim, self.window = block.head_width(dim, heads), window
        inner, grouped = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biased = block.bias != "none"
        self.norm, self.normed = RMSNorm(dim, block.norm_eps), block.norm
        self.to_q = nn.Linear(dim, inner, bias=biased)
        self.to_k = nn.Linear(dim, grouped, bias=biased)
        self.to_v = nn.Linear(dim, grouped, bias=biased)
        self.to_out = nn.Linear(inner, dim, bias=block.bias == "all")
        for linear in (self.to_q, self.to_k, self.to_v, self.to_out):
            fan_in_normal(linear.in_features)(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        self.qk_norm = block.qk_norm
        if block.qk_norm != "none":
            by_head = block.qk_norm == "head"
            self.q_norm = RMSNorm(self.head_dim if by_head else inner, block.norm_eps)
            self.k_norm = RMSNorm(self.head_dim if by_head else grouped, block.norm_eps)
        if guided:
            self.gamma = nn.Parameter(torch.zeros(heads))
            self.beta = nn.Parameter(torch.zeros(heads))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: Rotation | None,
        patch_entropy: Float[Tensor, "B T"] | None = None,
        segment_starts: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """The output, and the (rotated) keys and the values, [B, T, G, K]."""
        q, k, v = self._project(x, rope, patch_entropy)
        return self._out(causal_attention(q, k, v, self.window, segment_starts)), KeyValueCache(
            k, v
        )

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        rope: Rotation | None,
        cache: KeyValueCache,
        index: Index,
        segment_starts: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """Cached version of `forward` for T positions of each row, from `index` on.

        The cache's tensors, [B, G, S, K], are written in place, and returned.
        """
        q, k, v = self._project(x, rope)
        cache = write_heads_at(cache, KeyValueCache(k, v), index)
        count, size = x.shape[1], cache.keys.shape[2]
        seen = min(self.window + count - 1 if self.window else size, size)
        if isinstance(index, int):
            stop = min(index + count, size)
            first = max(stop - seen, 0)
            seen = stop - first
        else:
            first = (index + count - seen).clamp(0, size - seen)
        near = swap_heads(read_heads_at(cache, first, seen) if seen < size else cache)
        slots = positions_from(first, seen, x.device)[:, None, :]
        # Those past the end see what the last one sees: nobody reads them, but they are finite.
        positions = positions_from(index, count, x.device)[:, :, None].clamp(max=size - 1)
        mask = slots <= positions
        if self.window:
            mask = mask & (slots > positions - self.window)
        if segment_starts is not None:
            mask = mask & (slots >= segment_starts[:, :, None].clamp(max=size - 1))
        return self._out(grouped_attention(q, near.keys, near.values, mask)), cache

    def extend_rows(
        self,
        x: Float[Tensor, "B T D"],
        rope: Rotation | None,
        cache: KeyValueCache,
        index: Int[Tensor, " B"],
        patch_entropy: Float[Tensor, "B T"] | None = None,
        segment_starts: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """Version of `extend`, without a window, that leaves the cache as it is.

        Gives the new keys and values [B, T, G, K]: the caller decides which of them are written.
        """
        q, k, v = self._project(x, rope, patch_entropy)
        cache = swap_heads(cache)
        count, size = x.shape[1], cache.keys.shape[1]
        slots = torch.arange(size, device=x.device)[None, :]
        number = slots - index[:, None]  # of the new entry that belongs there, if one does
        is_new = ((number >= 0) & (number < count))[:, :, None, None]
        number = number.clamp(0, count - 1)

        def insert(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(is_new, new if count == 1 else take_at(new, number), old)

        mask = slots[:, None, :] <= positions_from(index, count)[:, :, None]
        if segment_starts is not None:
            mask = mask & (slots[:, None, :] >= segment_starts[:, :, None])
        mixed = grouped_attention(q, insert(k, cache.keys), insert(v, cache.values), mask)
        return self._out(mixed), KeyValueCache(k, v)

    def empty_cache(self, batch: int, length: int, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for `length` positions, [B, G, S, K]."""
        shape, device = (batch, self.kv_heads, length), self.to_q.weight.device
        widths = (self.head_dim + GUIDE_FEATURES * self.guided, self.head_dim)
        return KeyValueCache(
            *(torch.zeros((*shape, width), dtype=dtype, device=device) for width in widths)
        )

    def _project(
        self, x: Tensor, rope: Rotation | None, patch_entropy: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x if self.normed == "after" else self.norm(x)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k, v = (part.unflatten(-1, (self.kv_heads, self.head_dim)) for part in (k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if patch_entropy is not None:
            q, k = guide(q, k, patch_entropy, self.gamma, self.beta)
        return q, k, v

    def _out(self, x: Tensor) -> Tensor:
        out = self.to_out(x.flatten(-2))
        return self.norm(out) if self.normed == "after" else out
