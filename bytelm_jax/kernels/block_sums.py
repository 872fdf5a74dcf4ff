"""Sums of several arrays over all positions, in one pass over what they are computed from.

On a GPU XLA makes a kernel for every two such sums, each of which reads what the terms are computed
from, computes them, and spends most of its time on exchanging sums between threads.

Axes: B batch, T positions, in N groups of R · S, F channels.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm_jax.kernels.backend import backend
from bytelm_jax.kernels.lookup import vary_like

_LARGEST = 8
"""The longest axis that XLA's reduction splitter leaves in a reduction with another one."""


def blocks(x: Float[Array, "B T F"]) -> Float[Array, "B R N S F"]:
    """Positions in blocks for `sum_blocks`; elsewhere than on a GPU R and S are 1."""
    batch, length, channels = x.shape
    inner = _small_divisor(length) if backend() == "gpu" else 1
    outer = _small_divisor(length // inner) if inner > 1 else 1
    if outer * inner == length:
        outer = 1  # see `sum_blocks`
    return x.reshape(batch, outer, length // (outer * inner), inner, channels)


def sum_blocks(terms: Sequence[Float[Array, "B R N S F"]]) -> list[Float[Array, " F"]]:
    """The sum of each term over all axes but the last; terms computed from blocks are not stored.

    First over R and S, for all terms at once: XLA adds up short axes in one thread, unless they are
    neighbours, as with N = 1. These are one long axis, for which threads exchange sums through
    shared memory, and of that there is too little for many terms.
    """
    if terms[0].shape[1] * terms[0].shape[3] > 1:
        zeros = [vary_like(jnp.zeros((), x.dtype), x) for x in terms]
        add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]  # noqa: E731
        terms = jax.lax.reduce(list(terms), zeros, add, (1, 3))
        return [x.sum(axis=(0, 1)) for x in terms]
    return [x.sum(axis=(0, 1, 2, 3)) for x in terms]


def _small_divisor(number: int) -> int:
    return max(n for n in range(1, _LARGEST + 1) if number % n == 0)
