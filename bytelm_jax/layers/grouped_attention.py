"""Causal self-attention with grouped heads, rotary positions and an optional window.

Axes: B batch, T query positions, S key positions, C chunks, H heads in G groups of R, K head
width, D width. Groups share a key and value head (Ainslie et al. 2023, arXiv 2305.13245).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.config.block import PAPER, BlockConfig
from bytelm.config.blt import GUIDE_FEATURES
from bytelm_jax.kernels.attention import fused_or_plain
from bytelm_jax.kernels.decoding import attend_once
from bytelm_jax.kernels.low_precision import linear_of_rows, normalized_linears
from bytelm_jax.layers.attention import KeyValueCache, join_heads, split_heads
from bytelm_jax.layers.caches import (
    positions_from,
    read_heads_at,
    swap_heads,
    take_at,
    write_heads_at,
)
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.norm import RMSNorm
from bytelm_jax.layers.rotary import Rotation, rotate


def grouped_attention(
    q: Float[Array, "*batch T H J"],
    k: Float[Array, "*batch S G J"],
    v: Float[Array, "*batch S G K"],
    mask: Bool[Array | np.ndarray, "*lead #T S"],
) -> Float[Array, "*batch T H K"]:
    """Softmax attention; scale K^-0.5, scores and softmax in at least float32.

    Heads gR … gR + R − 1 use key head g. J is K unless `guide` has added features. The axes of
    `mask` before S are those of q, or 1; leading ones may be missing. A masked key has weight
    exactly 0, so a changed future changes nothing. Every query must see at least one key.
    """
    groups, wide = k.shape[-2], jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(*q.shape[:-2], groups, q.shape[-2] // groups, q.shape[-1])
    scores = jnp.einsum("...tgrk,...sgk->...grts", grouped, k, preferred_element_type=wide)
    lead = (1,) * (q.ndim - 1 - mask.ndim) + mask.shape[:-2]
    visible = jnp.asarray(mask).reshape(*lead, 1, 1, *mask.shape[-2:])
    scores = jnp.where(visible, scores * v.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...grts,...sgk->...tgrk", weights, v).reshape(*q.shape[:-1], v.shape[-1])


def guide(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    patch_entropy: Float[Array, "B T"],
    gamma: Float[Array, " H"],
    beta: Float[Array, " H"],
) -> tuple[Float[Array, "B T H J"], Float[Array, "B T G J"]]:
    """Queries and keys whose scores are (1 + γ_h e_i) q_i·k_j / √K + β_h e_j, e the entropy.

    β_h e_j is an additional feature of the key, so any attention kernel can be used; J = K + 8
    keeps the width a multiple of 8 if K is one.
    """
    entropy = patch_entropy[:, :, None, None].astype(q.dtype)
    tilt = (beta * q.shape[-1] ** 0.5).astype(q.dtype)[None, None, :, None]
    more = ((0, 0),) * 3 + ((0, GUIDE_FEATURES - 1),)
    q_more = jnp.pad(jnp.broadcast_to(tilt, (*q.shape[:-1], 1)), more)
    k_more = jnp.pad(jnp.broadcast_to(entropy, (*k.shape[:-1], 1)), more)
    q = q * (1 + gamma.astype(q.dtype)[None, None, :, None] * entropy)
    return jnp.concatenate([q, q_more], axis=-1), jnp.concatenate([k, k_more], axis=-1)


def causal_attention(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T G J"],
    v: Float[Array, "B T G K"],
    window: int,
    segment_starts: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H K"]:
    """Each position sees itself and the `window` − 1 before it; all before it if `window=0`.

    It sees nothing before `segment_starts`, the first position of its segment. With a window,
    memory is linear in T: the text is cut into chunks of `window` positions, and a chunk sees the
    chunk before it and itself.
    """
    plain = lambda: _written_out(q, k, v, window, segment_starts)  # noqa: E731
    return plain() if segment_starts is not None else fused_or_plain(q, k, v, window, plain)


def _written_out(
    q: Array, k: Array, v: Array, window: int, segment_starts: Array | None
) -> Float[Array, "B T H K"]:
    length = q.shape[1]
    if window == 0 or length <= window:
        mask = np.tri(length, dtype=bool)
        if segment_starts is not None:
            mask = mask[None] & (jnp.arange(length)[None, None, :] >= segment_starts[:, :, None])
        return grouped_attention(q, k, v, mask)
    count = -(-length // window)
    q, k, v = (_chunks(x, count, window) for x in (q, k, v))
    keys, values = (jnp.concatenate([_chunk_before(x), x], axis=2) for x in (k, v))
    ahead = np.arange(2 * window)[None, :] - np.arange(window)[:, None]
    band = (ahead > 0) & (ahead <= window)
    real = (np.arange(count) > 0)[:, None] | (np.arange(2 * window) >= window)[None, :]
    mask = (band[None] & real[:, None])[None]
    if segment_starts is not None:
        starts = jnp.pad(segment_starts, ((0, 0), (0, count * window - length)))
        starts = starts.reshape(starts.shape[0], count, window, 1)
        slots = np.arange(count)[:, None] * window + np.arange(-window, window)[None, :]
        mask = mask & (slots[None, :, None, :] >= starts)
    out = grouped_attention(q, keys, values, mask)
    return out.reshape(out.shape[0], count * window, *out.shape[3:])[:, :length]


def _chunks(x: Array, count: int, window: int) -> Array:
    """[B, T, H, K] → [B, C, window, H, K], padded with zeros at the end."""
    padded = jnp.pad(x, ((0, 0), (0, count * window - x.shape[1]), (0, 0), (0, 0)))
    return padded.reshape(x.shape[0], count, window, *x.shape[2:])


def _chunk_before(x: Array) -> Array:
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1]


def _attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """`grouped_attention`, by fewer kernels where there is one query a row."""
    if q.shape[1] == 1:
        return attend_once(q, k, v, mask, grouped_attention)
    return grouped_attention(q, k, v, mask)


class GroupedAttention(nnx.Module):
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
        *,
        rngs: nnx.Rngs,
    ):
        self.guided = guided
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim, self.window = block.head_width(dim, heads), window
        inner, grouped = self.heads * self.head_dim, self.kv_heads * self.head_dim

        def linear(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            init = fan_in_normal(inputs)
            return nnx.Linear(inputs, outputs, use_bias=bias, kernel_init=init, rngs=rngs)

        biased = block.bias != "none"
        self.norm, self.normed = RMSNorm(dim, block.norm_eps), block.norm
        self.to_q = linear(dim, inner, biased)
        self.to_k = linear(dim, grouped, biased)
        self.to_v = linear(dim, grouped, biased)
        self.to_out = linear(inner, dim, block.bias == "all")
        self.qk_norm = block.qk_norm
        if block.qk_norm != "none":
            by_head = block.qk_norm == "head"
            self.q_norm = RMSNorm(self.head_dim if by_head else inner, block.norm_eps)
            self.k_norm = RMSNorm(self.head_dim if by_head else grouped, block.norm_eps)
        if guided:
            self.gamma = nnx.Param(jnp.zeros((heads,), jnp.float32))
            self.beta = nnx.Param(jnp.zeros((heads,), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rotation | None,
        patch_entropy: Float[Array, "B T"] | None = None,
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """The output, and the (rotated) keys and the values, [B, T, G, K]."""
        q, k, v = self._project(x, rope, patch_entropy)
        return self._out(causal_attention(q, k, v, self.window, segment_starts)), KeyValueCache(
            k, v
        )

    def extend(
        self,
        x: Float[Array, "B T D"],
        rope: Rotation | None,
        cache: KeyValueCache,
        index: Int[Array, " B"],
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """Cached version of `__call__` for T positions of each row, from `index` on.

        Also gives `cache`, [B, G, S, K], with the new keys and values written.
        """
        q, k, v = self._project(x, rope)
        cache = write_heads_at(cache, KeyValueCache(k, v), index)
        count, size = x.shape[1], cache.keys.shape[2]
        seen = min(self.window + count - 1 if self.window else size, size)
        first, near = jnp.zeros_like(index), cache
        if seen < size:
            first = jnp.clip(index + count - seen, 0, size - seen)
            near = read_heads_at(cache, first, seen)
        near = swap_heads(near)
        slots = positions_from(first, seen)[:, None, :]
        # Those past the end see what the last one sees: nobody reads them, but they are finite.
        positions = jnp.minimum(positions_from(index, count), size - 1)[:, :, None]
        mask = slots <= positions
        if self.window:
            mask = mask & (slots > positions - self.window)
        if segment_starts is not None:
            mask = mask & (slots >= jnp.minimum(segment_starts, size - 1)[:, :, None])
        return self._out(_attend(q, near.keys, near.values, mask)), cache

    def extend_rows(
        self,
        x: Float[Array, "B T D"],
        rope: Rotation | None,
        cache: KeyValueCache,
        index: Int[Array, " B"],
        patch_entropy: Float[Array, "B T"] | None = None,
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """Version of `extend`, without a window, that leaves the cache as it is.

        Gives the new keys and values [B, T, G, K]: the caller decides which of them are written.
        """
        q, k, v = self._project(x, rope, patch_entropy)
        cache = swap_heads(cache)
        slots = jnp.arange(cache.keys.shape[1])[None, :]
        number = slots - index[:, None]  # of the new entry that belongs there, if one does
        is_new = ((number >= 0) & (number < x.shape[1]))[:, :, None, None]
        number = jnp.clip(number, 0, x.shape[1] - 1)

        def insert(new: Array, old: Array) -> Array:
            return jnp.where(is_new, new if x.shape[1] == 1 else take_at(new, number), old)

        mask = slots[:, None, :] <= positions_from(index, x.shape[1])[:, :, None]
        if segment_starts is not None:
            mask = mask & (slots[:, None, :] >= segment_starts[:, :, None])
        mixed = _attend(q, insert(k, cache.keys), insert(v, cache.values), mask)
        return self._out(mixed), KeyValueCache(k, v)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> KeyValueCache:
        """An empty cache for `length` positions, [B, G, S, K]."""
        shape = (batch, self.kv_heads, length)
        keys = jnp.zeros((*shape, self.head_dim + GUIDE_FEATURES * self.guided), dtype)
        return KeyValueCache(keys, jnp.zeros((*shape, self.head_dim), dtype))

    def _project(
        self, x: Array, rope: Rotation | None, patch_entropy: Array | None = None
    ) -> tuple[Array, Array, Array]:
        linears = (self.to_q, self.to_k, self.to_v)
        if self.normed == "after":
            projected = tuple(linear_of_rows(linear, x) for linear in linears)
        else:
            projected = normalized_linears(self.norm, x, *linears)
        if self.qk_norm == "projection":
            projected = (self.q_norm(projected[0]), self.k_norm(projected[1]), projected[2])
        q, k, v = (split_heads(part, self.head_dim) for part in projected)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if patch_entropy is not None:
            q, k = guide(q, k, patch_entropy, self.gamma[...], self.beta[...])
        return q, k, v

    def _out(self, x: Array) -> Array:
        out = self.to_out(join_heads(x))
        return self.norm(out) if self.normed == "after" else out
