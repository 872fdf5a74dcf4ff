"""The learned activation gain · SiLU(x) + Σ_i coefficients_i · B_i(x), with a handwritten gradient.

Axes: F channels, each with a gain and 11 coefficients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm.config.blt import SPLINE_BASES, SPLINE_EDGE, SPLINE_INTERVALS
from bytelm_jax.kernels.backend import backend
from bytelm_jax.kernels.lookup import vary_like
from bytelm_jax.kernels.recomputation import computed_again

_SCALE = SPLINE_INTERVALS / (2 * SPLINE_EDGE)


# The uniform cubic B-spline at a distance from its middle, in intervals, is 0 from 2 on. Written in
# powers of the distances to the ends of its pieces, it needs no case distinctions, and automatic
# differentiation gives the right derivative at the knots, too. Its factors are applied to all
# weights and sums of a layer at once: XLA moved each to the weights of one basis function, in a
# kernel of its own.
_BUMP, _SLOPE = 1 / 6, 1 / 2


def _bump(distance: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The B-spline, times six."""
    away = jnp.abs(distance)
    return jnp.maximum(2 - away, 0) ** 3 - 4 * jnp.maximum(1 - away, 0) ** 3


def _slope(distance: Array) -> Array:
    """Its derivative, times two."""
    away = jnp.abs(distance)
    slope = 4 * jnp.maximum(1 - away, 0) ** 2 - jnp.maximum(2 - away, 0) ** 2
    return jnp.where(distance < 0, -slope, slope)


def spline_activation(
    x: Float[Array, "*batch F"], gain: Float[Array, " F"], coefficients: Float[Array, "F 11"]
) -> Float[Array, "*batch F"]:
    """gain · SiLU(x) + Σ_i coefficients_i · B_i(x), in at least float32.

    All basis functions are evaluated: selecting the four that are not zero would need a gather,
    whose backward pass is a scatter. Only x is kept for the backward pass.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    gain, coefficients = (vary_like(p.astype(wide), x) for p in (gain, coefficients))
    return _activate(x.reshape(-1, x.shape[-1]), gain, coefficients).reshape(x.shape)


@jax.custom_vjp
def _activate(x: Array, gain: Array, coefficients: Array) -> Array:
    wide = x.astype(gain.dtype)

    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:
        middle, weight = term
        return total + weight[None] * _bump(_place(wide) - middle), None

    weights = coefficients.T * _BUMP
    return _over_basis(add, gain[None] * jax.nn.silu(wide), weights)[0].astype(x.dtype)


def _forward(x: Array, gain: Array, coefficients: Array) -> tuple[Array, tuple[Array, ...]]:
    return _activate(x, gain, coefficients), (x, gain, coefficients)


def _backward(residual: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    # Handwritten: differentiated automatically, the loop took five times as long on a CPU.
    dtype, (x, gain, coefficients) = residual[0].dtype, residual
    # Once for the gradient of x and once for the sums, which a GPU computes in several passes:
    # what they share would be written and read in wide numbers, which takes longer.
    summed, weights = (y.astype(gain.dtype) for y in computed_again(x, gradient))
    x, gradient = (y.astype(gain.dtype) for y in (*computed_again(x), gradient))
    sum_rows, share = _row_sums(x), jax.nn.sigmoid(x)

    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, Array]:
        middle, weight = term
        of_basis = sum_rows(weights * _bump(_place(summed) - middle))
        return total + weight[None] * _slope(_place(x) - middle), of_basis

    slope, by_coefficient = _over_basis(add, jnp.zeros_like(x), coefficients.T * (_SLOPE * _SCALE))
    slope = slope + gain[None] * share * (1 + x * (1 - share))
    to_x = (gradient * slope).astype(dtype)
    return to_x, sum_rows(weights * jax.nn.silu(summed)), by_coefficient.T * _BUMP


_activate.defvjp(_forward, _backward)


def _row_sums(like: Float[Array, "N F"]) -> Callable[[Array], Array]:
    """Sums over the first axis of arrays like this one: on a CPU by a product with ones.

    Elsewhere a product would have each array written first: twelve times in a layer.
    """
    if backend() != "cpu":
        return lambda x: x.sum(axis=0)
    ones = jnp.ones(like.shape[0], like.dtype)
    return lambda x: ones @ x


def _place(x: Array) -> Array:
    """The position of x in intervals: 0 at the middle of B_0, 1 at the middle of B_1, and so on."""
    return (x + SPLINE_EDGE) * _SCALE + 1


def _over_basis(function: Callable, start: Array, weights: Array) -> tuple[Array, Any]:
    """`function` over all basis functions: a loop on a CPU, one fused expression elsewhere.

    On a CPU the fused expression takes eight times as long; elsewhere each iteration of a loop
    would read all of x again.
    """
    middles = jnp.arange(SPLINE_BASES, dtype=start.dtype)
    whole = backend() != "cpu"
    return jax.lax.scan(function, start, (middles, weights), unroll=SPLINE_BASES if whole else 1)
