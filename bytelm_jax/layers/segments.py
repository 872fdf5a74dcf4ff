"""Sums, maxima and reads over the patches of a text, in time linear in its bytes.

Axes: B batch, T bytes, N patches, F features. `patch_of` [B, T] holds the patch of each byte; a
byte whose patch is N or more belongs to none: it adds nothing and reads zeros. `is_sorted` says
that numbers never fall along a row, as they may at pads inside a segment.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.kernels.segment_sum import (
    largest_in_segment,
    rounded_segment_sum,
    rows_of,
    segment_sum,
)


def take_segments(
    x: Float[Array, "B N F"], patch_of: Int[Array, "B T"], is_sorted: bool = False
) -> Float[Array, "B T F"]:
    """The row of `x` that belongs to the patch of each byte."""
    if is_low_precision(x):
        return _low_precision_take(x, patch_of, is_sorted)
    return rows_of(x, patch_of)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _low_precision_take(x: Array, patch_of: Array, is_sorted: bool) -> Array:
    return rows_of(x, patch_of)


def _take_forward(x: Array, patch_of: Array, is_sorted: bool) -> tuple[Array, tuple[Array, Array]]:
    return rows_of(x, patch_of), (x, patch_of)


def _take_backward(
    is_sorted: bool, residual: tuple[Array, Array], gradient: Array
) -> tuple[Array, None]:
    x, patch_of = residual
    return rounded_segment_sum(gradient, patch_of, x.shape[1], is_sorted), None


_low_precision_take.defvjp(_take_forward, _take_backward)


def segment_max(
    x: Float[Array, "B T F"], patch_of: Int[Array, "B T"], count: int, is_sorted: bool = False
) -> Float[Array, "B {count} F"]:
    """Maximum over the bytes of each patch; 0 for a patch without bytes.

    Bytes that share a maximum share its gradient equally, as in PyTorch.
    """
    chosen = _low_precision_max if is_low_precision(x) else _segment_max
    return chosen(x, patch_of, count, is_sorted)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _segment_max(x: Array, patch_of: Array, count: int, is_sorted: bool) -> Array:
    most = largest_in_segment(x, patch_of, count, is_sorted)
    return jnp.where(jnp.isneginf(most), jnp.zeros_like(most), most)


@_segment_max.defjvp
def _max_jvp(
    count: int, is_sorted: bool, primals: tuple[Array, Array], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    x, patch_of = primals
    most = _segment_max(x, patch_of, count, is_sorted)
    hit, ties = _hits(x, patch_of, most, is_sorted)
    change = segment_sum(jnp.where(hit, tangents[0], 0), patch_of, count, is_sorted)
    return most, change / ties.astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _low_precision_max(x: Array, patch_of: Array, count: int, is_sorted: bool) -> Array:
    return _segment_max(x, patch_of, count, is_sorted)


def _max_forward(
    x: Array, patch_of: Array, count: int, is_sorted: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    most = _segment_max(x, patch_of, count, is_sorted)
    return most, (x, patch_of, most)


def _max_backward(
    count: int, is_sorted: bool, residual: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, None]:
    x, patch_of, most = residual
    hit, ties = _hits(x, patch_of, most, is_sorted)
    share = gradient / ties.astype(gradient.dtype)
    return jnp.where(hit, take_segments(share, patch_of), jnp.zeros_like(x)), None


def _hits(x: Array, patch_of: Array, most: Array, is_sorted: bool) -> tuple[Array, Array]:
    """Which bytes have the maximum of their patch [B, T, F], and how many at least 1 [B, N, F]."""
    count = most.shape[1]
    hit = (patch_of < count)[..., None] & (x == take_segments(most, patch_of))
    ties = segment_sum(hit.astype(jnp.float32), patch_of, count, is_sorted)
    return hit, jnp.maximum(ties, 1)


_low_precision_max.defvjp(_max_forward, _max_backward)
