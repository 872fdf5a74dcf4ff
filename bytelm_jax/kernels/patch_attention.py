"""Attention within short patches, laid out for a TPU: as many patches at once as fill its lanes.

Axes: B batch, N patches, T query positions, S key positions, H heads, K head width, C blocks.

On a TPU the last axis of an array lies along 128 lanes. Scores of one patch, [T·H, S] with S = 8,
use 8 of them, and so does all that is computed with scores. Here 128 / S patches of a row are one
block of 128 positions, whose scores are masked between patches: the products are larger than they
need to be, but products are what a TPU does best. Heads are computed one after another, as slices
of their joined axis, since an axis of 64 would be padded again.

MEGABYTE's local attention of 32 rows of 2,048 bytes (4 heads of 64, patches of 8), with its linear
layers, forward and backward, as v5e's compiler estimates it: 11.1 million cycles as
`multi_query_attention`, 8.9 as this; layouts add 35 and 4 % to the bytes written. With patches
along the lanes and no masked scores it was 12.8: the vector unit then does all the work.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bytelm_jax.kernels.backend import backend
from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.kernels.partitioned import is_partitioned

_BLOCK = 128


def suits(q: Float[Array, "*batch T H K"], mask: Bool[Array | np.ndarray, "*rows T S"]) -> bool:
    """Whether `patch_attention` is what these queries need: a TPU's, of patches that fill blocks.

    Heads that devices share (`--tensor`) are not sliced.
    """
    if q.ndim != 5 or mask.ndim != 2 or backend() != "tpu" or is_partitioned():
        return False
    patches, length = q.shape[1:3]
    return is_low_precision(q) and _BLOCK % length == 0 and patches * length % _BLOCK == 0


def patch_attention(
    q: Float[Array, "B N T H K"],
    k: Float[Array, "B N S K"],
    v: Float[Array, "B N S K"],
    mask: Bool[Array | np.ndarray, "T S"],
    bias: Float[Array | np.ndarray, "H S"] | None = None,
) -> Float[Array, "B N T H K"]:
    """`multi_query_attention` of each patch; N · T is a multiple of 128."""
    wide, (length, heads, width) = jnp.promote_types(q.dtype, jnp.float32), q.shape[2:]
    queries, keys, values = (x.reshape(-1, _BLOCK, x[0, 0, 0].size) for x in (q, k, v))
    count = _BLOCK // length
    patch = np.arange(_BLOCK) // length
    visible = jnp.tile(jnp.asarray(mask), (count, count)) & (patch[:, None] == patch)
    out = []
    for head in range(heads):
        own = queries[..., head * width : (head + 1) * width]
        scores = jnp.einsum("ctk,csk->cts", own, keys, preferred_element_type=wide) * width**-0.5
        if bias is not None:
            scores = scores + jnp.tile(jnp.asarray(bias)[head].astype(wide), count)[None, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        out.append(jnp.einsum("cts,csk->ctk", weights.astype(v.dtype), values))
    return jnp.concatenate(out, axis=-1).reshape(q.shape)
