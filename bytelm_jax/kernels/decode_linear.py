"""Products of a few rows with weights, on a GPU: the norm before and what follows in one kernel.

A product with one row reads its weights once and does nothing else, so its time is their size
over the memory's speed, plus what a kernel costs to start. Weights are stored [N, K], so that a
product is a sum along the axis in which they lie, and a program of the grid computes a few of the N
outputs of up to four rows. It is written in Pallas for Triton.

A row's sums are formed by the same operations in the same order however many rows there are.

Axes: M rows, K inputs, N outputs, D width, F hidden width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from bytelm_jax.kernels.decode_choice import interpreted
from bytelm_jax.kernels.decode_weights import Normalization, Product, chunk_of
from bytelm_jax.kernels.normalization import EPSILON

ROWS = 4
"""The most rows of one program: what they share is the weights that it reads."""

_PROGRAMS = 256
"""Enough to keep the reads of a whole layer's weights in flight on some 132 multiprocessors."""

_WARPS = 4


class _Shape(NamedTuple):
    """What is compiled into a kernel: sizes, and which of its parts there are."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    inputs: int
    outputs: int
    block: int
    chunk: int
    rows: int
    normalized: bool
    centred: bool
    biased: bool
    activation: str
    residual: int


def block_of(outputs: int, least: int = 4) -> int:
    """The outputs of one program, a power of two that divides them."""
    block = min(outputs & -outputs, 16)
    while block > least and outputs // block < _PROGRAMS:
        block //= 2
    return block


def linear(
    x: Float[Array, "M K"],
    product: Product,
    norm: Normalization | None = None,
    activation: str = "",
    residual: Float[Array, "M N"] | None = None,
    times: int = 1,
    outputs: int = 0,
    dtype: Any = None,
) -> Float[Array, "M _"]:
    """act(norm(x) Wᵀ + b) + `times` · `residual`, in x's dtype or `dtype`; sums in float32.

    The activation is none, "gelu" or, for a product of gates and others, "silu": SiLU(gates) times
    the others, half as many. `outputs` leaves out what follows them.
    """
    stored_outputs = product.weight.shape[0] // (2 if activation == "silu" else 1)
    outputs = outputs or stored_outputs
    block, chunk = block_of(stored_outputs), chunk_of(x.shape[1])
    rows = 1 << (min(len(x), ROWS) - 1).bit_length()
    shape = _Shape(
        count=len(x),
        inputs=x.shape[1],
        outputs=outputs,
        block=block,
        chunk=chunk,
        rows=rows,
        normalized=norm is not None,
        centred=norm is not None and norm.bias is not None,
        biased=product.bias is not None,
        activation=activation,
        residual=times if residual is not None else 0,
    )
    return kernel_call(
        _linear_kernel,
        shape,
        (x, *(norm or ()), product.weight, product.bias, residual),
        (stored_outputs // block, -(-len(x) // rows)),
        jax.ShapeDtypeStruct((len(x), outputs), dtype or x.dtype),
        name="decode_linear",
    )


def kernel_call(
    kernel: Any,
    shape: Any,
    arrays: tuple[Array | None, ...],
    grid: tuple[int, ...],
    out_shape: Any,
    name: str,
    warps: int = _WARPS,
    aliases: tuple[tuple[int, int], ...] = (),
) -> Any:
    """`kernel(shape, *references)` over a grid, for the arrays that there are.

    By Triton, or interpreted where a test says so. Calls of one shape are traced once.
    """
    given = [array for array in arrays if array is not None]
    how = (kernel, shape, grid, out_shape, name, warps, aliases, interpreted())
    return _run(how, *given)


@functools.partial(jax.jit, static_argnums=0)
def _run(how: tuple[Any, ...], *arrays: Array) -> Any:
    kernel, shape, grid, out_shape, name, warps, aliases, interpret = how
    return pl.pallas_call(
        functools.partial(kernel, shape),
        out_shape=out_shape,
        grid=grid,
        interpret=interpret,
        input_output_aliases=dict(aliases),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        name=name,
    )(*arrays)


def wide(x: Array) -> Array:
    """x in float32, or as it is if it is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def read_row(ref: Any, row: Any, chunks: range, chunk: int) -> list[Array]:
    """A row of a matrix, chunk by chunk, in float32."""
    return [wide(ref[row, pl.ds(c * chunk, chunk)]) for c in chunks]


def normalize(row: list[Array], width: int, scale: Any, bias: Any, chunk: int) -> list[Array]:
    """A row's chunks normalised: by mean and deviation if there is a bias, else by the root."""
    if bias is not None:
        mean = _total(row).sum() / width
        row = [part - mean for part in row]
    square = _total([part * part for part in row]).sum() / width
    inverse = jax.lax.rsqrt(square + EPSILON)
    out = []
    for c, part in enumerate(row):
        at = pl.ds(c * chunk, chunk)
        part = part * inverse * wide(scale[at])
        out.append(part if bias is None else part + wide(bias[at]))
    return out


def _total(parts: list[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def activate(x: Array, activation: str, gates: Array | None = None) -> Array:
    """The activation of `linear`, in float32."""
    if activation == "gelu":
        return 0.5 * x * (1 + _erf(x * 0.5**0.5))
    if gates is not None:
        return gates * x / (1 + jnp.exp(-gates))
    return x


_ERF = (0.3275911, 1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""p and the coefficients of Abramowitz and Stegun 7.1.26, from the highest power on."""


def _erf(x: Array) -> Array:
    """The error function to 1.5e-7, which Pallas has not for Triton."""
    t = 1 / (1 + _ERF[0] * jnp.abs(x))
    tail = jnp.zeros_like(x)
    for coefficient in _ERF[1:]:
        tail = (tail + coefficient) * t
    return jnp.sign(x) * (1 - tail * jnp.exp(-x * x))


def _linear_kernel(shape: _Shape, *refs: Any) -> None:
    inputs = iter(refs)
    x = next(inputs)
    scale = next(inputs) if shape.normalized else None
    shift = next(inputs) if shape.centred else None
    weight = next(inputs)
    bias = next(inputs) if shape.biased else None
    residual = next(inputs) if shape.residual else None
    out = next(inputs)

    start = pl.program_id(0) * shape.block
    # Rows past the last are the last one again: they write what it writes.
    at = [
        jnp.minimum(pl.program_id(1) * shape.rows + r, shape.count - 1) for r in range(shape.rows)
    ]
    chunks = range(shape.inputs // shape.chunk)
    rows = [read_row(x, row, chunks, shape.chunk) for row in at]
    if shape.normalized:
        rows = [normalize(row, shape.inputs, scale, shift, shape.chunk) for row in rows]
    starts = [start] if shape.activation != "silu" else [start, start + shape.outputs]
    sums = [products(weight, s, shape.block, rows, shape.chunk) for s in starts]
    if bias is not None:
        sums = [
            [total + wide(bias[pl.ds(s, shape.block)]) for total in each]
            for s, each in zip(starts, sums, strict=True)
        ]
    for r, row in enumerate(at):
        gates = sums[0][r] if len(sums) == 2 else None
        total = activate(sums[-1][r], shape.activation, gates)
        if residual is not None:
            total = total + shape.residual * wide(residual[row, pl.ds(start, shape.block)])
        lanes = start + jnp.arange(shape.block)
        mask = lanes < shape.outputs if shape.outputs % shape.block else None
        plgpu.store(out.at[row, lanes], total.astype(out.dtype), mask=mask)


def products(
    weight: Any, start: Any, block: int, rows: list[list[Array]], chunk: int
) -> list[Array]:
    """The products of `block` rows of `weight` from `start` on with each of `rows`: [block] each.

    Products are added up by element over the chunks, and along the chunk at the end.
    """
    totals: list[Any] = [None] * len(rows)
    for c in range(len(rows[0])):
        tile = wide(weight[pl.ds(start, block), pl.ds(c * chunk, chunk)])
        for r, row in enumerate(rows):
            part = tile * row[c][None, :]
            totals[r] = part if totals[r] is None else totals[r] + part
    return [total.sum(axis=1) for total in totals]
