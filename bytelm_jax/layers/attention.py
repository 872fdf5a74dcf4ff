"""Multi-query causal attention (Shazeer 2019, arXiv 1911.02150) with optional ALiBi.

Axes: B batch, T query positions, S key positions, H heads, K head width, D width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from bytelm.positions import alibi_bias, alibi_slopes
from bytelm_jax.kernels.attention import fused_or_plain
from bytelm_jax.kernels.decoding import attend_once
from bytelm_jax.kernels.low_precision import linear_of_rows, normalized_linears
from bytelm_jax.kernels.patch_attention import patch_attention, suits
from bytelm_jax.layers.caches import Index, positions_from, write_at
from bytelm_jax.layers.initializers import normal
from bytelm_jax.layers.norm import LayerNorm


class KeyValueCache(NamedTuple):
    """Keys and values of one layer's past positions, each [B, S, K]; unwritten rows are zeros."""

    keys: Array
    values: Array


class Scope(NamedTuple):
    """Which keys the queries of each row see, where a row holds several segments."""

    mask: Bool[Array, "B T S"]
    segment_positions: Int[Array, "B S"]
    """The position of each key within its segment, from 0."""


def split_heads(x: Float[Array, "*batch D"], width: int) -> Float[Array, "*batch H K"]:
    """The last axis as heads of that width: as many as this device has, even if x holds nothing."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // width, width)


def join_heads(x: Float[Array, "*batch H K"]) -> Float[Array, "*batch D"]:
    """Undoes `split_heads`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def multi_query_attention(
    q: Float[Array, "*batch T H K"],
    k: Float[Array, "*batch S K"],
    v: Float[Array, "*batch S K"],
    mask: Bool[Array | np.ndarray, "*rows T S"],
    bias: Float[Array | np.ndarray, "*kinds H S"] | None = None,
) -> Float[Array, "*batch T H K"]:
    """Softmax attention in which all heads share one key and one value head; scale K^-0.5.

    `mask` and `bias` may each have a batch axis or not. Scores and softmax are in at least float32.
    A masked key has weight exactly 0, so a changed future changes nothing. Every query must see at
    least one key.
    """
    if suits(q, mask) and (bias is None or bias.ndim == 2):
        return patch_attention(q, k, v, mask, bias)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # The heads axis stays behind the queries axis: products with the shared head need no
    # transposes.
    scores = jnp.einsum("...thk,...sk->...ths", q, k, preferred_element_type=wide)
    scores = scores * q.shape[-1] ** -0.5
    if bias is not None:
        lead = (1,) * (scores.ndim - 1 - bias.ndim) + bias.shape[:-2]
        scores = scores + jnp.asarray(bias).astype(wide).reshape(*lead, 1, *bias.shape[-2:])
    lead = (1,) * (scores.ndim - 1 - mask.ndim) + mask.shape[:-2]
    visible = jnp.asarray(mask).reshape(*lead, mask.shape[-2], 1, mask.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("...ths,...sk->...thk", weights.astype(v.dtype), v)


def _attend_once(q: Array, k: Array, v: Array, mask: Array | np.ndarray) -> Array:
    """`multi_query_attention` of one query a row."""

    def plain(q: Array, k: Array, v: Array, mask: Array | np.ndarray) -> Array:
        return multi_query_attention(q, k[:, :, 0], v[:, :, 0], mask)

    return attend_once(q, k[:, :, None], v[:, :, None], jnp.asarray(mask)[..., :, :], plain)


class MultiQueryAttention(nnx.Module):
    """LayerNorm → causal multi-query attention → Linear, all linear layers without bias."""

    def __init__(self, dim: int, heads: int, init_std: float, alibi: bool, *, rngs: nnx.Rngs):
        self.heads, self.head_dim, self.alibi = heads, dim // heads, alibi
        init = normal(init_std)
        inner = self.heads * self.head_dim

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)

        self.norm = LayerNorm(dim)
        self.to_q = linear(dim, inner)
        self.to_kv = linear(dim, 2 * self.head_dim)
        self.to_out = linear(inner, dim)

    def __call__(
        self, x: Float[Array, "*batch T D"], scope: Scope | None = None
    ) -> Float[Array, "*batch T D"]:
        """Each position sees itself and everything before it, or what `scope` says."""
        q, k, v = self._project(x)
        if scope is not None:
            return self._attend(q, k, v, *scope)
        mask = np.tri(x.shape[-2], dtype=bool)
        if x.ndim != 3:
            return self._attend(q, k, v, mask)
        plain = lambda: multi_query_attention(q, k, v, mask, self._bias(q, k))  # noqa: E731
        slopes = alibi_slopes(q.shape[-2]) if self.alibi else None
        return self._back(fused_or_plain(q, k[:, :, None], v[:, :, None], 0, plain, slopes))

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: KeyValueCache,
        index: Index | Int[Array, "B T"],
        scope: Scope | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """Cached version of `__call__`: T positions from `index` on attend to `cache`.

        Also gives `cache` with their keys and values written. With a `scope` the positions may be
        any, [B, T].
        """
        q, k, v = self._project(x)
        cache = write_at(cache, KeyValueCache(k, v), index)
        if scope is not None:
            return self._attend(q, *cache, *scope), cache
        positions = positions_from(jnp.asarray(index).reshape(-1), x.shape[1])
        mask = jnp.arange(cache.keys.shape[1])[None, None, :] <= positions[:, :, None]
        return self._attend(q, *cache, mask), cache

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> KeyValueCache:
        """An empty cache for `length` positions."""
        empty = jnp.zeros((batch, length, self.head_dim), dtype)
        return KeyValueCache(empty, empty)

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        q, both = normalized_linears(self.norm, x, self.to_q, self.to_kv)
        k, v = jnp.split(both, 2, axis=-1)
        return split_heads(q, self.head_dim), k, v

    def _attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        mask: Array | np.ndarray,
        segment_positions: Array | None = None,
    ) -> Array:
        bias: Any = self._bias(q, k)
        if bias is not None and segment_positions is not None:
            bias = jnp.moveaxis(jnp.asarray(bias)[:, segment_positions], 0, -2)
        if q.shape[-3] == 1 and q.ndim == 4 and bias is None:
            return self._back(_attend_once(q, k, v, mask))
        return self._back(multi_query_attention(q, k, v, mask, bias))

    def _bias(self, q: Array, k: Array) -> np.ndarray | None:
        return alibi_bias(q.shape[-2], k.shape[-2]) if self.alibi else None

    def _back(self, out: Array) -> Array:
        """[..., T, H, K] → [..., T, D]."""
        return linear_of_rows(self.to_out, join_heads(out))
