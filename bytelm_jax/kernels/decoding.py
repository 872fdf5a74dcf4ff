"""Cached decoding of few rows.

XLA on a GPU takes a product with a single row for multiplications and a sum, the one written to
memory for the other, which it cannot fuse well. So a query alone is attended to in a form that
fuses, and no batch is a single row.

Axes: B rows, S key positions, H heads in G groups, K head width, J head width of queries and keys.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bytelm_jax.kernels.backend import backend


def min_rows() -> int:
    """The smallest batch that should be decoded.

    On a GPU a second row, done from the start, makes a byte of MEGABYTE 1.5 times faster.
    """
    return 2 if backend() == "gpu" else 1


def attend_once(
    q: Float[Array, "B 1 H J"],
    k: Float[Array, "B S G J"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array | np.ndarray, "#B 1 S"],
    plain: Callable[..., Array],
) -> Float[Array, "B 1 H K"]:
    """`plain(q, k, v, mask)`, softmax attention with scale K^-0.5, of one query a row.

    On a GPU it takes fewer kernels where no heads share a key.
    """
    if backend() != "gpu" or q.shape[2] != k.shape[2]:
        return plain(q, k, v, mask)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = (q.astype(wide) * k.astype(wide)).sum(axis=-1) * v.shape[-1] ** -0.5
    scores = jnp.where(jnp.asarray(mask)[:, 0, :, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    mixed = (weights[..., None] * v.astype(wide)).sum(axis=1)
    return (mixed / weights.sum(axis=1)[..., None]).astype(v.dtype)[:, None]
