"""Byte and position embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int, Integer

from bytelm_jax.kernels.lookup import look_up, vary_like
from bytelm_jax.kernels.partitioned import by_rows
from bytelm_jax.layers.ids import as_ids
from bytelm_jax.layers.initializers import normal


def embed(table: Float[Array, "V D"], ids: Integer[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of a table for ids of any integer dtype; NaN for an id outside it."""
    ids = as_ids(ids)
    return by_rows(look_up, vary_like(table, ids), ids, jnp.nan)


class ByteEmbedding(nnx.Module):
    """A table [V, D] looked up by id: gather forward (exact), one-hot product backward.

    `init_std` is the standard deviation of a normal initialisation, or an initializer.
    """

    def __init__(self, size: int, dim: int, init_std: float | Initializer, *, rngs: nnx.Rngs):
        init = init_std if callable(init_std) else normal(init_std)
        self.embedding = nnx.Param(init(rngs.params(), (size, dim), jnp.float32))

    def __call__(self, ids: Integer[Array, "*batch"]) -> Float[Array, "*batch D"]:
        return embed(self.embedding[...], ids)


class PositionEmbedding(nnx.Module):
    """A learned table [T_MAX, D] whose first rows are read in order: a slice, not a gather."""

    def __init__(self, length: int, dim: int, init_std: float, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(normal(init_std)(rngs.params(), (length, dim), jnp.float32))

    def __call__(self, start: int | Int[Array, ""], count: int) -> Float[Array, "{count} D"]:
        return jax.lax.dynamic_slice_in_dim(self.embedding[...], start, count)

    def patches(self, numbers: Int[Array, "B N"], count: int, patch: int) -> Float[Array, "B N W"]:
        """The rows of the patches numbered `numbers`, concatenated; `count` exceeds all of them."""
        table = self.embedding[...][: count * patch].reshape(count, -1)
        return look_up(vary_like(table, numbers), numbers)


def sinusoidal_positions(
    start: int | Int[Array, ""], count: int, dim: int, dtype: jnp.dtype
) -> Float[Array, "{count} {dim}"]:
    """`sinusoids` for `count` positions from `start` on."""
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
