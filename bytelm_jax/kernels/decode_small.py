"""A layer's first two thirds for a few rows in two kernels on a GPU, where the layer is small.

MEGABYTE's local layers, 256 wide, hold 1.4 MB: what a kernel costs to start is more than what
it reads. So programs compute again what they would otherwise wait for: those of the heads all
compute the one key, and those of the hidden layer all compute the attention's output.

Axes: M rows, S positions of a cache, H heads in G groups, K head width, D width, F hidden width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.decode_attention import mix, store_new
from bytelm_jax.kernels.decode_linear import (
    ROWS,
    activate,
    block_of,
    kernel_call,
    normalize,
    products,
    read_row,
    wide,
)
from bytelm_jax.kernels.decode_weights import (
    PART,
    Columns,
    Heads,
    Normalization,
    Product,
    chunk_of,
)

_WARPS = 8


class _Shape(NamedTuple):
    heads: Heads
    width: int
    centred: bool
    keys: int = 0
    values: int = 0
    length: int = 0
    vectors: int = 0


def project_and_attend(
    x: Float[Array, "M D"],
    norm: Normalization,
    projection: Product,
    keys: Columns,
    values: Columns,
    index: Int[Array, " M"],
    first: Int[Array, " M"],
    heads: Heads,
) -> tuple[Float[Array, "M D"], Array, Array]:
    """`attend` to what it projects from norm(x) itself, without a rotation; caches are written."""
    rows, length = len(x), keys.array.shape[2]
    shape = _Shape(heads, x.shape[1], norm.bias is not None, keys.start, values.start, length)
    arrays = (x, *norm, projection.weight, index, first, keys.array, values.array)
    count = sum(array is not None for array in arrays)
    out = jax.ShapeDtypeStruct((rows, heads.heads * heads.width), x.dtype)
    new = tuple(jax.ShapeDtypeStruct(c.array.shape, c.array.dtype) for c in (keys, values))
    return kernel_call(
        _project_kernel,
        shape,
        arrays,
        (heads.heads, rows),
        (out, *new),
        name="decode_project_attend",
        warps=_WARPS,
        aliases=((count - 2, 1), (count - 1, 2)),
    )


def _project_kernel(shape: _Shape, *refs: Any) -> None:
    inputs = iter(refs)
    x, scale = next(inputs), next(inputs)
    shift = next(inputs) if shape.centred else None
    weight, index, first, keys, values, out, *new = inputs
    (heads, groups, width), row, head = shape.heads, pl.program_id(1), pl.program_id(0)
    group, here = head // (heads // groups), index[row]
    values_of = _normalized_row(shape, x, row, scale, shift)
    chunk = chunk_of(shape.width)

    def project(column: Any) -> Array:
        (total,) = products(weight, column * width, width, [values_of], chunk)
        return total.astype(x.dtype)

    q, k, v = project(head), project(heads + group), project(heads + groups + group)
    inside, is_first = jnp.full((width,), True), head % (heads // groups) == 0
    columns = (shape.keys + group, shape.values + group, jnp.arange(width), inside)
    store_new(new, (k, v), (row, here, shape.length), columns, is_first)
    where = (row, first[row], here)
    mixed = mix((q, k, v), (keys, values), where, columns, shape.length, width)
    out[row, pl.ds(head * width, width)] = mixed.astype(out.dtype)


def _normalized_row(shape: _Shape, x: Any, row: Any, scale: Any, shift: Any) -> list[Array]:
    chunk = chunk_of(shape.width)
    parts = read_row(x, row, range(shape.width // chunk), chunk)
    return normalize(parts, shape.width, scale, shift, chunk)


def query_and_read(
    x: Float[Array, "M D"],
    norm: Normalization,
    projection: Product,
    keys: Columns,
    values: Columns,
    heads: Heads,
    vectors: int,
) -> Float[Array, "M D"]:
    """Attention of the queries of norm(x) to a few vectors of each row.

    Their keys lie one after the other in the columns of `keys` [M, C], and so do their values.
    """
    shape = _Shape(
        heads, x.shape[1], norm.bias is not None, keys.start, values.start, vectors=vectors
    )
    return kernel_call(
        _read_kernel,
        shape,
        (x, *norm, projection.weight, keys.array, values.array),
        (heads.heads, len(x)),
        jax.ShapeDtypeStruct((len(x), heads.heads * heads.width), x.dtype),
        name="decode_read",
        warps=_WARPS,
    )


def _read_kernel(shape: _Shape, *refs: Any) -> None:
    inputs = iter(refs)
    x, scale = next(inputs), next(inputs)
    shift = next(inputs) if shape.centred else None
    weight, keys, values, out = inputs
    (heads, groups, width), row, head = shape.heads, pl.program_id(1), pl.program_id(0)
    group = head // (heads // groups)
    values_of, chunk = _normalized_row(shape, x, row, scale, shift), chunk_of(shape.width)
    (q,) = products(weight, head * width, width, [values_of], chunk)
    q = wide(q.astype(x.dtype)) * width**-0.5

    def vector(ref: Any, start: int, number: int) -> Array:
        return wide(ref[row, pl.ds(start + (number * groups + group) * width, width)])

    scores = [(q * vector(keys, shape.keys, m)).sum(axis=0) for m in range(shape.vectors)]
    most = functools.reduce(jnp.maximum, scores)
    weights = [jnp.exp(score - most) for score in scores]
    total = functools.reduce(jnp.add, weights)
    shares = [share * vector(values, shape.values, m) for m, share in enumerate(weights)]
    mixed = functools.reduce(jnp.add, shares) / total
    out[row, pl.ds(head * width, width)] = mixed.astype(out.dtype)


class _Hidden(NamedTuple):
    rows: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    width: int
    outputs: int
    block: int
    centred: bool
    biased: bool
    activation: str


def out_and_up(
    attended: Float[Array, "M D"],
    out: Product,
    x: Float[Array, "M D"],
    norm: Normalization,
    up: Product,
    activation: str,
) -> tuple[Float[Array, "M D"], Float[Array, "M F"]]:
    """x + attended Wᵀ, and act(norm(that) Uᵀ + b): what the feed-forward layer hides."""
    outputs = up.weight.shape[0] // (2 if activation == "silu" else 1)
    rows = 1 << (min(len(x), ROWS) - 1).bit_length()
    block = block_of(outputs, least=16)
    shape = _Hidden(
        rows,
        len(x),
        x.shape[1],
        outputs,
        block,
        norm.bias is not None,
        up.bias is not None,
        activation,
    )
    return kernel_call(
        _hidden_kernel,
        shape,
        (attended, out.weight, x, *norm, up.weight, up.bias),
        (outputs // block, -(-len(x) // rows)),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((len(x), outputs), x.dtype),
        ),
        name="decode_out_up",
        warps=_WARPS,
    )


def _hidden_kernel(shape: _Hidden, *refs: Any) -> None:
    inputs = iter(refs)
    attended, weight, x, scale = (next(inputs) for _ in range(4))
    shift = next(inputs) if shape.centred else None
    up = next(inputs)
    bias = next(inputs) if shape.biased else None
    new_x, hidden = inputs
    at = [
        jnp.minimum(pl.program_id(1) * shape.rows + r, shape.count - 1) for r in range(shape.rows)
    ]
    chunk, parts = chunk_of(shape.width), range(shape.width // PART)
    mixed = [read_row(attended, row, range(shape.width // chunk), chunk) for row in at]
    rows: list[list[Array]] = [[] for _ in at]
    for part in parts:
        here = pl.ds(part * PART, PART)
        for r, total in enumerate(products(weight, part * PART, PART, mixed, chunk)):
            value = (total + wide(x[at[r], here])).astype(x.dtype)
            lanes = part * PART + jnp.arange(PART)
            mask = (lanes >= 0) & (pl.program_id(0) == 0)
            plgpu.store(new_x.at[at[r], lanes], value, mask=mask)
            rows[r].append(wide(value))
    rows = [normalize(row, shape.width, scale, shift, PART) for row in rows]
    start = pl.program_id(0) * shape.block
    starts = [start] if shape.activation != "silu" else [start, start + shape.outputs]
    sums = [products(up, s, shape.block, rows, PART) for s in starts]
    for r, row in enumerate(at):
        each = [
            total[r] if bias is None else total[r] + wide(bias[pl.ds(s, shape.block)])
            for s, total in zip(starts, sums, strict=True)
        ]
        gates = each[0] if len(each) == 2 else None
        value = activate(each[-1], shape.activation, gates)
        hidden[row, pl.ds(start, shape.block)] = value.astype(hidden.dtype)
