"""Products of sorted rows with the matrix of their group, by JAX's Pallas kernel for TPUs.

XLA's own gradient of `jax.lax.ragged_dot` by the matrices multiplies every row with every group and
masks afterwards. Here the work of the product and of both gradients is that of the rows, up to a
tile of rows for each group (Gale et al. 2022, "MegaBlocks", arXiv 2211.15841).

Axes: M rows, G groups, I inputs, O outputs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.lookup import vary_like
from bytelm_jax.kernels.pallas import call_kernel

SMALLEST_TILE = 128
"""Rows of the smallest tile: M must be a multiple of it."""

_TILE = 512
"""Most rows of a tile, and most columns."""


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: at most an eighth of what falls to a group, since groups end within tiles."""
    tile = _TILE
    while tile > SMALLEST_TILE and (rows % tile or 8 * tile * groups > rows):
        tile //= 2
    return tile


def tiled_matmul(
    x: Float[Array, "M I"],
    kernels: Float[Array, "G I O"],
    sizes: Int[Array, " G"],
    interpret: bool = False,
) -> Float[Array, "M O"]:
    """Each row times the matrix of its group; group g has the next `sizes[g]` rows.

    `sizes` are int32 and sum to M, a multiple of 128. Sums are in float32, rounded once. It has a
    gradient, but no forward mode. `interpret` runs the kernel on a CPU.
    """
    return _product(interpret, x, vary_like(kernels, x), vary_like(sizes, x))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(interpret: bool, x: Array, kernels: Array, sizes: Array) -> Array:
    return _by_group(interpret, x, kernels, sizes, transposed=False)


def _forward(interpret: bool, x: Array, kernels: Array, sizes: Array) -> tuple[Array, Any]:
    return _product(interpret, x, kernels, sizes), (x, kernels, sizes)


def _backward(interpret: bool, residuals: Any, gradient: Array) -> tuple[Array, Array, None]:
    x, kernels, sizes = residuals
    to_x = _by_group(interpret, gradient, kernels, sizes, transposed=True)
    return to_x, _outer(interpret, x, gradient, sizes, kernels), None


_product.defvjp(_forward, _backward)


def _by_group(
    interpret: bool, x: Array, kernels: Array, sizes: Array, transposed: bool
) -> Float[Array, "M _"]:
    """The product with each group's matrix, or with its transpose."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # a CPU or GPU has no use for it

    outputs = kernels.shape[1 if transposed else 2]
    tiling = (tile_rows(len(x), len(kernels)), min(x.shape[1], _TILE), min(outputs, _TILE))

    def run(x: Array, kernels: Array, sizes: Array) -> Array:
        form = {"transpose_rhs": transposed, "interpret": interpret}
        return gmm(x, kernels, sizes, x.dtype, tiling, **form)

    return call_kernel(run, x, x, kernels, sizes)


def _outer(
    interpret: bool, x: Array, gradient: Array, sizes: Array, kernels: Array
) -> Float[Array, "G I O"]:
    """The sum over each group's rows of x ⊗ gradient; zeros for a group without rows."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    count, inputs, outputs = kernels.shape
    tiling = (tile_rows(len(x), count), min(inputs, _TILE), min(outputs, _TILE))

    def run(x: Array, gradient: Array, sizes: Array) -> Array:
        sums = tgmm(x.T, gradient, sizes, kernels.dtype, tiling, interpret=interpret)
        return jnp.where(sizes[:, None, None] > 0, sums, 0)

    return call_kernel(run, x, x, gradient, sizes)
