"""Ids of any integer dtype, converted to int32 before anything is computed with them.

In a narrower dtype special ids do not fit and wrap silently: as uint8, a pad of 257 is the byte 1.
"""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int32, Integer, Shaped

_INT32 = np.iinfo(np.int32)


def as_ids(ids: Shaped[Array | np.ndarray, "*batch"]) -> Int32[Array, "*batch"]:
    """`ids` as int32. Ids that int32 cannot hold stay outside every vocabulary.

    Raises `ValueError` for a dtype that is not an integer, including bool.
    """
    if ids.dtype.kind not in "iu":
        raise ValueError(f"ids: dtype {ids.dtype}; give integers, such as int32")
    limits = np.iinfo(ids.dtype)
    if limits.max > _INT32.max:
        # A plain cast would wrap 2^32 + 65 to the id 65.
        clip = np.clip if isinstance(ids, np.ndarray) else jnp.clip
        ids = clip(ids, max(limits.min, _INT32.min), _INT32.max)
    return jnp.asarray(ids, jnp.int32)


def check_ids(ids: Integer[Array | np.ndarray, "B T"], size: int) -> Int32[Array, "B T"]:
    """`as_ids` with checks: raises `ValueError` for other shapes and ids outside [0, size).

    Traced ids, whose values are unknown, pass; an id past the end gives NaN logits through the
    embedding.
    """
    if ids.ndim != 2:
        raise ValueError(f"ids: shape {tuple(ids.shape)}; give rows of ids, [B, T]")
    checked = as_ids(ids)
    if ids.size == 0 or isinstance(ids, Tracer):
        return checked
    values = np.asarray(ids)
    bad = values[(values < 0) | (values >= size)]
    if bad.size:
        raise ValueError(f"ids: {bad[0]} is outside the vocabulary; give ids from 0 to {size - 1}")
    return checked
