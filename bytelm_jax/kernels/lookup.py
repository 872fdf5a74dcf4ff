"""Rows of a table by id: gather forward, one-hot product backward."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: Array, ids: Array, rows: int) -> Array:
    # An id outside the table gives NaN, which every check downstream notices; clamping would hide
    # it.
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)


def _lookup_forward(table: Array, ids: Array, rows: int) -> tuple[Array, Array]:
    return _lookup(table, ids, rows), ids


def _lookup_backward(rows: int, ids: Array, gradient: Array) -> tuple[Array, None]:
    # As a matrix product: the transpose of a gather is a scatter-add, and the pads that start every
    # patch all hit one row, where colliding atomics make a GPU step six times slower.
    flat = gradient.reshape(-1, gradient.shape[-1])
    hot = jax.nn.one_hot(ids.reshape(-1), rows, dtype=flat.dtype)
    accumulate = jnp.promote_types(flat.dtype, jnp.float32)
    table = jnp.einsum("bv,bd->vd", hot, flat, preferred_element_type=accumulate)
    return table.astype(flat.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def look_up(table: Float[Array, "V D"], ids: Integer[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of the table, NaN outside it: gather forward (exact), one-hot product backward."""
    return _lookup(table, ids, table.shape[0])


def vary_like(table: Float[Array, "..."], data: Array) -> Float[Array, "..."]:
    """`table`, varying over the devices over which `data` vary; unchanged outside `shard_map`.

    Inside `shard_map` the data vary over devices and the table does not; the cast makes the
    cotangent type of a custom gradient match, and its transpose sums over the devices.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in (data, table)]
    varying = tuple(sorted(axes[0] - axes[1]))
    return jax.lax.pcast(table, varying, to="varying") if varying else table
