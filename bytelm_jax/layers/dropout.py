"""Dropout whose bits depend on the global row alone, so that one device and many agree."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def fold_rows(keys: Key[Array, " B"] | None, site: int) -> Key[Array, " B"] | None:
    """One new key per row for the dropout site numbered `site`; None stays None."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, site))(keys)


def dropout(
    x: Float[Array, " B *rest"], rate: float, keys: Key[Array, " B"] | None
) -> Float[Array, " B *rest"]:
    """Zeroes each value with probability `rate` and scales the others by 1 / (1 − rate).

    `keys` holds one key per row of the batch; None means evaluation and returns `x` itself.
    """
    if keys is None or rate == 0.0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
