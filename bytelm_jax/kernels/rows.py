"""Work on rows that each device does on its own rows, with nothing to transfer.

Under `jit` the compiler divides a program over devices, and does so for products and sums. What
sorts or indexes along the rows (routing) it computes on every device for all of them, and kernels
that are no XLA operations (Pallas) it refuses to divide. Whoever knows that the rows of a batch
stand on several devices says so (`split_rows`), and such work is then cut explicitly.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

_split: ContextVar[tuple[Mesh, tuple[str, ...]] | None] = ContextVar("split", default=None)


_gathered: ContextVar[Mesh | None] = ContextVar("gathered", default=None)


_parts: ContextVar[int] = ContextVar("parts", default=1)


@contextlib.contextmanager
def one_part_of(parts: int) -> Iterator[None]:
    """Within this context, what is traced for one device stands for a program of `parts` of them.

    Under `jit` a layer that chooses by the number of its rows sees those of all devices.
    """
    before = _parts.set(parts)
    try:
        yield
    finally:
        _parts.reset(before)


def rows_in_program(shape: Sequence[int]) -> int:
    """The positions of an array of this shape, without its last axis, in the whole program."""
    return _parts.get() * math.prod(shape[:-1])


@contextlib.contextmanager
def split_rows(mesh: Mesh, axes: tuple[str, ...], gathered: bool = False) -> Iterator[None]:
    """Within this context, the rows of what is traced under `jit` stand along `axes` of `mesh`.

    `gathered` says that parameters were gathered, and are whole on every device of it.
    """
    before, whole = _split.set((mesh, axes)), _gathered.set(mesh if gathered else None)
    try:
        yield
    finally:
        _split.reset(before)
        _gathered.reset(whole)


def computed_whole(function: Callable[..., Array], *params: Array) -> Array:
    """`function` of gathered parameters, computed by every device for itself.

    Otherwise the compiler may cut it as the gradients of the parameters are cut, and gather the
    result at each use, beside the parameters themselves.
    """
    mesh = _gathered.get()
    return function(*params) if mesh is None else _on_every_device(mesh, function, *params)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_every_device(mesh: Mesh, function: Callable[..., Array], *params: Array) -> Array:
    # Apart from what the backward pass computes of the same parameters, which is cut.
    result = function(*map(jax.lax.optimization_barrier, params))
    return jax.lax.with_sharding_constraint(result, NamedSharding(mesh, jax.P()))


def _forward(
    mesh: Mesh, function: Callable[..., Array], *params: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _on_every_device(mesh, function, *params), params


def _backward(
    mesh: Mesh, function: Callable[..., Array], params: tuple[Array, ...], gradient: Array
) -> tuple[Array, ...]:
    return jax.vjp(function, *params)[1](gradient)


_on_every_device.defvjp(_forward, _backward)


def on_each_device(function: Callable[..., Any], shared: Any, *rows: Any) -> Any:
    """`function(shared, *rows)`, in which each device sees its own rows alone.

    The first axis of every array of `rows` and of the result are rows, of which those of a device
    are together; `shared` is whole on every device, and its gradient is summed over them.
    `function` must treat each row alike, whatever the others are. Where no rows are split, or not
    evenly, it is called as it is.
    """
    split = _split.get()
    mesh, axes = split if split else (None, ())
    parts = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    if parts == 1 or any(len(x) % parts for x in jax.tree.leaves(rows)):
        return function(shared, *rows)
    along = jax.P(axes)
    # What the function does is on one device: nothing in it is cut again.
    token = _split.set(None)
    try:
        return jax.shard_map(
            function, mesh=mesh, in_specs=(jax.P(), *(along,) * len(rows)), out_specs=along
        )(shared, *rows)
    finally:
        _split.reset(token)
