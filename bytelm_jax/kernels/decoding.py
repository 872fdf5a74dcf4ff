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

_FEW_ROWS = 8
"""Rows up to which keys that heads share are read by each of them."""


def min_rows() -> int:
    """The smallest batch that should be decoded.

    On a GPU, padding to a second row makes decoding a byte of MEGABYTE 1.5 times faster, unless
    it is decoded by sums (`decode_choice`).
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

    On a GPU it takes two or three kernels, unless many rows have heads that share keys: then
    products read them less often.
    """
    batch, heads, groups = len(q), q.shape[2], k.shape[2]
    if backend() != "gpu" or (heads != groups and batch > _FEW_ROWS):
        return plain(q, k, v, mask)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    queries = q.reshape(batch, groups, heads // groups, 1, q.shape[3]).astype(wide)
    # By head: the positions of one lie side by side, as XLA's kernel for a softmax needs them.
    keys, values = (jnp.swapaxes(part, 1, 2)[:, :, None].astype(wide) for part in (k, v))
    scores = (queries * keys).sum(axis=-1) * v.shape[-1] ** -0.5
    scores = jnp.where(jnp.asarray(mask)[:, :, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = (weights[..., None] * values).sum(axis=-2)
    return mixed.astype(v.dtype).reshape(batch, 1, heads, v.shape[-1])
