"""The learned activation gain · SiLU(x) + Σ_i coefficients_i · B_i(x), with a handwritten gradient.

Axes: F channels, each with a gain and 11 coefficients.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm.config.blt import SPLINE_BASES
from bytelm_jax.kernels.backend import backend
from bytelm_jax.kernels.block_sums import blocks, sum_blocks
from bytelm_jax.kernels.lookup import vary_like
from bytelm_jax.kernels.recomputation import computed_again
from bytelm_jax.kernels.spline_pieces import SCALE, place_of, spline_slopes, spline_values

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

    On a CPU a loop evaluates all basis functions; elsewhere those that are not 0 are selected by
    comparisons, since the backward pass of a gather is a scatter. Only x is kept for it.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    gain, coefficients = (vary_like(p.astype(wide), x) for p in (gain, coefficients))
    batch = (-1,) if _by_loop() else (math.prod(x.shape[:-2]), math.prod(x.shape[-2:-1]))
    return _activate(x.reshape(*batch, x.shape[-1]), gain, coefficients).reshape(x.shape)


@jax.custom_vjp
def _activate(x: Array, gain: Array, coefficients: Array) -> Array:
    wide, weights = x.astype(gain.dtype), coefficients.T * _BUMP
    total = _per_channel(gain, x) * jax.nn.silu(wide)
    if not _by_loop():
        return (total + spline_values(wide, weights)).astype(x.dtype)

    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, None]:
        middle, weight = term
        return total + weight[None] * _bump(place_of(wide) - middle), None

    return _over_basis(add, total, weights)[0].astype(x.dtype)


def _forward(x: Array, gain: Array, coefficients: Array) -> tuple[Array, tuple[Array, ...]]:
    return _activate(x, gain, coefficients), (x, gain, coefficients)


def _backward(residual: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    # Handwritten: differentiated automatically, the loop took five times as long on a CPU.
    dtype, (x, gain, coefficients) = residual[0].dtype, residual
    # Once for the gradient of x and once for the sums, which a GPU computes in another pass: what
    # they share would be written and read in wide numbers, which takes longer.
    summed, weights = (y.astype(gain.dtype) for y in computed_again(x, gradient))
    x, gradient = (y.astype(gain.dtype) for y in (*computed_again(x), gradient))
    gradients = _loop_gradients if _by_loop() else _selected_gradients
    to_x, by_gain, by_coefficient = gradients(x, gradient, summed, weights, gain, coefficients)
    return to_x.astype(dtype), by_gain, by_coefficient.T * _BUMP


_activate.defvjp(_forward, _backward)


def _selected_gradients(
    x: Array, gradient: Array, summed: Array, weights: Array, gain: Array, coefficients: Array
) -> tuple[Array, Array, Array]:
    """The gradient of x, and the sums of weights · SiLU and of weights · 6 B_i.

    `summed` and `weights` are x and its gradient for the sums.
    """
    slope = spline_slopes(x, coefficients.T * (_SLOPE * SCALE))
    to_x = gradient * (slope + _silu_slope(x, gain, jax.nn.sigmoid(x)))
    summed, weights = blocks(summed), blocks(weights)
    # Of all basis functions: what several terms share XLA computes in another kernel, and stores.
    bumps = (_bump(place_of(summed) - i) for i in range(SPLINE_BASES))
    by_gain, *rest = sum_blocks([weights * y for y in (jax.nn.silu(summed), *bumps)])
    return to_x, by_gain, jnp.stack(rest)


def _loop_gradients(
    x: Array, gradient: Array, summed: Array, weights: Array, gain: Array, coefficients: Array
) -> tuple[Array, Array, Array]:
    """`_selected_gradients` by a loop over all basis functions."""
    # A CPU sums by products with ones.
    ones, share = jnp.ones(x.shape[0], x.dtype), jax.nn.sigmoid(x)

    def add(total: Array, term: tuple[Array, Array]) -> tuple[Array, Array]:
        middle, weight = term
        of_basis = ones @ (weights * _bump(place_of(summed) - middle))
        return total + weight[None] * _slope(place_of(x) - middle), of_basis

    start = jnp.zeros_like(x)
    slope, by_coefficient = _over_basis(add, start, coefficients.T * (_SLOPE * SCALE))
    to_x = gradient * (slope + _silu_slope(x, gain, share))
    return to_x, ones @ (weights * jax.nn.silu(summed)), by_coefficient


def _silu_slope(x: Array, gain: Array, share: Array) -> Array:
    return _per_channel(gain, x) * share * (1 + x * (1 - share))


def _by_loop() -> bool:
    """Whether a loop evaluates all basis functions: on a CPU, where to select takes longer."""
    return backend() == "cpu"


def _per_channel(values: Float[Array, " F"], x: Float[Array, "*batch F"]) -> Array:
    return jnp.expand_dims(values, range(x.ndim - 1))


def _over_basis(function: Callable, start: Array, weights: Array) -> tuple[Array, Any]:
    """`function` over all basis functions, in a loop: one expression takes eight times as long."""
    middles = jnp.arange(SPLINE_BASES, dtype=start.dtype)
    return jax.lax.scan(function, start, (middles, weights))
