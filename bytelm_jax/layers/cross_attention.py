"""Cross-attention between bytes and patches, in time and memory linear in the bytes.

Pagnoni et al. 2024 (arXiv 2412.09871), section 3.2.2, as in the published weights. A byte belongs
to one patch, so pooling is a softmax over segments and reading back is a gather: the [N, T] matrix
of the dense form is never materialised.

Axes: B batch, T bytes, N patches, M vectors per patch (`patch_queries`), H heads in G groups of R,
K head width, D width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm_jax.kernels.decode_layer import decode_cross, decode_states
from bytelm_jax.kernels.decode_weights import (
    CrossWeights,
    Heads,
    as_vectors,
    layer_weights,
    product_of,
)
from bytelm_jax.kernels.decoding import attend_once
from bytelm_jax.kernels.low_precision import normalized_linears
from bytelm_jax.kernels.partitioned import by_heads
from bytelm_jax.kernels.segment_sum import ordered_segment_sum
from bytelm_jax.layers.attention import KeyValueCache, join_heads, split_heads
from bytelm_jax.layers.caches import swap_heads
from bytelm_jax.layers.grouped_attention import grouped_attention
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.norm import RMSNorm
from bytelm_jax.layers.segments import segment_max, take_segments


def _pool(
    is_sorted: bool,
    patch_of: Int[Array, "B T"],
    q: Float[Array, "B N M H K"],
    keys: Float[Array, "B T G K"],
    values: Float[Array, "B T G K"],
) -> Float[Array, "B N M H K"]:
    """Attention of each patch's queries to its own bytes."""
    count, groups, width = q.shape[1], *keys.shape[2:]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    near = take_segments(q.reshape(*q.shape[:2], -1), patch_of, is_sorted)
    near = near.reshape(*keys.shape[:2], q.shape[2], groups, -1, width)
    scores = jnp.einsum("btmgrk,btgk->btmgr", near, keys, preferred_element_type=wide)
    scores = scores * width**-0.5
    flat = scores.reshape(*keys.shape[:2], -1)
    most = segment_max(jax.lax.stop_gradient(flat), patch_of, count, is_sorted)
    inside = (patch_of < count)[..., None]
    # The mask goes inside exp: outside, an infinity times a gradient of 0 would be NaN.
    shifted = jnp.where(inside, flat - take_segments(most, patch_of), -jnp.inf)
    weights = jnp.exp(shifted)
    add = partial(ordered_segment_sum, is_sorted=is_sorted, kept=q.dtype)
    total = add(weights, patch_of, count)
    share = weights.reshape(scores.shape)[..., None] * values[:, :, None, :, None, :]
    mixed = add(share.reshape(*keys.shape[:2], -1), patch_of, count)
    mixed = mixed.reshape(*total.shape, width)
    mixed = mixed / jnp.where(total == 0, 1, total)[..., None]  # 0 / 0 in a patch of no bytes
    return mixed.reshape(q.shape).astype(q.dtype)


def _vectors_of(
    read_of: Int[Array, "B T"],
    keys: Float[Array, "B N M G K"],
    values: Float[Array, "B N M G K"],
) -> Float[Array, "B T 2 M G K"]:
    """Keys and values of the patch that each byte reads."""
    # One gather for both: its backward pass, a segment sum, is the expensive part.
    both = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in (keys, values)], axis=-1)
    return take_segments(both, read_of, is_sorted=True).reshape(*read_of.shape, 2, *keys.shape[2:])


class CrossAttention(nnx.Module):
    """Queries x → 2x + attention(norm(x), norm(states)); no rotation, no bias, scale K^-0.5.

    The published layer adds its input and its caller adds it again; both happen here. Values are
    also projected from the normalised states.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, dim // heads
        grouped, init = self.kv_heads * self.head_dim, fan_in_normal(dim)

        def linear(outputs: int) -> nnx.Linear:
            return nnx.Linear(dim, outputs, use_bias=False, kernel_init=init, rngs=rngs)

        self.q_norm = RMSNorm(dim)
        self.k_norm = RMSNorm(dim)
        self.to_q = linear(dim)
        self.to_k = linear(grouped)
        self.to_v = linear(grouped)
        self.to_out = linear(dim)

    def pool_cached(
        self,
        queries: Float[Array, "B N M D"],
        cache: KeyValueCache,
        patch_of: Int[Array, "B T"],
        is_sorted: bool = False,
    ) -> Float[Array, "B N M D"]:
        """The M queries of each patch attend to exactly the bytes of that patch.

        `cache` holds the bytes' keys and values; `patch_of` is N or more for a byte without a
        patch, and `is_sorted` says that it never falls along a row, as `read_of` never does.
        """
        q = self._queries(queries)
        return self._add(queries, by_heads(partial(_pool, is_sorted), patch_of, q, *cache))

    def pool_one(
        self, queries: Float[Array, "B M D"], cache: KeyValueCache, mask: Bool[Array, "B S"]
    ) -> Float[Array, "B M D"]:
        """Version of `pool_cached` for one patch per row; `mask` marks its bytes in `cache`.

        The cache is stored by head, [B, G, S, K].
        """
        keys, values = swap_heads(cache)
        mixed = grouped_attention(self._queries(queries), keys, values, mask[:, None, :])
        return self._add(queries, mixed)

    def read(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B N M D"],
        read_of: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """Each byte attends to the M vectors of one patch, number `read_of`.

        Also gives the patches' keys and values, [B, N, M, G, K].
        """
        cache = self.keys_values(memory)
        near = by_heads(_vectors_of, read_of, *cache)
        q = self._queries(x)[:, :, None]
        mask = jnp.ones((1, memory.shape[2]), bool)
        mixed = grouped_attention(q, near[:, :, 0], near[:, :, 1], mask)[:, :, 0]
        return self._add(x, mixed), cache

    def read_each(self, x: Float[Array, "B T D"], cache: KeyValueCache) -> Float[Array, "B T D"]:
        """Version of `read` given the keys and values of each byte's patch, [B, T, M, G, K]."""
        weights = layer_weights(self, x)
        if weights is not None:
            vectors, keys = as_vectors(cache.keys, self._heads)
            _, values = as_vectors(cache.values, self._heads)
            return decode_cross(x, weights, keys, values, self._heads, vectors)
        q, mask = self._queries(x), jnp.ones((1, 1, cache.keys.shape[2]), bool)
        if x.shape[1] == 1:
            k, v = (part[:, 0] for part in cache)
            return self._add(x, attend_once(q, k, v, mask, grouped_attention))
        return self._add(x, grouped_attention(q[:, :, None], *cache, mask)[:, :, 0])

    def decode_weights(self) -> CrossWeights:
        """The weights of `read_each` and of `keys_values` as sums read them."""
        norm = self.q_norm.as_stored()
        queries, out = product_of(self.to_q), product_of(self.to_out)
        states = product_of(self.to_k, self.to_v)
        return CrossWeights(norm, queries, out, self.k_norm.as_stored(), states)

    @property
    def _heads(self) -> Heads:
        return Heads(self.heads, self.kv_heads, self.head_dim)

    def keys_values(self, states: Float[Array, "*batch D"]) -> KeyValueCache:
        """Keys and values [..., G, K] of bytes or of a patch's vectors."""
        decoded = decode_states(self, states)
        if decoded is not None:
            both = jnp.split(decoded, 2, axis=-1)
            return KeyValueCache(*(split_heads(part, self.head_dim) for part in both))
        keys, values = normalized_linears(self.k_norm, states, self.to_k, self.to_v)
        return KeyValueCache(*(split_heads(part, self.head_dim) for part in (keys, values)))

    def _queries(self, x: Array) -> Array:
        (queries,) = normalized_linears(self.q_norm, x, self.to_q)
        return split_heads(queries, self.head_dim)

    def _add(self, x: Array, mixed: Array) -> Array:
        return x + (x + self.to_out(join_heads(mixed)))
