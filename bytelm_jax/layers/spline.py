"""Learned activations: a weighted SiLU plus a cubic B-spline in each channel.

Liu et al. 2024, arXiv 2404.19756, section 2.2, inside a feed-forward layer. Axes: B batch, T
positions, D width, F channels.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bytelm.config.blt import SPLINE_BASES, SPLINE_INTERVALS
from bytelm_jax.kernels.spline import spline_activation
from bytelm_jax.layers.initializers import fan_in_normal, normal
from bytelm_jax.layers.norm import RMSNorm


class Spline(nnx.Module):
    """One learned activation per channel; starts as SiLU with a small random spline."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        init = normal(0.1 / SPLINE_INTERVALS)
        self.gain = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.coefficients = nnx.Param(init(rngs.params(), (channels, SPLINE_BASES), jnp.float32))

    def __call__(self, x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
        return spline_activation(x, self.gain[...], self.coefficients[...])


class SplineFeedForward(nnx.Module):
    """RMSNorm → Linear(D, F) → one spline per channel → Linear(F, D), without biases."""

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            init = fan_in_normal(inputs)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)

        self.norm = RMSNorm(dim)
        self.up = linear(dim, hidden_dim)
        self.spline = Spline(hidden_dim, rngs=rngs)
        self.down = linear(hidden_dim, dim)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return self.down(self.spline(self.up(self.norm(x))))
