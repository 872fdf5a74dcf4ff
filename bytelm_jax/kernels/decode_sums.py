"""Products of a few rows and attention of one position by XLA's sums alone: nothing but reductions.

A product with one row is a sum along the axis in which the weights [N, K] lie. XLA fuses into a
sum what comes before it, but after it no more than a conversion. So what a norm needs of a row are
further sums of the same reduction, written as further outputs, and the residual is added to a
product's first term. Both are then part of the kernel that reads the weights.

Axes: M rows, K inputs, N outputs, S positions of a cache, H heads in G groups of R, W head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.decode_weights import Columns, Heads, Normalization, Product
from bytelm_jax.kernels.normalization import EPSILON


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def linear(
    x: Float[Array, "M K"],
    product: Product,
    norm: Normalization | None = None,
    activation: str = "",
    residual: Float[Array, "M N"] | None = None,
    times: int = 1,
    dtype: Any = None,
) -> Float[Array, "M _"]:
    """act(norm(x) Wᵀ + b) + `times` · `residual`."""
    dtype, weight, count = dtype or x.dtype, _wide(product.weight), product.weight.shape[0]
    if norm is not None:
        out = _normalized_product(_wide(x), weight, product, norm)
    else:
        terms, more = weight[None] * _wide(x)[:, None], 0
        if residual is not None:
            more = more + times * _wide(residual)[:, :, None]
        if product.bias is not None:
            more = more + _wide(product.bias)[None, :, None]
        is_first = (np.arange(x.shape[1]) == 0)[None, None]
        out = jnp.where(is_first, terms + more, terms).sum(axis=-1)
    if activation == "gelu":
        out = 0.5 * out * (1 + jax.lax.erf(out * 0.5**0.5))
    if activation == "silu":
        out = jax.nn.silu(out[:, : count // 2]) * out[:, count // 2 :]
    out = out.astype(dtype)
    # A kernel ends where the residual is: XLA may otherwise write the next product's terms.
    return out if residual is None else jax.lax.optimization_barrier(out)


def _normalized_product(
    x: Float[Array, "M K"], weight: Float[Array, "N K"], product: Product, norm: Normalization
) -> Float[Array, "M N"]:
    count, width = weight.shape
    # From the first element on, not from 0: sums of squares would lose digits at large means.
    x = x - x[:, :1] if norm.bias is not None else x
    more = jnp.pad(weight, ((0, 2), (0, 0)))[None]
    output = np.arange(count + 2)[None, :, None]
    terms = more * (x * _wide(norm.scale)[None])[:, None]
    terms = jnp.where(output == count, x[:, None], terms)
    terms = jnp.where(output == count + 1, jnp.square(x)[:, None], terms)
    sums = terms.sum(axis=-1)
    out, mean, square = sums[:, :count], sums[:, count, None] / width, sums[:, count + 1, None]
    if norm.bias is None:
        return out * jax.lax.rsqrt(square / width + EPSILON)
    inverse = jax.lax.rsqrt(square / width - jnp.square(mean) + EPSILON)
    assert product.scaled is not None and product.shifted is not None
    return inverse * (out - mean * product.scaled[None]) + product.shifted[None]


def attend(
    projected: Float[Array, "M N"],
    keys: Columns,
    values: Columns,
    index: int | Int[Array, " M"],
    first: Int[Array, " M"],
    rope: tuple[Array, Array] | None,
    heads: Heads,
    write: bool,
    window: int = 0,
) -> tuple[Float[Array, "M D"], Array, Array]:
    """Attention of one new position a row, number `index`, to those from `first` on.

    Gives the caches with the new key and value written; these alone, [M, GW], unless `write`.
    With a window no more than it is read.
    """
    rows, length = len(projected), keys.array.shape[2]
    parts = projected.reshape(rows, -1, heads.width)
    q, k, v = jnp.split(parts, [heads.heads, heads.heads + heads.groups], axis=1)
    if rope is not None:
        q, k = _rotate(q, rope), _rotate(k, rope)
    if write:
        keys, values = (_written(c, x, index) for c, x in ((keys, k), (values, v)))
        new = keys.array, values.array
    else:
        new = k.reshape(rows, -1), v.reshape(rows, -1)
    index = jnp.broadcast_to(jnp.asarray(index, jnp.int32), (rows,))
    start, near = jnp.zeros_like(index), [_part(cache, heads.groups) for cache in (keys, values)]
    if 0 < window < length:
        start = jnp.clip(index + 1 - window, 0, length - window)
        near = [_read(part, start, window) for part in near]
    slots = start[:, None] + jnp.arange(near[0].shape[2])[None]
    if not write:
        here = (slots == index[:, None])[:, None, :, None]
        near = [jnp.where(here, x[:, :, None], old) for x, old in zip((k, v), near, strict=True)]
    # A row past the end of its cache sees the last position: nobody reads it, but it is finite.
    last = jnp.minimum(index, length - 1)[:, None]
    seen = (slots >= jnp.minimum(first[:, None], last)) & (slots <= last)
    mixed = _mix(q, near[0], near[1], seen).reshape(rows, -1).astype(projected.dtype)
    return jax.lax.optimization_barrier(mixed), *new


def _written(cache: Columns, new: Array, index: int | Array) -> Columns:
    if isinstance(index, int):
        array = jax.lax.dynamic_update_slice_in_dim(cache.array, new[:, :, None], index, axis=2)
        return cache._replace(array=array)
    # Element by element: of a single one XLA would read and select the old before it writes.
    row, group, lane = np.ogrid[: new.shape[0], : new.shape[1], : new.shape[2]]
    at = (row, group, index[:, None, None], lane)
    return cache._replace(array=cache.array.at[at].set(new, mode="drop"))


def _part(cache: Columns, groups: int) -> Array:
    return jax.lax.slice_in_dim(cache.array, cache.start, cache.start + groups, axis=1)


def _read(part: Array, start: Array, count: int) -> Array:
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, count, axis=1))(
        part, start
    )


def _mix(
    q: Float[Array, "M H W"],
    k: Float[Array, "M G S W"],
    v: Float[Array, "M G S W"],
    seen: Any,
) -> Float[Array, "M G R W"]:
    """Softmax attention of one query a row, by two sums around a softmax."""
    rows, groups, width = len(q), k.shape[1], q.shape[2]
    queries = _wide(q).reshape(rows, groups, -1, 1, width)
    scores = (queries * _wide(k)[:, :, None]).sum(axis=-1) * width**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return (weights[..., None] * _wide(v)[:, :, None]).sum(axis=-2)


def _rotate(x: Float[Array, "M H W"], rope: tuple[Array, Array]) -> Float[Array, "M H W"]:
    even, wide = (jnp.arange(x.shape[2]) % 2 == 0)[None, None], x.astype(rope[0].dtype)
    partner = jnp.where(even, jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    cos, sin = (jnp.repeat(part, 2, axis=-1)[:, None] for part in rope)
    return (wide * cos + partner * jnp.where(even, -sin, sin)).astype(x.dtype)


def query_and_read(
    x: Float[Array, "M D"],
    norm: Normalization,
    projection: Product,
    keys: Columns,
    values: Columns,
    heads: Heads,
    vectors: int,
) -> Float[Array, "M D"]:
    """Attention of each row to a few vectors of its own."""
    q = linear(x, projection, norm).reshape(len(x), heads.heads, heads.width)
    k, v = (
        jax.lax.slice_in_dim(c.array, c.start, c.start + c.count, axis=1)
        .reshape(len(x), vectors, heads.groups, heads.width)
        .swapaxes(1, 2)
        for c in (keys, values)
    )
    return _mix(q, k, v, jnp.ones((1, vectors), bool)).reshape(len(x), -1).astype(x.dtype)
