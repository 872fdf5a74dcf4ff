"""Rows of a table by id: gather forward, one-hot product backward.

A hand-written gradient (`custom_vjp`) stands here and elsewhere for 16-bit numbers alone: with it
JAX has no forward mode, which Hessian-vector products need. Wider numbers have it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from bytelm_jax.kernels.dtypes import is_low_precision


def look_up(table: Float[Array, "V D"], ids: Integer[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of the table, NaN outside it: gather forward (exact), one-hot product backward.

    As a matrix product: the transpose of a gather is a scatter-add, and the pads that start every
    patch all hit one row, where colliding atomics make a GPU step six times slower.
    """
    if is_low_precision(table):
        return _low_precision_lookup(table, ids, table.shape[0])
    return _lookup(table, ids)


@jax.custom_jvp
def _lookup(table: Array, ids: Array) -> Array:
    # An id outside the table gives NaN, which every check downstream notices; clamping would hide
    # it.
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)


@_lookup.defjvp
def _lookup_jvp(primals: tuple[Array, Array], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    table, ids = primals
    hot = jax.nn.one_hot(ids, table.shape[0], dtype=table.dtype)
    return _lookup(table, ids), hot @ tangents[0]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low_precision_lookup(table: Array, ids: Array, rows: int) -> Array:
    return _lookup(table, ids)


def _lookup_forward(table: Array, ids: Array, rows: int) -> tuple[Array, Array]:
    return _lookup(table, ids), ids


def _lookup_backward(rows: int, ids: Array, gradient: Array) -> tuple[Array, None]:
    flat = gradient.reshape(-1, gradient.shape[-1])
    hot = jax.nn.one_hot(ids.reshape(-1), rows, dtype=flat.dtype)
    table = jnp.einsum("bv,bd->vd", hot, flat, preferred_element_type=jnp.float32)
    return table.astype(flat.dtype), None


_low_precision_lookup.defvjp(_lookup_forward, _lookup_backward)


def vary_like(table: Shaped[Array, "..."], data: Array) -> Shaped[Array, "..."]:
    """`table`, varying over the devices over which `data` vary; unchanged outside `shard_map`.

    Inside `shard_map` the data vary over devices and the table does not; the cast makes the
    cotangent type of a custom gradient match, and its transpose sums over the devices.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in (data, table)]
    varying = tuple(sorted(axes[0] - axes[1]))
    return jax.lax.pcast(table, varying, to="varying") if varying else table
