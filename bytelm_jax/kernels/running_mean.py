"""Running means over positions: by a scan, or in 16-bit dtypes by triangular products.

Axes: B batch, T positions, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.backend import backend
from bytelm_jax.kernels.dtypes import is_low_precision

_CHUNK = 64
"""Positions that one product of `_running_sums` adds up."""


def prefix_mean(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Mean over all positions up to each one, summed in at least float32."""
    if is_low_precision(x) and backend() != "cpu":
        return mean_by_products(x)
    return mean_by_sums(x)


def mean_by_sums(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The running mean by a scan."""
    sums = jnp.cumsum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis=1)
    return (sums / prefix_counts(0, x.shape[1], sums.dtype)).astype(x.dtype)


@jax.custom_vjp
def mean_by_products(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The running mean in 16-bit dtypes by triangular products, which accumulate in float32."""
    sums = _running_sums(x, backward=False)
    return (sums / prefix_counts(0, x.shape[1], sums.dtype)).astype(x.dtype)


def _mean_forward(x: Array) -> tuple[Array, None]:
    return mean_by_products(x), None


def _mean_backward(_: None, gradient: Array) -> tuple[Array]:
    shares = gradient / prefix_counts(0, gradient.shape[1], jnp.dtype("float32"))
    sums = _running_sums(shares.astype(gradient.dtype), backward=True)
    return (sums.astype(gradient.dtype),)


mean_by_products.defvjp(_mean_forward, _mean_backward)


def _running_sums(x: Float[Array, "B T D"], backward: bool) -> Float[Array, "B T D"]:
    """Sums up to each position, or from it on if `backward`, in float32."""
    batch, length, dim = x.shape
    count = -(-length // _CHUNK)
    blocks = jnp.pad(x, ((0, 0), (0, count * _CHUNK - length), (0, 0)))
    blocks = blocks.reshape(batch * count, _CHUNK, dim)
    triangle = np.tri(_CHUNK).T if backward else np.tri(_CHUNK)
    # One matrix per block: a product that shares a matrix would have its result transposed.
    triangle = jnp.broadcast_to(jnp.asarray(triangle, x.dtype)[None], (len(blocks), _CHUNK, _CHUNK))
    inside = jnp.einsum("nts,nsd->ntd", triangle, blocks, preferred_element_type=jnp.float32)
    inside = inside.reshape(batch, count, _CHUNK, dim)
    whole = inside[:, :, 0 if backward else -1]
    before = jnp.cumsum(whole[:, ::-1] if backward else whole, axis=1)[:, :-1]
    before = jnp.pad(before, ((0, 0), (1, 0), (0, 0)))
    before = before[:, ::-1] if backward else before
    return (inside + before[:, :, None]).reshape(batch, -1, dim)[:, :length]


def prefix_counts(
    start: int | Int[Array, ""], count: int, dtype: jnp.dtype
) -> Float[Array, "1 {count} 1"]:
    """The number of positions in each mean."""
    return (start + 1 + jnp.arange(count)).astype(dtype).reshape(1, -1, 1)
