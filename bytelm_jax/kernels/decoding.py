"""Cached decoding of few rows.

On a GPU, XLA turns a product with a single row into multiplications and a sum, with the product
written to memory in between, and cannot fuse them well. So a single query is attended to in a form
that fuses, and no batch has only one row.

Axes: B rows, S key positions, H heads in G groups, K head width, J head width of queries and keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bytelm_jax.kernels.backend import backend


def min_rows() -> int:
    """The smallest batch that should be decoded.

    On a GPU, padding to a second row makes decoding a byte of MEGABYTE 1.5 times faster.
    """
    return 2 if backend() == "gpu" else 1


def where_needed(
    needed: Bool[Array, ""], work: Callable[[], Array], otherwise: Callable[[], Array]
) -> Array:
    """`work()` if it is needed, and else `otherwise()`, which must be what it would give then.

    A GPU does the work in any case, as long as it is a few small kernels: to ask, the host waits
    for all that came before.
    """
    if backend() == "gpu":
        return work()
    return jax.lax.cond(needed, work, otherwise)


def attend_once(
    q: Float[Array, "B 1 H J"],
    k: Float[Array, "B S G J"],
    v: Float[Array, "B S G K"],
    mask: Bool[Array | np.ndarray, "#B 1 S"],
    plain: Callable[..., Array],
) -> Float[Array, "B 1 H K"]:
    """`plain(q, k, v, mask)`, softmax attention with scale K^-0.5, for one query per row.

    On a GPU it takes fewer kernels if no heads share a key.
    """
    if backend() != "gpu" or q.shape[2] != k.shape[2]:
        return plain(q, k, v, mask)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = (q.astype(wide) * k.astype(wide)).sum(axis=-1) * v.shape[-1] ** -0.5
    scores = jnp.where(jnp.asarray(mask)[:, 0, :, None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    mixed = (weights[..., None] * v.astype(wide)).sum(axis=1)
    return (mixed / weights.sum(axis=1)[..., None]).astype(v.dtype)[:, None]
