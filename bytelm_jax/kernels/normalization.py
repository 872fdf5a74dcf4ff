"""The reductions of normalisation, in at least float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPSILON = 1e-5
"""Added to the variance: PyTorch's default."""


def standardize(
    x: Float[Array, "*batch D"],
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch 1"]]:
    """(x − mean) / deviation over the last axis and 1 / deviation, both in at least float32.

    The variance takes two passes: the fast form E[x²] − E[x]² loses digits at large means.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + EPSILON)
    return centred * inverse, inverse


def rescale(
    x: Float[Array, "*batch D"], epsilon: float = EPSILON
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch 1"]]:
    """x / root mean square over the last axis and 1 / that root, both in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    return wide * inverse, inverse
