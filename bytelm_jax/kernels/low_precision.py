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
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.kernels.lookup import vary_like
from bytelm_jax.kernels.normalization import rescale, standardize

_ROWS = 4
"""Rows for each input of the kernel from which on folding pays: it is a pass over the kernel."""


@runtime_checkable
class Norm(Protocol):
    """What is asked of a normalisation layer."""

    centred: ClassVar[bool]
    """Whether the mean is taken off, and a bias `bias` added."""
    scale: Any

    def __call__(self, x: Any, /) -> Any:
        """The layer itself."""
        ...


def normalized_linears(
    norm: Norm, x: Float[Array, "*batch D"], *linears: nnx.Linear
) -> tuple[Float[Array, "*batch _"], ...]:
    """Each of `linears` of norm(x)."""
    count = math.prod(x.shape[:-1])
    if not is_low_precision(x) or count < _ROWS * x.shape[-1]:
        x = norm(x)
        return tuple(linear(x) for linear in linears)
    rows = normalized(x.reshape(count, x.shape[-1]), norm.centred)
    outputs = (folded(norm, linear, rows) for linear in linears)
    return tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outputs)


def linear_of_rows(linear: nnx.Linear, x: Float[Array, "*batch D"]) -> Float[Array, "*batch _"]:
    """linear(x)."""
    return _on_rows(linear, x) if is_low_precision(x) else linear(x)


def unrounded_linear(linear: nnx.Linear, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """linear(x) in at least float32; of 16-bit inputs, the products are, too."""
    if not is_low_precision(x):
        return nnx.Linear.__call__(linear, x)

    def on_matrix(rows: Array) -> Array:
        out = _wide_product(rows, vary_like(linear.kernel[...].astype(rows.dtype), rows))
        return out if linear.bias is None else out + linear.bias[...].astype(out.dtype)[None]

    return _on_rows(on_matrix, x)


def _on_rows(function: Callable[[Array], Array], x: Array) -> Array:
    out = function(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def folded(norm: Norm, linear: nnx.Linear, rows: Float[Array, "N D"]) -> Float[Array, "N _"]:
    """The linear of the norm whose `normalized` values are `rows`.

    The scale goes into the kernel, and the norm's bias through it, in at least float32.
    """
    kernel = linear.kernel[...]
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scaled = (wide * norm.scale[...].astype(wide.dtype)[:, None]).astype(kernel.dtype)
    out, bias = rows @ scaled, None if linear.bias is None else linear.bias[...].astype(wide.dtype)
    if norm.centred:
        shift: Any = norm
        moved = jnp.sum(wide * shift.bias[...].astype(wide.dtype)[:, None], axis=0)
        bias = moved if bias is None else moved + bias
    return out if bias is None else out + bias[None].astype(rows.dtype)


def normalized(x: Float[Array, "*batch D"], centred: bool) -> Float[Array, "*batch D"]:
    """What a norm makes of x before its scale and bias: LayerNorm if `centred`, else RMSNorm.

    The backward pass reads the result again, in its own dtype, and no wider copy of it.
    """
    return _normalized(x, centred)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normalized(x: Array, centred: bool) -> Array:
    return _normalized_forward(x, centred)[0]


def _normalized_forward(x: Array, centred: bool) -> tuple[Array, tuple[Array, Array]]:
    values, inverse = standardize(x) if centred else rescale(x)
    out = values.astype(x.dtype)
    return out, (out, inverse)


def _normalized_backward(
    centred: bool, residuals: tuple[Array, Array], gradient: Array
) -> tuple[Array]:
    out, inverse = residuals
    wide, gradient = out.astype(inverse.dtype), gradient.astype(inverse.dtype)
    along = (gradient * wide).mean(axis=-1, keepdims=True)
    rest = gradient - wide * along
    if centred:
        rest = rest - gradient.mean(axis=-1, keepdims=True)
    return ((inverse * rest).astype(out.dtype),)


_normalized.defvjp(_normalized_forward, _normalized_backward)


@jax.custom_vjp
def _wide_product(rows: Float[Array, "N D"], kernel: Float[Array, "D V"]) -> Float[Array, "N V"]:
    return jnp.matmul(rows, kernel, preferred_element_type=jnp.float32)


def _wide_forward(rows: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _wide_product(rows, kernel), (rows, kernel)


def _wide_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Rounded first: a product of float32 with 16 bits would be one of float32.
    rows, kernel = residuals
    gradient = gradient.astype(rows.dtype)
    return gradient @ kernel.T, rows.T @ gradient


_wide_product.defvjp(_wide_forward, _wide_backward)
