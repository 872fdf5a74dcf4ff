"""Byte and position embeddings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int, Integer

from bytelm_jax.layers.ids import as_ids
from bytelm_jax.layers.initializers import normal


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: Array, ids: Array, rows: int) -> Array:
    # An id outside the table gives NaN, which every check downstream notices; clamping would not.
    return table.at[ids].get(mode="fill", fill_value=jnp.nan)


def _lookup_forward(table: Array, ids: Array, rows: int) -> tuple[Array, Array]:
    return _lookup(table, ids, rows), ids


def _lookup_backward(rows: int, ids: Array, gradient: Array) -> tuple[Array, None]:
    # As a matrix product: the transpose of a gather is a scatter-add, and the pads that start
    # every patch all hit one row, where colliding atomics make a GPU step six times slower.
    flat = gradient.reshape(-1, gradient.shape[-1])
    hot = jax.nn.one_hot(ids.reshape(-1), rows, dtype=flat.dtype)
    accumulate = jnp.promote_types(flat.dtype, jnp.float32)
    table = jnp.einsum("bv,bd->vd", hot, flat, preferred_element_type=accumulate)
    return table.astype(flat.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def look_up(table: Float[Array, "V D"], ids: Integer[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of the table, NaN outside it: gather forward (exact), one-hot product backward."""
    return _lookup(table, as_ids(ids), table.shape[0])


def vary_like(table: Float[Array, "..."], data: Array) -> Float[Array, "..."]:
    """`table`, varying over the devices over which `data` vary; nothing outside `shard_map`.

    Inside it the data vary over devices and the table does not; the cast makes the cotangent type
    of a custom gradient match, and its transpose sums over the devices.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in (data, table)]
    varying = tuple(sorted(axes[0] - axes[1]))
    return jax.lax.pcast(table, varying, to="varying") if varying else table


class ByteEmbedding(nnx.Module):
    """A table [V, D] looked up by id: gather forward (exact), one-hot product backward.

    `init_std` is the deviation of a normal initialisation; an initializer may stand in its place.
    """

    def __init__(self, size: int, dim: int, init_std: float | Initializer, *, rngs: nnx.Rngs):
        init = init_std if callable(init_std) else normal(init_std)
        self.embedding = nnx.Param(init(rngs.params(), (size, dim), jnp.float32))

    def __call__(self, ids: Integer[Array, "*batch"]) -> Float[Array, "*batch D"]:
        return look_up(vary_like(self.embedding[...], ids), ids)


class PositionEmbedding(nnx.Module):
    """A learned table [T_MAX, D] whose first rows are read in order: a slice, not a gather."""

    def __init__(self, length: int, dim: int, init_std: float, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(init_std)(rngs.params(), (length, dim), jnp.float32))

    def __call__(self, start: int | Int[Array, ""], count: int) -> Float[Array, "{count} D"]:
        return jax.lax.dynamic_slice_in_dim(self.embedding[...], start, count)

    def patches(self, places: Int[Array, "B N"], count: int, patch: int) -> Float[Array, "B N W"]:
        """The rows of the patches numbered `places`, side by side; `count` is above all of them."""
        table = self.embedding[...][: count * patch].reshape(count, -1)
        return _lookup(vary_like(table, places), places, count)


def sinusoidal_positions(
    start: int | Int[Array, ""], count: int, dim: int, dtype: jnp.dtype
) -> Float[Array, "{count} {dim}"]:
    """`sinusoids` of `count` positions from `start` on."""
    return sinusoids(start + jnp.arange(count), dim, dtype)


def sinusoids(
    positions: Int[Array, "*batch T"], dim: int, dtype: jnp.dtype
) -> Float[Array, "*batch T {dim}"]:
    """sin and cos, interleaved, of position / 10000^(2i / D) (Vaswani et al. 2017, section 3.5).

    The frequencies come from float64 and the angles are rounded to at least float32, so that both
    packages and every length give a position the same angles.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    lead, pair = (1,) * positions.ndim, np.arange(dim) // 2
    frequencies = jnp.asarray(10_000.0 ** (-2 * pair / dim), wide).reshape(*lead, dim)
    angles = positions.astype(wide)[..., None] * frequencies
    even = (np.arange(dim) % 2 == 0).reshape(*lead, dim)
    return jnp.where(even, jnp.sin(angles), jnp.cos(angles)).astype(dtype)
