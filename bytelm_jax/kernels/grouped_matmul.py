"""Products in which every row has the matrix of its group: x[m] @ kernels[group[m]].

Rows are sorted by group. A CPU multiplies the runs with `jax.lax.ragged_dot`, and so does a TPU in
wider dtypes than 16 bits; in those it has a kernel (`megablox`). On a GPU `ragged_dot`
lowers to a product of every row with every matrix, masked afterwards, so there each run is padded
to whole blocks of one group, and the blocks are one batched product. No row is ever dropped, and a
row's result depends on that row and its matrix alone.

Axes: M rows, G groups, S slots (the sorted rows, padded), C blocks, I inputs and O outputs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bytelm_jax.kernels.backend import backend
from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.kernels.lookup import look_up, vary_like
from bytelm_jax.kernels.megablox import SMALLEST_TILE, tiled_matmul

_LARGEST_BLOCK = 512


class Groups(NamedTuple):
    """Where the rows go. `block=0` means runs without padding, for `ragged_dot`."""

    slot: Int[Array, " M"]
    """The slot of each row."""
    row: Int[Array, " S"]
    """The row of each slot; any row for an empty slot."""
    filled: Bool[Array, " S"]
    group: Int[Array, " S"]
    """The group of each slot."""
    sizes: Int[Array, " G"]
    block: int


def block_length(rows: int, groups: int) -> int:
    """Rows of a block, so that an eighth of the products is padding when the groups are even.

    One if there are fewer rows than groups, so that no matrix is read needlessly.
    """
    share = rows // (4 * groups)
    return min(1 << max(share.bit_length() - 1, 3), _LARGEST_BLOCK) if rows > groups else 1


def make_groups(group: Int[Array, " M"], count: int, block: int | None = None) -> Groups:
    """Sorts rows by group; `block` as in `Groups`, None for what is fast on this platform."""
    rows = group.shape[0]
    if block is None:
        block = block_length(rows, count) if backend() == "gpu" else 0
    order = jnp.argsort(group)
    rank = jnp.argsort(order)
    sizes = jnp.sum(group[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)
    if block <= 1:
        return Groups(rank, order, jnp.ones(rows, bool), group[order], sizes, block)
    runs = -(-sizes // block)  # blocks of each group
    shift = block * (jnp.cumsum(runs) - runs) - (jnp.cumsum(sizes) - sizes)
    slot = rank + shift[group]
    of_block = jnp.searchsorted(
        jnp.cumsum(runs), jnp.arange(rows // block + count), side="right", method="compare_all"
    )
    of_slot = jnp.repeat(jnp.minimum(of_block, count - 1), block)
    at = jnp.arange(of_slot.shape[0]) - shift[of_slot]  # position among the sorted rows
    ends = jnp.cumsum(sizes)[of_slot]
    filled = (at < ends) & jnp.repeat(of_block < count, block)
    return Groups(slot, order[jnp.clip(at, 0, rows - 1)], filled, of_slot, sizes, block)


def spread(x: Float[Array, "N I"], copies: int, groups: Groups) -> Float[Array, "S I"]:
    """Places row n of x in the slots of rows n · copies and so on: M = N · copies."""
    chosen = _low_precision_spread if is_low_precision(x) else _spread
    return chosen(x, groups.row // copies, groups.slot.reshape(len(x), copies))


@jax.custom_jvp
def _spread(x: Array, source: Array, slots: Array) -> Array:
    """`x[source]`, whose gradient is gathered through `slots` and summed instead of scattered."""
    return x[source]


@_spread.defjvp
def _spread_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    # Written by `slots`, since the transpose of a write is a read. Empty slots hold anything.
    (x, source, slots), change = primals, tangents[0]
    written = jnp.zeros((len(source), x.shape[1]), x.dtype)
    for j in range(slots.shape[1]):
        written = written.at[slots[:, j]].add(change)
    return _spread(x, source, slots), written


@jax.custom_vjp
def _low_precision_spread(x: Array, source: Array, slots: Array) -> Array:
    return x[source]


def _spread_forward(x: Array, source: Array, slots: Array) -> tuple[Array, Array]:
    return x[source], slots


def _spread_backward(slots: Array, gradient: Array) -> tuple[Array, None, None]:
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    parts = [gradient[slots[:, j]].astype(wide) for j in range(slots.shape[1])]
    return sum(parts[1:], parts[0]).astype(gradient.dtype), None, None


_low_precision_spread.defvjp(_spread_forward, _spread_backward)


def grouped_matmul(
    x: Float[Array, "S I"], kernels: Float[Array, "G I O"], groups: Groups
) -> Float[Array, "S O"]:
    """Each slot times the matrix of its group; empty slots hold arbitrary values."""
    if not groups.block:
        tiled = backend() == "tpu" and is_low_precision(x) and len(x) % SMALLEST_TILE == 0
        return (tiled_matmul if tiled else jax.lax.ragged_dot)(x, kernels, groups.sizes)
    blocks = x.shape[0] // groups.block
    flat = vary_like(kernels.reshape(kernels.shape[0], -1), groups.group)
    of_block = look_up(flat, groups.group[:: groups.block]).reshape(blocks, *kernels.shape[1:])
    return jnp.einsum(
        "cmi,cio->cmo", x.reshape(blocks, groups.block, x.shape[1]), of_block
    ).reshape(x.shape[0], kernels.shape[2])


def grouped_bias(bias: Float[Array, "G O"], groups: Groups) -> Float[Array, "S O"]:
    """The bias of each slot's group."""
    if not groups.block:
        # A one-hot product instead of indexed reads: its transpose is a product, too.
        return jax.nn.one_hot(groups.group, len(bias), dtype=bias.dtype) @ bias
    of_block = look_up(vary_like(bias, groups.group), groups.group[:: groups.block])
    return jnp.repeat(of_block, groups.block, axis=0)


def mix(
    x: Float[Array, "S O"],
    bias: Float[Array, "G O"],
    gates: Float[Array, "N k"],
    chosen: Int[Array, "N k"],
    groups: Groups,
) -> Float[Array, "N O"]:
    """Σ_j gates_j · (x in the slot of row (n, j) + bias of its group), in the gates' dtype."""
    bias = vary_like(bias, groups.group)
    form = _low_precision_mix if is_low_precision(x) else _mix
    return form(x, bias, gates, chosen, groups.slot.reshape(gates.shape), groups.row, groups.filled)


@jax.custom_jvp
def _mix(
    x: Array, bias: Array, gates: Array, chosen: Array, slots: Array, row: Array, filled: Array
) -> Array:
    wide = gates.dtype
    parts = [
        gates[:, j, None] * (x[slots[:, j]].astype(wide) + bias[chosen[:, j]].astype(wide))
        for j in range(gates.shape[1])
    ]
    return sum(parts[1:], parts[0]).astype(x.dtype)


@_mix.defjvp
def _mix_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, bias, gates, chosen, slots, row, filled = primals
    to_x, to_bias, to_gates = tangents[:3]
    count, wide = gates.shape[1], gates.dtype
    # Written by `row`, since the transpose of a write is a read; a slot beyond all rows drops out.
    shares = gates.reshape(-1)[row, None] * to_x.astype(wide)
    into = jnp.where(filled, row // count, len(gates))
    change = jnp.zeros((len(gates), x.shape[1]), wide).at[into].add(shares, mode="drop")
    hot = jax.nn.one_hot(chosen, len(bias), dtype=wide) * gates[..., None]
    change = change + hot.sum(axis=1) @ to_bias.astype(wide)
    for j in range(count):
        value = x[slots[:, j]].astype(wide) + bias[chosen[:, j]].astype(wide)
        change = change + to_gates[:, j, None] * value
    return _mix(*primals), change.astype(x.dtype)


@jax.custom_vjp
def _low_precision_mix(*arrays: Array) -> Array:
    return _mix(*arrays)


def _mix_forward(*arrays: Array) -> tuple[Array, tuple]:
    return _mix(*arrays), arrays


def _mix_backward(residual: tuple, gradient: Array) -> tuple:
    x, bias, gates, chosen, slots, row, filled = residual
    wide = gates.dtype
    shares = jnp.where(filled, gates.reshape(-1)[row], 0)[:, None]
    to_x = (shares * gradient[row // gates.shape[1]].astype(wide)).astype(x.dtype)
    to_gates = [
        jnp.sum(
            gradient.astype(wide) * (x[slots[:, j]].astype(wide) + bias[chosen[:, j]].astype(wide)),
            axis=1,
        )
        for j in range(gates.shape[1])
    ]
    hot = jax.nn.one_hot(chosen, len(bias), dtype=wide) * gates[..., None]
    to_bias = jnp.einsum(
        "ne,no->eo", hot.sum(axis=1).astype(gradient.dtype), gradient, preferred_element_type=wide
    )
    return to_x, to_bias.astype(bias.dtype), jnp.stack(to_gates, axis=1), None, None, None, None


_low_precision_mix.defvjp(_mix_forward, _mix_backward)
