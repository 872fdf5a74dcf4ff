"""What linear layers do differently in 16-bit dtypes, for speed and for exactness.

They compute the same function as the plain layers, which all other dtypes use; only the roundings
differ.

A norm is folded into the linear layers that follow it, and linear layers see flattened rows.
Measured on an H100 (docs/measured.md): with several leading axes XLA kept MEGABYTE's activations
with the batch innermost and transposed them twice per layer; and the gradients of a norm's scale
and bias are sums over all positions, which the gradient of the following kernel already contains.

Logits are not rounded: in bfloat16 the two largest would coincide at about one byte in a hundred.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.kernels.lookup import vary_like
from bytelm_jax.kernels.normalization import EPSILON, rescale, standardize
from bytelm_jax.kernels.rows import computed_whole, rows_in_program

_ROWS = 4
"""Rows per input of the kernel from which on folding pays: it costs a pass over the kernel."""


@runtime_checkable
class Norm(Protocol):
    """The interface that a normalisation layer must have."""

    centred: ClassVar[bool]
    """Whether the mean is subtracted and a bias `bias` added."""
    epsilon: float
    """What is added to the variance or the mean square."""
    scale: Any

    def __call__(self, x: Any, /) -> Any:
        """Applies the layer."""
        ...


def normalized_linears(
    norm: Norm, x: Float[Array, "*batch D"], *linears: nnx.Linear
) -> tuple[Float[Array, "*batch _"], ...]:
    """Each of `linears` applied to norm(x).

    The norm is folded only into layers that are nothing but their kernel and bias.
    """
    count = math.prod(x.shape[:-1])
    plain = all(type(linear) is nnx.Linear for linear in linears)
    if not plain or not is_low_precision(x) or rows_in_program(x.shape) < _ROWS * x.shape[-1]:
        x = norm(x)
        return tuple(linear(x) for linear in linears)
    rows = normalized(x.reshape(count, x.shape[-1]), norm.centred, norm.epsilon)
    outputs = (folded(norm, linear, rows) for linear in linears)
    return tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outputs)


def linear_of_rows(linear: nnx.Linear, x: Float[Array, "*batch D"]) -> Float[Array, "*batch _"]:
    """linear(x)."""
    return _on_rows(linear, x) if is_low_precision(x) else linear(x)


def unrounded_linear(linear: nnx.Linear, x: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """linear(x) in at least float32; for 16-bit inputs, the products are wide, too."""
    if not is_low_precision(x):
        return nnx.Linear.__call__(linear, x)

    def on_matrix(rows: Array) -> Array:
        out = _wide_product(rows, vary_like(linear.kernel[...].astype(rows.dtype), rows))
        return out if linear.bias is None else out + linear.bias[...].astype(out.dtype)[None]

    return _on_rows(on_matrix, x)


def linears_at_once(
    x: Float[Array, "*batch D"], *linears: nnx.Linear
) -> tuple[Float[Array, "*batch _"], ...]:
    """Each of `linears` applied to x, in at least float32, by one product.

    For layers with few outputs, whose time is that of reading x.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kernel = jnp.concatenate([linear.kernel[...] for linear in linears], axis=1)
    biases = [linear.bias[...] for linear in linears if linear.bias is not None]
    assert len(biases) == len(linears)
    if is_low_precision(x):
        out = _on_rows(lambda rows: _wide_product(rows, vary_like(kernel, rows)), x)
    else:
        out = x @ kernel
    bias = jnp.concatenate(biases).astype(wide)
    out = out + bias.reshape((1,) * (out.ndim - 1) + bias.shape)
    ends = np.cumsum([linear.out_features for linear in linears[:-1]])
    return tuple(jnp.split(out, ends, axis=-1))


def _on_rows(function: Callable[[Array], Array], x: Array) -> Array:
    out = function(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def folded(norm: Norm, linear: nnx.Linear, rows: Float[Array, "N D"]) -> Float[Array, "N _"]:
    """The linear layer applied to the norm whose `normalized` values are `rows`.

    The scale is folded into the kernel, and the norm's bias through it, in at least float32.
    """
    kernel = linear.kernel[...]
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scaled = computed_whole(_scaled, kernel, norm.scale[...])
    out, bias = rows @ scaled, None if linear.bias is None else linear.bias[...].astype(wide.dtype)
    if norm.centred:
        shift: Any = norm
        moved = jnp.sum(wide * shift.bias[...].astype(wide.dtype)[:, None], axis=0)
        bias = moved if bias is None else moved + bias
    return out if bias is None else out + bias[None].astype(rows.dtype)


def _scaled(kernel: Array, scale: Array) -> Array:
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return (wide * scale.astype(wide.dtype)[:, None]).astype(kernel.dtype)


def normalized(
    x: Float[Array, "*batch D"], centred: bool, epsilon: float = EPSILON
) -> Float[Array, "*batch D"]:
    """A norm of x before its scale and bias: LayerNorm if `centred`, otherwise RMSNorm.

    The backward pass reads the result, in its own dtype, instead of a wider copy.
    """
    return _normalized(x, centred, epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _normalized(x: Array, centred: bool, epsilon: float) -> Array:
    return _normalized_forward(x, centred, epsilon)[0]


def _normalized_forward(
    x: Array, centred: bool, epsilon: float
) -> tuple[Array, tuple[Array, Array]]:
    values, inverse = standardize(x) if centred else rescale(x, epsilon)
    out = values.astype(x.dtype)
    return out, (out, inverse)


def _normalized_backward(
    centred: bool, epsilon: float, residuals: tuple[Array, Array], gradient: Array
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
    # Rounded first: a product of float32 with a 16-bit dtype would be computed in float32.
    rows, kernel = residuals
    gradient = gradient.astype(rows.dtype)
    return gradient @ kernel.T, rows.T @ gradient


_wide_product.defvjp(_wide_forward, _wide_backward)
