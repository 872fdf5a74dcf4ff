"""What decoding by sums reads: weights by output, caches as columns of arrays, sizes of heads.

Axes: B rows, K inputs, N outputs, S positions of a cache, G key heads, M vectors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.kernels.decode_choice import weights_of


class Normalization(NamedTuple):
    """A norm's scale [K], and its bias if it subtracts the mean: LayerNorm, otherwise RMSNorm."""

    scale: Array
    bias: Array | None


class Product(NamedTuple):
    """A linear layer as decoding reads it: weights [N, K] and a bias [N], or None.

    For a gated activation the gates come first among the N rows, then as many others.
    """

    weight: Array
    bias: Array | None
    scaled: Array | None = None
    """With a norm that subtracts the mean before it: the sums of its scale times the weights."""
    shifted: Array | None = None
    """The sums of that norm's bias times the weights, plus the bias."""


class LayerWeights(NamedTuple):
    """A layer's weights by output (`Product`)."""

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
    state_norm: Normalization
    states: Product
    """Keys and values of what is read."""


class Columns(NamedTuple):
    """Keys or values: `count` heads from `start` on of an array by head, [B, C, S, K].

    Of a flat array [B, F] they are `count` columns.
    """

    array: Array
    start: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Heads(NamedTuple):
    """How many heads there are, how many keys they share and how wide each is."""

    heads: int
    groups: int
    width: int


def product_of(*linears: nnx.Linear, norm: Normalization | None = None) -> Product:
    """Linear layers that share an input, as one product; all of them have a bias, or none.

    `norm` is the one before them.
    """
    biases = [linear.bias[...] for linear in linears if linear.bias is not None]
    weight = jnp.concatenate([linear.kernel[...].T for linear in linears], axis=0)
    bias = jnp.concatenate(biases) if biases else None
    if norm is None or norm.bias is None:
        return Product(weight, bias)
    wide = weight.astype(jnp.float32)
    scaled = (wide * norm.scale.astype(jnp.float32)[None]).sum(axis=1)
    shifted = (wide * norm.bias.astype(jnp.float32)[None]).sum(axis=1)
    return Product(weight, bias, scaled, shifted if bias is None else shifted + bias)


def as_columns(cache: Array | Columns) -> Columns:
    """Keys or values by head, [B, G, S, K], or of one head, [B, S, K]."""
    if isinstance(cache, Columns):
        return cache
    array = cache[:, None] if cache.ndim == 3 else cache
    return Columns(array, 0, array.shape[1])


def as_vectors(cache: Array | Columns, heads: Heads) -> tuple[int, Columns]:
    """How many vectors each row has, and them as columns: [B, 1, M, G, K] → [B, M · G · K]."""
    if isinstance(cache, Columns):
        return cache.count // (heads.groups * heads.width), cache
    return cache.shape[2], Columns(cache.reshape(len(cache), -1), 0, cache[0].size)


def packed_columns(packed: Float[Array, "B C S K"], template: Any) -> Any:
    """Keys and values of several layers as parts of the one array that holds them by head."""
    return _parts(packed, template, lambda leaf: leaf.shape[1])


def packed_vectors(packed: Float[Array, "B F"], template: Any) -> Any:
    """Keys and values of a patch's vectors, [1, 1, M, G, K], as columns of one array."""
    return _parts(packed, template, lambda leaf: leaf.size)


def _parts(packed: Array, template: Any, size: Callable[[Any], int]) -> Any:
    leaves, start = [], 0
    for leaf in jax.tree.leaves(template):
        leaves.append(Columns(packed, start, size(leaf)))
        start += size(leaf)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def layer_weights(module: object, x: Float[Array, "B T D"]) -> Any:
    """`LayerWeights` or `CrossWeights` of a layer, for one position of few rows; None otherwise."""
    weights = weights_of(module, x.shape[0])
    return weights if x.shape[1] == 1 and suits(x.shape[2]) else None


def suits(width: int) -> bool:
    """Whether rows of this width can be read in chunks that are worth a read."""
    return width % 32 == 0
