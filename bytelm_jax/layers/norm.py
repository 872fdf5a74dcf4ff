"""Normalisation, computed in at least float32 whatever the compute dtype."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.kernels.decode_weights import Normalization
from bytelm_jax.kernels.normalization import EPSILON, rescale, standardize


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis (Ba et al. 2016) with PyTorch's eps 1e-5."""

    centred: ClassVar[bool] = True

    def __init__(self, dim: int):
        self.epsilon = EPSILON
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        per_channel = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = self.scale[...].reshape(per_channel), self.bias[...].reshape(per_channel)
        values, _ = standardize(x)
        return (values * scale + bias).astype(x.dtype)

    def as_stored(self) -> Normalization:
        """The weights as decoding by sums reads them."""
        return Normalization(self.scale[...], self.bias[...])


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis (Zhang & Sennrich 2019).

    `epsilon` is added to the mean square.
    """

    centred: ClassVar[bool] = False

    def __init__(self, dim: int, epsilon: float = EPSILON):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        values, _ = rescale(x, self.epsilon)
        return (values * scale).astype(x.dtype)

    def as_stored(self) -> Normalization:
        """The weights as decoding by sums reads them."""
        return Normalization(self.scale[...], None)
