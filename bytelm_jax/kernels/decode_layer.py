"""A transformer layer for one new position a row, in three or five kernels on a GPU.

The layers of both architectures are pre-norm: x += attention(norm(x)); x += feedforward(norm(x)).
Five kernels: norm and projection; rotation, cache and attention; its output and the residual; norm,
hidden layer and activation; the output and the residual. Three where the layer is small
(`decode_small`).

Pallas is imported where it is needed alone, since that takes a while.

Axes: B rows, D width, S positions of a cache, G key heads, K head width, M vectors.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels import decode_sums
from bytelm_jax.kernels.decode_choice import decode_form, weights_of
from bytelm_jax.kernels.decode_weights import (
    Columns,
    CrossWeights,
    Heads,
    LayerWeights,
    suits,
    suits_small,
)


def decode_layer(
    x: Float[Array, "B 1 D"],
    weights: LayerWeights,
    activation: str,
    caches: tuple[Columns, Columns],
    index: int | Int[Array, " B"],
    first: Int[Array, " B"],
    rope: tuple[Array, Array] | None,
    heads: Heads,
    write: bool = True,
    window: int = 0,
) -> tuple[Float[Array, "B 1 D"], Array, Array]:
    """The layer's output, and the new caches or, unless written, the new key and value alone."""
    form, linear = decode_form(), _linear()
    keys, values, rows, w = *caches, x[:, 0], weights
    at: Any = index
    new: Any
    if rope is not None:
        rope = rope[0][:, 0], rope[1][:, 0]
    if form.layers == "three" and write and suits_small(rows.shape[1], heads, rope):
        from bytelm_jax.kernels.decode_small import out_and_up, project_and_attend

        attended, *new = project_and_attend(
            rows, w.attention_norm, w.projection, keys, values, at, first, heads
        )
        rows, hidden = out_and_up(attended, w.out, rows, w.feedforward_norm, w.up, activation)
    else:
        projected = linear(rows, w.projection, w.attention_norm)
        if form.attends_by_kernel:
            from bytelm_jax.kernels.decode_attention import attend

            attended, *new = attend(projected, keys, values, at, first, rope, heads, write)
        else:
            attended, *new = decode_sums.attend(
                projected, keys, values, at, first, rope, heads, write, window
            )
        rows = linear(attended, w.out, residual=rows)
        hidden = linear(rows, w.up, w.feedforward_norm, activation)
    rows = linear(hidden, w.down, residual=rows)
    return rows[:, None], *new


def _linear() -> Callable[..., Array]:
    if decode_form().layers == "sums":
        return decode_sums.linear
    from bytelm_jax.kernels.decode_linear import linear

    return linear


def decode_cross(
    x: Float[Array, "B 1 D"],
    weights: CrossWeights,
    keys: Columns,
    values: Columns,
    heads: Heads,
    vectors: int,
) -> Float[Array, "B 1 D"]:
    """2x + attention(norm(x)) to M vectors of each row, in two or three kernels."""
    if decode_form().layers == "sums":
        read = decode_sums.query_and_read
    else:
        from bytelm_jax.kernels.decode_small import query_and_read as read
    rows = x[:, 0]
    mixed = read(rows, weights.norm, weights.queries, keys, values, heads, vectors)
    return _linear()(mixed, weights.out, residual=rows, times=2)[:, None]


def decode_states(module: object, x: Float[Array, "*batch D"]) -> Array | None:
    """Keys and values [..., 2GK] of what a layer reads, of few rows; None where they are no few."""
    weights = weights_of(module, math.prod(x.shape[:-1]))
    if weights is None or not suits(x.shape[-1]):
        return None
    rows = x.reshape(-1, x.shape[-1])
    out = _linear()(rows, weights.states, weights.state_norm)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def decode_logits(module: object, x: Float[Array, "*batch D"], size: int) -> Array | None:
    """The logits [..., V] of few rows in at least float32, or None where they are no few."""
    weights = weights_of(module, math.prod(x.shape[:-1]))
    if weights is None or not suits(x.shape[-1]):
        return None
    rows, dtype = x.reshape(-1, x.shape[-1]), jnp.promote_types(x.dtype, jnp.float32)
    out = _linear()(rows, weights, outputs=size, dtype=dtype)
    return out.reshape(*x.shape[:-1], size)
