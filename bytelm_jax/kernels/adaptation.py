"""The sum of a wide product and an adapted narrow one, as adaptive linear layers have it.

Axes: I inputs, O outputs, R rank; kernels may have leading axes, which their product knows.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm_jax.kernels.backend import backend

_ROWS = 4
"""Rows per input from which on kernels are put together, which copies them."""


def adapted_product(
    x: Float[Array, "*batch I"],
    scale: Float[Array, "*positions R"],
    base: Float[Array, "*lead I O"],
    down: Float[Array, "*lead I R"],
    up: Float[Array, "*lead R O"],
    product: Callable[[Array, Array], Array],
) -> Float[Array, "*batch O"]:
    """`product(x, base) + product(scale · product(x, down), up)`.

    `scale` is one of each position, or one of all positions of a row.

    A narrow product alone takes as long as reading its wide side or writing it, and so does each of
    its gradients. On a GPU the narrow one with the wider side is therefore a part of the wide
    product: with fewer outputs than inputs x @ [base, down], otherwise [x, narrow] @ [base; up].
    """
    inputs, outputs = base.shape[-2:]
    many = x.size >= _ROWS * inputs * inputs
    if backend() != "gpu" or not many:
        return product(x, base) + product(scale * product(x, down), up)
    if outputs < inputs:
        both = product(x, jnp.concatenate([base, down], axis=-1))
        wide, narrow = jnp.split(both, [outputs], axis=-1)
        return wide + product(scale * narrow, up)
    both = jnp.concatenate([x, scale * product(x, down)], axis=-1)
    return product(both, jnp.concatenate([base, up], axis=-2))
