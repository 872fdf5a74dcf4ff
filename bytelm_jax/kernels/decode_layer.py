"""A transformer layer for one new position a row, in three or five kernels on a GPU.

The layers of both architectures are pre-norm: x += attention(norm(x)); x += feedforward(norm(x)).
Five kernels: norm and projection; rotation, cache and attention; its output and the residual; norm,
hidden layer and activation; the output and the residual. Three where the layer is small
(`decode_small`).

Pallas is imported where it is needed alone, since that takes a while.

Axes: B rows, D width, S positions of a cache, G key heads, K head width, M vectors.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
    index: Int[Array, " B"],
    first: Int[Array, " B"],
    rope: tuple[Array, Array] | None,
    heads: Heads,
    write: bool = True,
) -> tuple[Float[Array, "B 1 D"], Array, Array]:
    """The layer's output, and the new caches or, unless written, the new key and value alone."""
    from bytelm_jax.kernels.decode_attention import attend
    from bytelm_jax.kernels.decode_linear import linear
    from bytelm_jax.kernels.decode_small import out_and_up, project_and_attend

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
    from bytelm_jax.kernels.decode_linear import linear
    from bytelm_jax.kernels.decode_small import query_and_read

    rows = x[:, 0]
    mixed = query_and_read(rows, weights.norm, weights.queries, keys, values, heads, vectors)
    return linear(mixed, weights.out, residual=rows, times=2)[:, None]


def decode_logits(module: object, x: Float[Array, "B T D"], size: int) -> Array | None:
    """The logits [B, T, V] of few rows in at least float32, or None where they are no few."""
    weights = weights_of(module, x.shape[0] * x.shape[1])
    if weights is None or not suits(x.shape[2]):
        return None
    from bytelm_jax.kernels.decode_linear import linear

    rows = x.reshape(-1, x.shape[2])
    out = linear(rows, weights, outputs=size, dtype=jnp.promote_types(x.dtype, jnp.float32))
    return out.reshape(*x.shape[:2], size)
