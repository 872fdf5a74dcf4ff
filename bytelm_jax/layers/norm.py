"""Normalisation, computed in at least float32 whatever the compute dtype (float64 stays)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

EPSILON = 1e-5
"""What is added to the variance: PyTorch's default."""


def standardize(
    x: Float[Array, "*batch D"],
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch 1"]]:
    """(x − mean) / deviation over the last axis and 1 / deviation, both in at least float32.

    The variance is the two-pass one: the fast E[x²] − E[x]² form loses digits at large means.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + EPSILON)
    return centred * inverse, inverse


def rescale(
    x: Float[Array, "*batch D"],
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch 1"]]:
    """x / root mean square over the last axis and 1 / that root, both in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + EPSILON)
    return wide * inverse, inverse


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al. 2016) with PyTorch's eps 1e-5."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        per_channel = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = self.scale[...].reshape(per_channel), self.bias[...].reshape(per_channel)
        values, _ = standardize(x)
        return (values * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis (Zhang & Sennrich 2019), eps 1e-5."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        values, _ = rescale(x)
        return (values * scale).astype(x.dtype)
