"""Learned activations: a weighted SiLU plus a cubic B-spline in each channel (Liu et al. 2024,
arXiv 2404.19756, section 2.2), inside a feed-forward layer.

Axes: B batch, T positions, D width, F channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.config_blt import SPLINE_BASES
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.norm import RMSNorm

EDGE, INTERVALS = 3.0, SPLINE_BASES - 3
"""The grid: `INTERVALS` equal intervals over [−EDGE, EDGE]."""


def bump(distance: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The uniform cubic B-spline at a distance from its middle, in intervals; 0 from 2 on.

    Written in powers of what is left to the ends of its pieces, it has no case to tell apart, and
    automatic differentiation gives the derivative that is right at the knots, too.
    """
    away = jnp.abs(distance)
    return (jnp.maximum(2 - away, 0) ** 3 - 4 * jnp.maximum(1 - away, 0) ** 3) / 6


@jax.checkpoint
def spline_activation(
    x: Float[Array, "*batch F"], gain: Float[Array, " F"], coefficients: Float[Array, "F 11"]
) -> Float[Array, "*batch F"]:
    """gain · SiLU(x) + Σ_i coefficients_i · B_i(x), in at least float32.

    All basis functions are evaluated: picking the four that are not zero would bring a gather,
    whose backward pass is a scatter. Nothing but x is kept for that pass.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    place = (wide + EDGE) * (INTERVALS / (2 * EDGE)) + 1  # of B_0's middle: 0, of B_1's: 1, …
    lead = (1,) * (x.ndim - 1)
    out = gain.reshape(*lead, -1).astype(wide.dtype) * jax.nn.silu(wide)
    for i in range(SPLINE_BASES):
        weight = coefficients[:, i].reshape(*lead, -1).astype(wide.dtype)
        out = out + weight * bump(place - i)
    return out.astype(x.dtype)


class Spline(nnx.Module):
    """A learned activation a channel; starts as SiLU with a small random spline."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.1 / INTERVALS)
        self.gain = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.coefficients = nnx.Param(init(rngs.params(), (channels, SPLINE_BASES), jnp.float32))

    def __call__(self, x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
        return spline_activation(x, self.gain[...], self.coefficients[...])


class SplineFeedForward(nnx.Module):
    """RMSNorm → Linear(D, F) → spline a channel → Linear(F, D), both linears without bias."""

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
