"""A transformer layer for one new position a row, in three or five kernels on a GPU.

The layers of both architectures are pre-norm: x += attention(norm(x)); x += feedforward(norm(x)).
Five kernels: norm and projection; rotation, cache and attention; its output and the residual; norm,
hidden layer and activation; the output and the residual. Three where the layer is small
(`decode_small`).

Axes: B rows, D width, S positions of a cache, G key heads, K head width, M vectors.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.decode_attention import Columns, Heads, attend
from bytelm_jax.kernels.decode_choice import decode_form, weights_of
from bytelm_jax.kernels.decode_linear import Normalization, Product, linear, padded, suits
from bytelm_jax.kernels.decode_small import (
    out_and_up,
    project_and_attend,
    query_and_read,
    suits_heads,
    suits_small,
)


class LayerWeights(NamedTuple):
    """A layer's weights by output (`decode_linear.Product`)."""

    attention_norm: Normalization
    projection: Product
    """Queries, keys and values."""
    out: Product
    feedforward_norm: Normalization
    up: Product
    down: Product


class CrossWeights(NamedTuple):
    """The weights of a layer that only reads, by output."""

    norm: Normalization
    queries: Product
    out: Product


def as_columns(cache: Array | Columns) -> Columns:
    """Keys or values as columns, [B, S, G, K] or [B, S, K] → [B, S, G · K]."""
    if isinstance(cache, Columns):
        return cache
    return Columns(cache.reshape(*cache.shape[:2], -1), 0, cache[0, 0].size)


def as_vectors(cache: Array | Columns, heads: Heads) -> tuple[int, Columns]:
    """How many vectors each row has, and them as columns: [B, 1, M, G, K] → [B, M · G · K]."""
    if isinstance(cache, Columns):
        return cache.width // (heads.groups * heads.width), cache
    return cache.shape[2], Columns(cache.reshape(len(cache), -1), 0, cache[0].size)


def packed_columns(packed: Array, template: Any) -> Any:
    """A tree of caches as columns of the one array that holds them, without copies.

    `template` has the tree's structure and its shapes behind the array's leading axes.
    """
    lead, leaves, start = packed.ndim - 1, [], 0
    for leaf in jax.tree.leaves(template):
        width = math.prod(leaf.shape[lead:])
        leaves.append(Columns(packed, start, width))
        start += width
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def layer_weights(module: object, x: Float[Array, "B T D"]) -> LayerWeights | CrossWeights | None:
    """What is stored for a layer that computes one position of few rows; None if it is not."""
    weights = weights_of(module, x.shape[0])
    return weights if x.shape[1] == 1 and suits(x.shape[2]) else None


def decode_layer(
    x: Float[Array, "B 1 D"],
    weights: LayerWeights,
    activation: str,
    caches: tuple[Columns, Columns],
    index: Int[Array, " B"],
    first: Int[Array, " B"],
    rope: tuple[Array, Array] | None,
    heads: Heads,
    write: bool = True,
) -> tuple[Float[Array, "B 1 D"], Array, Array]:
    """The layer's output, and the new caches or, unless written, the new key and value alone."""
    keys, values, rows, w = *caches, x[:, 0], weights
    if rope is not None:
        rope = rope[0][:, 0], rope[1][:, 0]
    small = decode_form().layers == "three" and write and suits_small(rows.shape[1], heads, rope)
    if small:
        attended, *new = project_and_attend(
            rows, w.attention_norm, w.projection, keys, values, index, first, heads
        )
        rows, hidden = out_and_up(attended, w.out, rows, w.feedforward_norm, w.up, activation)
    else:
        projected = linear(rows, w.projection, w.attention_norm)
        attended, *new = attend(projected, keys, values, index, first, rope, heads, write)
        rows = linear(attended, w.out, residual=rows)
        hidden = linear(rows, w.up, w.feedforward_norm, activation)
    rows = linear(hidden, w.down, residual=rows)
    return rows[:, None], *new


def decode_cross(
    x: Float[Array, "B 1 D"],
    weights: CrossWeights,
    keys: Columns,
    values: Columns,
    heads: Heads,
    vectors: int,
) -> Float[Array, "B 1 D"]:
    """2x + attention(norm(x)) to M vectors of each row, in two kernels."""
    rows = x[:, 0]
    mixed = query_and_read(rows, weights.norm, weights.queries, keys, values, heads, vectors)
    return linear(mixed, weights.out, residual=rows, times=2)[:, None]


def suits_cross(heads: Heads) -> bool:
    """Whether `decode_cross` has kernels for these heads."""
    return suits_heads(heads)


def logits_weights(kernel: Float[Array, "D V"], bias: Float[Array, " V"] | None) -> Product:
    """An output layer's weights by output, with rows of zeros that fill the last block."""
    return Product(padded(kernel.T), None if bias is None else padded(bias))


def decode_logits(module: object, x: Float[Array, "B T D"], size: int) -> Array | None:
    """The logits [B, T, V] of few rows in at least float32, or None where they are no few."""
    weights = weights_of(module, x.shape[0] * x.shape[1])
    if weights is None or not suits(x.shape[2]):
        return None
    rows = x.reshape(-1, x.shape[2])
    out = linear(rows, weights, outputs=size, dtype=jnp.promote_types(x.dtype, jnp.float32))
    return out.reshape(*x.shape[:2], size)
