"""Normalisation, computed in at least float32 whatever the compute dtype (float64 stays)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax import forms


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al. 2016) with PyTorch's eps 1e-5.

    The variance is the two-pass one: the fast E[x²] − E[x]² form loses digits at large means.
    """

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        per_channel = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = self.scale[...].reshape(per_channel), self.bias[...].reshape(per_channel)
        return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)

    def linear(
        self, x: Float[Array, "*batch D"], kernel: Float[Array, "D F"], bias: Any = None
    ) -> Float[Array, "*batch F"]:
        """norm(x) @ kernel + bias, with few positions as it stands.

        With many the scale goes into the kernel and the norm's bias through it, so that their
        gradients come from that of the kernel and not from sums over all positions.
        """
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        if not self.folds(len(rows)):
            out = self(rows) @ kernel
            out = out if bias is None else out + bias[None].astype(out.dtype)
        else:
            kernel, bias = self.fold(kernel, bias)
            out = standardized(rows) @ kernel + bias[None].astype(x.dtype)
        return out.reshape(*x.shape[:-1], kernel.shape[1])

    def folds(self, rows: int) -> bool:
        """Whether there are so many rows that folding pays."""
        return rows >= 4 * self.scale.shape[0] and forms.on("fold")

    def fold(
        self, kernel: Float[Array, "D F"], bias: Any = None
    ) -> tuple[Float[Array, "D F"], Float[Array, " F"]]:
        """Kernel and bias that do to `standardized(x)` what the given ones do to the norm of x."""
        wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        added = jnp.sum(wide * self.bias[...][:, None], axis=0)
        added = added if bias is None else added + bias
        return (wide * self.scale[...][:, None]).astype(kernel.dtype), added


def standardized(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """(x − mean) / deviation over the last axis: layer normalisation before scale and bias."""
    return _standardized(x)


@jax.custom_vjp
def _standardized(x: Array) -> Array:
    return _standardized_forward(x)[0]


def _standardized_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    out = (centred * inverse).astype(x.dtype)
    return out, (out, inverse)


def _standardized_backward(residual: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    out, inverse = residual
    wide, gradient = out.astype(inverse.dtype), gradient.astype(inverse.dtype)
    mean = gradient.mean(axis=-1, keepdims=True)
    share = (gradient * wide).mean(axis=-1, keepdims=True)
    return ((inverse * (gradient - mean - wide * share)).astype(out.dtype),)


_standardized.defvjp(_standardized_forward, _standardized_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis (Zhang & Sennrich 2019), eps 1e-5."""

    def __init__(self, dim: int):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        power = jnp.square(wide).mean(axis=-1, keepdims=True)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(power + 1e-5) * scale).astype(x.dtype)
