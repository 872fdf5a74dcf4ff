"""The sum of a wide and a narrow product, as adaptive linear layers have it.

Axes: I inputs, O outputs, R rank; kernels may have leading axes, which their product knows.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm_jax.kernels.backend import backend

_ROWS = 4
"""Rows per input from which on the kernels of both are put together, which copies them."""


def sum_of_products(
    x: Float[Array, "*batch I"],
    narrow: Float[Array, "*batch R"],
    base: Float[Array, "*lead I O"],
    up: Float[Array, "*lead R O"],
    product: Callable[[Array, Array], Array],
) -> Float[Array, "*batch O"]:
    """`product(x, base) + product(narrow, up)`.

    On a GPU it is the product [x, narrow] @ [base; up]: the narrow one alone takes as long as
    writing its outputs, adding them as long as reading both, and its gradients read all of the
    output's gradient twice more. With fewer outputs than inputs, copying x would cost more.
    """
    inputs, outputs = base.shape[-2:]
    many = x.size >= _ROWS * inputs * inputs
    if backend() != "gpu" or not many or outputs < inputs:
        return product(x, base) + product(narrow, up)
    both = jnp.concatenate([x, narrow], axis=-1)
    return product(both, jnp.concatenate([base, up], axis=-2))
