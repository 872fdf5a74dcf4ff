"""Random initialisation that compiles quickly: equal draws are made together.

A model draws hundreds of arrays of a few shapes. Compiled one by one, the random bits of each array
are a program of their own: minutes for a large model on a GPU. Within `deferring()`, initializers
only record what is to be drawn, and `draw_all` draws the arrays of each kind and size in one loop,
bit for bit as each would have been drawn alone.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jaxtyping import Array, Int

_deferring = ContextVar("_deferring", default=False)


Finish = Callable[[Array], Array]


class Draw(NamedTuple):
    """An array still to be drawn: `std` times a normal variable cut at ±`cut` (0: not cut).

    Within `deferring()`, `key` is the number of the key.
    """

    key: Any
    std: float
    shape: tuple[int, ...]
    cut: float
    finish: Finish | None


def normal(std: float, cut: float = 0.0, finish: Finish | None = None) -> Initializer:
    """An initializer for float32: normal, truncated at ±`cut`, scaled by `std`, then `finish`ed."""

    def initialize(
        key: Any, shape: Sequence[int], dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> Any:
        if dtype != jnp.float32:
            raise ValueError(f"dtype={dtype}: parameters are created in float32")
        draw = Draw(key, std, tuple(shape), cut, finish)
        return draw if _deferring.get() else _finished(draw, _bare(key, draw.shape, cut))

    return initialize


def fan_in_normal(fan_in: int) -> Initializer:
    """Normal with σ = fan_in^-0.5, truncated at ±3σ, as in the Byte Latent Transformer."""
    return normal(fan_in**-0.5, 3.0)


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Within this context initializers return a `Draw` instead of an array."""
    token = _deferring.set(True)
    try:
        yield
    finally:
        _deferring.reset(token)


def draw_all(values: dict[str, Any], seed: int | Int[Array, ""]) -> dict[str, Array]:
    """`values` with every `Draw` replaced by its array, drawn in one loop per kind and size.

    Draw n has the n-th key of `nnx.Rngs(seed).params()`, so the result is what a model without
    deferring would hold: bit for bit outside `jit`, up to the compiler's rounding inside it.
    """
    root = jax.random.key(seed)
    groups = defaultdict[tuple[int, float], list[str]](list)
    for name, value in values.items():
        if isinstance(value, Draw):
            groups[math.prod(value.shape), value.cut].append(name)
    result = {}
    for (size, cut), names in groups.items():
        numbers = jnp.asarray([values[name].key for name in names])

        def draw(number: Array, size: int = size, cut: float = cut) -> Array:
            return _bare(jax.random.fold_in(root, number), (size,), cut)

        samples = jax.lax.map(draw, numbers)
        for i, name in enumerate(names):
            result[name] = _finished(values[name], samples[i].reshape(values[name].shape))
    return {name: result.get(name, value) for name, value in values.items()}


def _bare(key: Array, shape: tuple[int, ...], cut: float) -> Array:
    if cut:
        return jax.random.truncated_normal(key, -cut, cut, shape, jnp.float32)
    return jax.random.normal(key, shape, jnp.float32)


def _finished(draw: Draw, bare: Array) -> Array:
    # Not in the loop, where the compiler would round the product differently.
    scaled = bare * jnp.asarray(draw.std, jnp.float32)
    return draw.finish(scaled) if draw.finish else scaled
