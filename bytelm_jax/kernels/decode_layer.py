"""A transformer layer for one new position a row, in five sums on a GPU (`decode_sums`).

The layers of both architectures are pre-norm: x += attention(norm(x)); x += feedforward(norm(x)).

Axes: B rows, D width, S positions of a cache, G key heads, K head width, M vectors.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.decode_choice import weights_of
from bytelm_jax.kernels.decode_sums import attend, linear, query_and_read
from bytelm_jax.kernels.decode_weights import Columns, CrossWeights, Heads, LayerWeights, suits


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
    rows, w = x[:, 0], weights
    if rope is not None:
        rope = rope[0][:, 0], rope[1][:, 0]
    projected = linear(rows, w.projection, w.attention_norm)
    attended, keys, values = attend(projected, *caches, index, first, rope, heads, write, window)
    rows = linear(attended, w.out, residual=rows)
    hidden = linear(rows, w.up, w.feedforward_norm, activation)
    rows = linear(hidden, w.down, residual=rows)
    return rows[:, None], keys, values


def decode_cross(
    x: Float[Array, "B 1 D"],
    weights: CrossWeights,
    keys: Columns,
    values: Columns,
    heads: Heads,
    vectors: int,
) -> Float[Array, "B 1 D"]:
    """2x + attention(norm(x)) to M vectors of each row."""
    rows = x[:, 0]
    mixed = query_and_read(rows, weights.norm, weights.queries, keys, values, heads, vectors)
    return linear(mixed, weights.out, residual=rows, times=2)[:, None]


def decode_states(module: object, x: Float[Array, "*batch D"]) -> Array | None:
    """Keys and values [..., 2GK] of what a layer reads, of few rows; None where they are no few."""
    weights = weights_of(module, math.prod(x.shape[:-1]))
    if weights is None or not suits(x.shape[-1]):
        return None
    rows = x.reshape(-1, x.shape[-1])
    out = linear(rows, weights.states, weights.state_norm)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def decode_logits(module: object, x: Float[Array, "*batch D"]) -> Array | None:
    """The logits [..., V] of few rows in at least float32, or None where they are no few."""
    weights = weights_of(module, math.prod(x.shape[:-1]))
    if weights is None or not suits(x.shape[-1]):
        return None
    rows, dtype = x.reshape(-1, x.shape[-1]), jnp.promote_types(x.dtype, jnp.float32)
    out = linear(rows, weights, dtype=dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])
