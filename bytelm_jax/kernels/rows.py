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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from bytelm_jax.kernels.lookup import vary_like


class _Split(NamedTuple):
    """Where the rows of a batch stand, and how the gradients of parameters are cut."""

    mesh: Mesh
    axes: tuple[str, ...]
    cut: Callable[[tuple[int, ...]], int | None]
    """Shape of a parameter → the axis along which its gradient is cut over the last of `axes`."""


_split: ContextVar[_Split | None] = ContextVar("split", default=None)


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
def split_rows(
    mesh: Mesh,
    axes: tuple[str, ...],
    gathered: bool = False,
    cut: Callable[[tuple[int, ...]], int | None] = lambda shape: None,
) -> Iterator[None]:
    """Within this context, the rows of what is traced under `jit` stand along `axes` of `mesh`.

    `gathered` says that parameters were gathered, and are whole on every device of it; `cut` gives
    the axis along which the gradient of one of that shape is cut over the last of `axes`, if any.
    """
    before, whole = _split.set(_Split(mesh, axes, cut)), _gathered.set(mesh if gathered else None)
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
    are together; `shared` is whole on every device, and its gradient is summed over them, once for
    all uses. `function` must treat each row alike, whatever the others are. Where no rows are
    split, or not evenly, it is called as it is.
    """
    split = _split.get()
    parts = 1 if split is None else math.prod(split.mesh.shape[axis] for axis in split.axes)
    if split is None or parts == 1 or any(len(x) % parts for x in jax.tree.leaves(rows)):
        first = jax.tree.leaves(rows)[0]  # within `shard_map`, of a device's own rows
        return function(jax.tree.map(lambda x: vary_like(x, first), shared), *rows)
    leaves, tree = jax.tree.flatten(shared)
    axes, along, own = split.axes, jax.P(split.axes), jax.P(*split.axes)
    cut = [_gathered.get() is not None and split.cut(x.shape) is not None for x in leaves]

    def on_device(leaves: Sequence[Any], *rows: Any) -> Any:
        here = [
            x[(0,) * len(axes)] if by_group else jax.lax.pcast(x, axes, to="varying")
            for x, by_group in zip(leaves, cut, strict=True)
        ]
        return function(jax.tree.unflatten(tree, here), *rows)

    given = [
        _one_each(split, x) if by_group else x for x, by_group in zip(leaves, cut, strict=True)
    ]
    lie = [own if by_group else jax.P() for by_group in cut]
    # What the function does is on one device: nothing in it is cut again.
    token = _split.set(None)
    try:
        return jax.shard_map(
            on_device, mesh=split.mesh, in_specs=(lie, *(along,) * len(rows)), out_specs=along
        )(given, *rows)
    finally:
        _split.reset(token)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_each(split: _Split, x: Array) -> Array:
    """`x` [...], which is whole on every device, as an array [..., devices along each axis, ...].

    Each device's gradient is then its own, and they are summed as those of other parameters are:
    each device gets its part of the sum over a group, by a reduce-scatter, and parts are summed
    over groups. `shard_map` would sum all of them over all devices.
    """
    sizes = tuple(split.mesh.shape[axis] for axis in split.axes)
    each = jnp.broadcast_to(x, (*sizes, *x.shape))
    return jax.lax.with_sharding_constraint(each, NamedSharding(split.mesh, jax.P(*split.axes)))


def _one_each_forward(split: _Split, x: Array) -> tuple[Array, None]:
    return _one_each(split, x), None


def _one_each_backward(split: _Split, _: None, gradient: Array) -> tuple[Array]:
    groups, zero = split.axes[:-1], jnp.zeros((), gradient.dtype)
    axis = split.cut(gradient.shape[len(split.axes) :])
    behind = (*(None,) * (axis or 0), split.axes[-1])

    def summed(x: Array, over: tuple[int, ...], lies: jax.P) -> Array:
        # In its own dtype: `sum` would transfer 16-bit numbers as float32.
        total = jax.lax.reduce(x, zero, jax.lax.add, over)
        return jax.lax.with_sharding_constraint(total, NamedSharding(split.mesh, lies))

    gradient = summed(gradient, (len(groups),), jax.P(*groups, *behind))
    return (summed(gradient, tuple(range(len(groups))), jax.P(*behind)),)


_one_each.defvjp(_one_each_forward, _one_each_backward)
