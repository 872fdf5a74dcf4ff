"""Splines for GPUs and TPUs: of the basis functions only those that are not 0 are computed.

Places are counted in intervals: B_i has its middle at i, and is 0 from two intervals away on. So of
B_0, B_4 and B_8 at most one is not 0 at a place, and so of B_1, B_5 and B_9, and so on: a spline is
the sum of four functions, each with the weight of the basis function that is meant. Two of them,
whose middles lie two apart, are computed from one offset. To compute all eleven takes a GPU longer
than to read x and write the result.

Axes: B batch, T positions, F channels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bytelm.config.blt import SPLINE_BASES, SPLINE_EDGE, SPLINE_INTERVALS

SCALE = SPLINE_INTERVALS / (2 * SPLINE_EDGE)
"""Intervals per unit of x."""

_REACH, _PERIOD = 2, 4
_LAST = SPLINE_BASES - 1
_PAIRS = (0, 2), (1, 3)


def spline_values(x: Float[Array, "B T F"], weights: Float[Array, "11 F"]) -> Float[Array, "B T F"]:
    """Σ_i weights_i · 6 B_i(x)."""
    place, total = _bounded_place(x), jnp.zeros_like(x)
    for first, second in _PAIRS:
        offset = _offset(place, first)
        square = offset * offset
        even, odd = 1 + square * (3 - 2 * jnp.abs(offset)), offset * (3 - square)
        total = total + _weight(place, weights, first) * (even + odd)
        total = total + _weight(place, weights, second) * (even - odd)
    return total


def spline_slopes(x: Float[Array, "B T F"], weights: Float[Array, "11 F"]) -> Float[Array, "B T F"]:
    """Σ_i weights_i · 2 B_i'(x), the derivative by the place."""
    place, total = _bounded_place(x), jnp.zeros_like(x)
    for first, second in _PAIRS:
        offset = _offset(place, first)
        even, odd = 2 * offset * (1 - jnp.abs(offset)), 1 - offset * offset
        slope = _weight(place, weights, first) * (even + odd)
        slope = slope + _weight(place, weights, second) * (even - odd)
        total = total + jnp.where(_falls(place, first), -slope, slope)
    return total


def place_of(x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """The position of x in intervals: 0 at the middle of B_0, 1 at the middle of B_1, and so on."""
    return (x + SPLINE_EDGE) * SCALE + 1


def _bounded_place(x: Array) -> Array:
    """The position of x in intervals, or the nearest one between which some B_i is not 0."""
    return jnp.clip(place_of(x), -_REACH, _LAST + _REACH)


def _folds(place: Array, first: int) -> tuple[Array, Array, Array]:
    """Numbers of whose absolute values `_offset` is made: wherever it turns, one of them is 0."""
    outer = place - (first + 6)
    inner = jnp.abs(outer) - 4
    return outer, inner, jnp.abs(inner) - 2


def _offset(place: Array, first: int) -> Array:
    """1 minus the distance to the nearest place `first` + 4n, between −1 and 1.

    For the places `first` + 2 + 4n it has the opposite sign. Below `first` − 2, where neither has
    a basis function, it is less than −1.
    """
    return 1 - jnp.abs(_folds(place, first)[2])


def _falls(place: Array, first: int) -> Bool[Array, "*batch F"]:
    """Whether the offset falls at a place."""
    outer, inner, last = _folds(place, first)
    return outer * inner * last > 0


def _weight(place: Array, weights: Float[Array, "11 F"], first: int) -> Array:
    """At each place the weight of the basis function among `first` + 4n that is not 0 there."""
    bases = range(first, SPLINE_BASES, _PERIOD)
    chosen = jnp.zeros_like(place)
    for i in bases:
        weight = jnp.broadcast_to(weights[i], place.shape)
        chosen = jnp.where(place < i - _REACH, chosen, weight) if i else weight
    end = bases[-1] + _REACH
    return jnp.where(place < end, chosen, 0) if end < _LAST + _REACH else chosen
