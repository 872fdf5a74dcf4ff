"""The caches of many layers in one array, so that one write serves them all.

In cached decoding of one text, time goes by the number of kernels and hardly by their size.
Axes: B batch, N positions, F what all layers keep of one position.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def pack(caches: Any, lead: int) -> Shaped[Array, "*lead F"]:
    """The arrays of a tree side by side, all axes behind the first `lead` laid flat."""
    flat = [leaf.reshape(*leaf.shape[:lead], -1) for leaf in jax.tree.leaves(caches)]
    return jnp.concatenate(flat, axis=-1)


def unpack(packed: Shaped[Array, "*lead F"], like: Any) -> Any:
    """The tree that was packed; `like` has its structure and, behind the same axes, its shapes."""
    lead, leaves, start = packed.ndim - 1, [], 0
    for leaf in jax.tree.leaves(like):
        end = start + math.prod(leaf.shape[lead:])
        part = jax.lax.slice_in_dim(packed, start, end, axis=lead)
        leaves.append(part.reshape(*packed.shape[:lead], *leaf.shape[lead:]))
        start = end
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
