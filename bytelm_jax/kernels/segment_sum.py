"""Sums over the patches of a text, in time linear in its bytes.

Axes: B batch, T bytes, N patches, F features. `patch_of` [B, T] holds the patch of each byte; a
byte whose patch is N or more belongs to none: it adds nothing.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.backend import backend
from bytelm_jax.kernels.dtypes import is_low_precision

_FEW = 1024
"""Most patches for which products are used: they make that many zeros and ones per byte."""

_MANY = 4096
"""Most patches for which a GPU makes them only so that sums have one order."""

_MATRIX_BACKENDS = ("gpu", "tpu")
"""Where products are cheap enough for it."""


def segment_sum(
    x: Float[Array, "B T F"], patch_of: Int[Array, "B T"], count: int, is_sorted: bool = False
) -> Float[Array, "B {count} F"]:
    """Sum over the bytes of each patch; 0 for a patch without bytes.

    `is_sorted` says that patch numbers never fall along a row. A GPU adds rows that collide in any
    order, so that the last digits of two runs differ.
    """
    reduce = partial(jax.ops.segment_sum, num_segments=count, **_order(is_sorted))
    return jax.vmap(reduce)(x, patch_of)


def ordered_segment_sum(
    x: Float[Array, "B T F"],
    patch_of: Int[Array, "B T"],
    count: int,
    is_sorted: bool = False,
    kept: jnp.dtype | None = None,
) -> Float[Array, "B {count} F"]:
    """`segment_sum` of at least 32 bits in one order, whatever else the batch holds.

    `kept` is the dtype to which the sums will be rounded, by default that of x. With more than
    4,096 patches a GPU has no order.
    """
    if count > _MANY or backend() != "gpu":
        return segment_sum(x, patch_of, count, is_sorted)
    if kept is not None and kept.itemsize == 2:
        return _sum_of_halves(x, patch_of, count)
    return _product(x, patch_of, count, x.dtype)


def rows_of(x: Float[Array, "B N F"], patch_of: Int[Array, "B T"]) -> Float[Array, "B T F"]:
    """The row of each byte's patch; zeros for a byte that belongs to none."""
    read = lambda row, at: row.at[at].get(mode="fill", fill_value=0)  # noqa: E731
    return jax.vmap(read)(x, patch_of)


def largest_in_segment(
    x: Float[Array, "B T F"], patch_of: Int[Array, "B T"], count: int, is_sorted: bool = False
) -> Float[Array, "B {count} F"]:
    """Maximum over the bytes of each patch; -inf for a patch without bytes.

    A GPU compares 32 bits in memory at once; 16 are half of a word, which every thread reads and
    writes again until no other has changed it meanwhile, its neighbour included.
    """
    reduce = partial(jax.ops.segment_max, num_segments=count, **_order(is_sorted))
    if is_low_precision(x) and backend() == "gpu":
        return jax.vmap(reduce)(x.astype(jnp.float32), patch_of).astype(x.dtype)
    return jax.vmap(reduce)(x, patch_of)


def _order(is_sorted: bool) -> dict[str, bool]:
    """What a TPU's compiler is told, which sorts the numbers otherwise; others do not use it."""
    return {"indices_are_sorted": True} if is_sorted and backend() == "tpu" else {}


def rounded_segment_sum(
    x: Float[Array, "B T F"], patch_of: Int[Array, "B T"], count: int, is_sorted: bool = False
) -> Float[Array, "B {count} F"]:
    """`segment_sum` in at least float32, rounded once to the dtype of x."""
    if is_low_precision(x) and count <= _FEW and backend() in _MATRIX_BACKENDS:
        return _sum_by_product(x, patch_of, count)
    # All bytes of a patch add to one row: in bfloat16 a long patch would lose digits.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return segment_sum(wide, patch_of, count, is_sorted).astype(x.dtype)


def _sum_by_product(x: Array, patch_of: Array, count: int) -> Array:
    """`segment_sum` in 16-bit dtypes, rounded once, as a product with zeros and ones.

    With few patches this is faster on a GPU than adding rows that collide: it saves 0.4 ms of a
    step of `blt_767m` on an H100. On a TPU the rows would be widened in memory first: of 4 x 2,048
    rows of 4,096 numbers into 691 patches, v5e's compiler estimates that at 874,000 cycles, and the
    whole product at 679,000.
    """
    return _product(x, patch_of, count, jnp.float32).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sum_of_halves(x: Array, patch_of: Array, count: int) -> Array:
    """`segment_sum` of 32 bits from products of 16, with 16 of the 24 digits of x."""
    first = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    halves = jnp.concatenate([first, x - first], axis=-1).astype(jnp.bfloat16)
    both = _product(halves, patch_of, count, x.dtype)
    return both[..., : x.shape[-1]] + both[..., x.shape[-1] :]


def _halves_forward(x: Array, patch_of: Array, count: int) -> tuple[Array, Array]:
    return _sum_of_halves(x, patch_of, count), patch_of


def _halves_backward(count: int, patch_of: Array, gradient: Array) -> tuple[Array, None]:
    return rows_of(gradient, patch_of), None


_sum_of_halves.defvjp(_halves_forward, _halves_backward)


def _product(x: Array, patch_of: Array, count: int, wide: Any) -> Array:
    """The product with zeros and ones, summed in `wide`; it loses no digit of x."""
    members = patch_of[:, None, :] == jnp.arange(count)[None, :, None]
    return jnp.einsum(
        "bnt,btf->bnf", members.astype(x.dtype), x, preferred_element_type=wide,
        precision=None if is_low_precision(x) else jax.lax.Precision.HIGHEST,
    )  # fmt: skip
