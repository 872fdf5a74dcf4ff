"""Embeddings of hashed byte n-grams (Pagnoni et al. 2024, arXiv 2412.09871, section 3.2.1).

Axes: B batch, T bytes, E tables, D width. A hash is Σ_j id_j · prime^j, j = 0 the oldest id, in
wrapping signed 64-bit arithmetic, then the remainder (never negative) by the rows of a table. From
three ids on the definition relies on wrapping, and JAX without its 64-bit mode would silently make
int64 int32; so the sum is held in two uint32 limbs, exact on every device.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Int32, Integer

from bytelm.config import BLTConfig
from bytelm.config.blt import HASH_PRIMES
from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.kernels.lookup import vary_like
from bytelm_jax.kernels.partitioned import by_columns
from bytelm_jax.layers.initializers import fan_in_normal

_LIMB = 32


def polynomial_hash(
    grams: Integer[Array, "*batch n"], prime: int, rows: int
) -> Int32[Array, "*batch"]:
    """Hash of the last axis, oldest id first: ids from 0 to 65535, result from 0 to rows − 1.

    `rows` must be below 2^31.
    """
    high, low = jnp.uint32(0), jnp.uint32(0)
    for j in range(grams.shape[-1]):
        factor = pow(prime, j, 2**64)
        more_high, more_low = _product(grams[..., j].astype(jnp.uint32), factor)
        low = low + more_low
        high = high + more_high + (low < more_low).astype(jnp.uint32)
    return _floor_mod(high, low, rows).astype(jnp.int32)


def _product(small: Array, factor: int) -> tuple[Array, Array]:
    """(high, low) of small · factor mod 2^64, for 0 ≤ small < 2^16."""
    parts = [jnp.uint32(factor >> shift & 0xFFFF) for shift in (0, 16)]
    bottom, middle = small * parts[0], small * parts[1]
    low = bottom + (middle << 16)
    carry = (low < bottom).astype(jnp.uint32)
    return small * jnp.uint32(factor >> _LIMB) + (middle >> 16) + carry, low


def _floor_mod(high: Array, low: Array, rows: int) -> Array:
    """The signed 64-bit number (high, low) modulo `rows`, by long division within uint32."""
    step, divisor = _LIMB - rows.bit_length(), jnp.uint32(rows)
    remainder = jnp.zeros_like(high)
    for limb in (high, low):
        left = _LIMB
        while left:
            taken = min(step, left)
            left -= taken
            digit = (limb >> left) & jnp.uint32((1 << taken) - 1)
            remainder = ((remainder << taken) | digit) % divisor
    # Read as signed, a number with its top bit set is smaller by 2^64.
    negative = (remainder + jnp.uint32(rows - 2**64 % rows)) % divisor
    return jnp.where(high >> (_LIMB - 1) == 1, negative, remainder)


def ngram_rows(grams: Integer[Array, "*batch n"], config: BLTConfig) -> Int32[Array, "*batch E"]:
    """Row of the fused table for each table, function-major, then by size in the config's order.

    `grams` holds the ids that end at each byte, oldest first, as many as the largest size, with id
    0 before the first one.
    """
    rows, table_size = [], config.ngram_rows
    for prime in HASH_PRIMES[: config.ngram_functions]:
        for size in config.ngram_sizes:
            hashed = polynomial_hash(grams[..., grams.shape[-1] - size :], prime, table_size)
            rows.append(hashed + len(rows) * table_size)
    return jnp.stack(rows, axis=-1)


def _lookup(table: Array, rows: Array, dtype: jnp.dtype) -> Array:
    return table.at[rows].get(mode="fill", fill_value=0).sum(axis=-2).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low_precision_lookup(table: Array, rows: Array, dtype: jnp.dtype) -> Array:
    return _lookup(table, rows, dtype)


def _lookup_forward(
    table: Array, rows: Array, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, Array]]:
    return _lookup(table, rows, dtype), (table, rows)


def _lookup_backward(
    _: jnp.dtype, residual: tuple[Array, Array], gradient: Array
) -> tuple[Array, None]:
    # Unlike for bytes, a scatter-add is right here: the tables are large and rows seldom collide.
    # It adds in float32, in which frequent n-grams lose no digits; rows outside are dropped.
    table, rows = residual
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    shape = (*rows.shape, gradient.shape[-1])
    updates = jnp.broadcast_to(gradient[..., None, :].astype(wide), shape)
    total = jnp.zeros(table.shape, wide).at[rows].add(updates, mode="drop")
    return total.astype(table.dtype), None


_low_precision_lookup.defvjp(_lookup_forward, _lookup_backward)


class NgramEmbedding(nnx.Module):
    """One fused table [tables · rows, D]; the rows of a byte are looked up and summed."""

    def __init__(self, count: int, dim: int, *, rngs: nnx.Rngs):
        self.dim, init = dim, fan_in_normal(dim)
        self.embedding = nnx.Param(init(rngs.params(), (count, dim), jnp.float32))

    def __call__(
        self, rows: Int[Array, "*batch E"], like: Float[Array, "..."]
    ) -> Float[Array, "*batch D"]:
        """Embeddings of `rows` from `ngram_rows`; a row past the table adds nothing (padding).

        They have the dtype of `like`; that of the table may be wider.
        """
        table = vary_like(self.embedding[...], rows)
        find = _low_precision_lookup if is_low_precision(like) else _lookup

        def rounded(table: Array, rows: Array) -> Array:
            return find(table, rows, like.dtype)

        return by_columns(rounded, table, rows, self.dim)
