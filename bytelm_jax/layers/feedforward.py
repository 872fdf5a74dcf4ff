"""Position-wise feed-forward layers."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.kernels.low_precision import linear_of_rows, normalized_linears
from bytelm_jax.layers.initializers import fan_in_normal, normal
from bytelm_jax.layers.norm import LayerNorm, RMSNorm


def gelu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x Φ(x) with the normal distribution Φ (Hendrycks & Gimpel 2016), not its tanh form.

    In 16 bits it keeps x alone for the backward pass, and errs less than the result is rounded.
    """
    if x.dtype.itemsize == 2:
        return _gelu(x)
    # erf, not tanh: flax's and jax's default is the tanh form, torch's is not.
    return jax.nn.gelu(x, approximate=False)


_HASTINGS = (0.375, 0.149061076, 0.157733452, 0.0835659219, 0.200279207, -0.0906417441)
"""c and the coefficients of P in `_normal`."""


@jax.custom_vjp
def _gelu(x: Array) -> Array:
    wide = x.astype(jnp.float32)
    share, _ = _normal(wide)
    return (wide * share).astype(x.dtype)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return _gelu(x), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    share, bell = _normal(wide)
    slope = share + wide * bell * (2 * math.pi) ** -0.5
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal(x: Array) -> tuple[Array, Array]:
    """(Φ(x) to 4e-5 of itself, exp(−x² / 2)).

    Φ(−z) = exp(−z² / 2) P(1 / (1 + c z)), the form of Hastings 1955; the coefficients are the best
    for z up to 14 in the sense of the largest relative error.
    """
    bell = jnp.exp(-0.5 * jnp.square(x))
    t = 1 / (1 + _HASTINGS[0] * jnp.abs(x))
    tail = jnp.zeros_like(x)
    for coefficient in _HASTINGS[:0:-1]:
        tail = (tail + coefficient) * t
    tail = tail * bell
    return jnp.where(x < 0, tail, 1 - tail), bell


class FeedForward(nnx.Module):
    """LayerNorm → Linear(D, 4D) → GELU (erf) → Linear(4D, D), both linears with bias."""

    def __init__(self, dim: int, init_std: float, *, rngs: nnx.Rngs):
        init = normal(init_std)
        self.norm = LayerNorm(dim)
        self.up = nnx.Linear(dim, 4 * dim, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        (hidden,) = normalized_linears(self.norm, x, self.up)
        return linear_of_rows(self.down, gelu(hidden))


class GatedFeedForward(nnx.Module):
    """RMSNorm → down(SiLU(gate(x)) · up(x)), width F inside, no bias (Shazeer 2020, SwiGLU)."""

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            init = fan_in_normal(inputs)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)

        self.norm = RMSNorm(dim)
        self.gate = linear(dim, hidden_dim)
        self.up = linear(dim, hidden_dim)
        self.down = linear(hidden_dim, dim)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        gate, up = normalized_linears(self.norm, x, self.gate, self.up)
        return self.down(jax.nn.silu(gate) * up)
