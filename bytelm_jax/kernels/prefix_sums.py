"""Sums of what precedes each element of short rows, as drawing from 259 candidates needs them.

Axes: B rows, S elements.

No scan: it is compiled once for every byte of a round, and pairs fuse into one reduction.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bytelm_jax.kernels.backend import backend

_RUN = 16


def sums_before(x: Float[Array, "B S"]) -> Float[Array, "B S"]:
    """[b, i] = Σ_{j < i} x[b, j].

    By all pairs where they are computed side by side. A CPU takes pairs within runs of elements
    and pairs of runs, which are a thirteenth of them for 259.
    """
    if backend() != "cpu":
        return _by_pairs(x)
    rows, size = x.shape
    runs = jnp.pad(x, ((0, 0), (0, -size % _RUN))).reshape(rows, -1, _RUN)
    sums = _by_pairs(runs) + _by_pairs(runs.sum(axis=-1))[..., None]
    return sums.reshape(rows, -1)[:, :size]


def _by_pairs(x: Array) -> Array:
    """[..., S] → [..., S]"""
    lower = np.tri(x.shape[-1], k=-1, dtype=bool)
    return jnp.where(lower, x[..., None, :], 0).sum(axis=-1)
