"""What linear layers do otherwise in 16 bits, for speed and for exactness.

The function is that of the plain layers, which every other dtype takes; the roundings differ.

A norm is folded into the linears behind it, and linears see rows. Measured on an H100 (README,
"Measured"): with several leading axes XLA kept MEGABYTE's activations with the batch innermost and
transposed them twice a layer; and the gradients of a norm's scale and bias are sums over all
positions, which the gradient of the kernel behind it already contains.

Logits are not rounded: in bfloat16 two of them are the same number at about one byte in a hundred.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.layers.embedding import vary_like
from bytelm_jax.layers.norm import LayerNorm, standardize

_ROWS = 4
"""Rows for each input of the kernel from which on folding pays: it is a pass over the kernel."""


def normalized_linears(
    norm: LayerNorm, x: Float[Array, "*batch D"], *linears: nnx.Linear
) -> tuple[Float[Array, "*batch _"], ...]:
    """Each of `linears` of norm(x)."""
    count = math.prod(x.shape[:-1])
    if x.dtype.itemsize != 2 or count < _ROWS * x.shape[-1]:
        x = norm(x)
        return tuple(linear(x) for linear in linears)
    rows = standardized(x.reshape(count, x.shape[-1]))
    outputs = (folded(norm, linear, rows) for linear in linears)
    return tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outputs)


def linear_of_rows(linear: nnx.Linear, x: Float[Array, "*batch D"]) -> Float[Array, "*batch _"]:
    """linear(x)."""
    return _on_rows(linear, x) if x.dtype.itemsize == 2 else linear(x)


def _on_rows(function: Callable[[Array], Array], x: Array) -> Array:
    out = function(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def folded(norm: LayerNorm, linear: nnx.Linear, rows: Float[Array, "N D"]) -> Float[Array, "N _"]:
    """The linear of the norm whose `standardized` values are `rows`.

    The scale goes into the kernel, and the norm's bias through it, in at least float32.
    """
    kernel = linear.kernel[...]
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    bias = jnp.sum(wide * norm.bias[...].astype(wide.dtype)[:, None], axis=0)
    if linear.bias is not None:
        bias = bias + linear.bias[...].astype(wide.dtype)
    scaled = (wide * norm.scale[...].astype(wide.dtype)[:, None]).astype(kernel.dtype)
    return rows @ scaled + bias[None].astype(rows.dtype)


@jax.custom_vjp
def standardized(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """(x − mean) / deviation over the last axis: layer normalisation before scale and bias.

    The backward pass reads the result again, in its own dtype, and no wider copy of it.
    """
    return _standardized_forward(x)[0]


def _standardized_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    values, inverse = standardize(x)
    out = values.astype(x.dtype)
    return out, (out, inverse)


def _standardized_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    out, inverse = kept
    wide, gradient = out.astype(inverse.dtype), gradient.astype(inverse.dtype)
    mean = gradient.mean(axis=-1, keepdims=True)
    along = (gradient * wide).mean(axis=-1, keepdims=True)
    return ((inverse * (gradient - mean - wide * along)).astype(out.dtype),)


standardized.defvjp(_standardized_forward, _standardized_backward)


class LogitsLinear(nnx.Linear):
    """A linear whose results are in at least float32; of 16-bit inputs, the products are, too."""

    def __call__(self, inputs: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        if inputs.dtype.itemsize != 2:
            return super().__call__(inputs)
        return _on_rows(self._unrounded, inputs)

    def _unrounded(self, rows: Float[Array, "N D"]) -> Float[Array, "N V"]:
        out = _wide_product(rows, vary_like(self.kernel[...].astype(rows.dtype), rows))
        return out if self.bias is None else out + self.bias[...].astype(out.dtype)[None]


@jax.custom_vjp
def _wide_product(rows: Float[Array, "N D"], kernel: Float[Array, "D V"]) -> Float[Array, "N V"]:
    return jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)


def _wide_forward(rows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide_product(rows, kernel), (rows, kernel)


def _wide_backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Rounded first: a product of float32 with 16 bits would be one of float32.
    rows, kernel = kept
    gradient = gradient.astype(rows.dtype)
    return gradient @ kernel.T, rows.T @ gradient


_wide_product.defvjp(_wide_forward, _wide_backward)
