"""Counter-based random numbers that are the same in both twins: Threefry-2x32 (Salmon et al. 2011).

The bits are those of `jax.random` under `jax_threefry_partitionable=True`, JAX's default, whatever
the flag is here: element i of an array is a function of (key, i) alone, so a draw depends on
neither sharding nor shape. Normals use Box and Muller (1958), since the inverse error functions of
JAX and torch differ by 1.5e-12 in float64 and by 6e-6 in float32.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, UInt32

Key = UInt32[Array, "2"]


def seed_key(seed: ArrayLike) -> Key:
    """The raw data of `jax.random.key(seed, impl="threefry2x32")`; `seed` has 32 bits."""
    number = np.uint32(seed) if isinstance(seed, int) else jnp.asarray(seed).astype(jnp.uint32)
    return jnp.stack([jnp.uint32(0), jnp.asarray(number)])


def fold_in(key: Key, data: ArrayLike) -> Key:
    """`jax.random.fold_in`: the key of the stream numbered `data`, taken as uint32."""
    return jnp.stack(threefry_2x32(key, jnp.uint32(0), jnp.asarray(data).astype(jnp.uint32)))


def threefry_2x32(
    key: Key, high: UInt32[Array, "*shape"], low: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Both words of the hash of the 64-bit counters (high, low) with `key`."""
    first, second = threefry2x32_p.bind(key[0], key[1], high, low)
    return first, second


def random_bits(
    key: Key, high: UInt32[Array, ""], low: UInt32[Array, "*shape"]
) -> UInt32[Array, "*shape"]:
    """Elements high · 2**32 + low of `jax.random.bits(key, (n,), "uint32")`."""
    first, second = threefry_2x32(key, jnp.broadcast_to(high, low.shape), low)
    return first ^ second


def normals(
    key: Key, shape: Sequence[int], order: Sequence[int], dtype: DTypeLike
) -> Float[Array, "..."]:
    """Standard normals of `shape` and `dtype` (float32 or float64), within ±6.8.

    They are drawn in row-major order of the array whose axes are `order` of this one: `order`
    (1, 0) draws a kernel [in, out] as its twin [out, in] would be. At most 2**32 elements.
    """
    if math.prod(shape) > 2**32:
        raise ValueError(f"shape={tuple(shape)}: noise needs at most 2**32 elements per parameter")
    counter, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(order):
        counter += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    first, second = threefry_2x32(key, jnp.zeros_like(counter), counter)
    radius = jnp.sqrt(-2 * jnp.log((first.astype(dtype) + 0.5) / 2.0**32))
    return radius * jnp.cos(2 * math.pi * (second.astype(dtype) / 2.0**32))
