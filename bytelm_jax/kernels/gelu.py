"""GELU, which in 16-bit dtypes keeps only its input for the backward pass."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.kernels.recomputation import computed_again


def gelu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """x Φ(x) with the normal distribution Φ (Hendrycks & Gimpel 2016), not its tanh form.

    In 16-bit dtypes only x is kept for the backward pass, and the error is below the rounding of
    the result.
    """
    if is_low_precision(x):
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
    # Two constants are enough to tell this pass from the forward one, and leave x to the compiler,
    # which may compute it again from what a bias was added to.
    half, c = computed_again(jnp.float32(0.5), jnp.float32(_HASTINGS[0]))
    share, bell = _normal(wide, half, c)
    slope = share + wide * bell * (2 * math.pi) ** -0.5
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


_gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal(
    x: Array, half: float | Array = 0.5, c: float | Array = _HASTINGS[0]
) -> tuple[Array, Array]:
    """(Φ(x) to a relative error of 4e-5, exp(−x² / 2)); `half` is 0.5.

    Φ(−z) = exp(−z² / 2) P(1 / (1 + c z)), the form of Hastings 1955; the coefficients minimise the
    largest relative error for z up to 14.
    """
    bell = jnp.exp(-half * jnp.square(x))
    t = 1 / (1 + c * jnp.abs(x))
    tail = jnp.zeros_like(x)
    for coefficient in _HASTINGS[:0:-1]:
        tail = (tail + coefficient) * t
    tail = tail * bell
    return jnp.where(x < 0, tail, 1 - tail), bell
