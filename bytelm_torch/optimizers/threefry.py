"""Counter-based random numbers that are the same in both twins: Threefry-2x32 (Salmon et al. 2011).

The bits are those of `jax.random` under `jax_threefry_partitionable=True`, JAX's default: element i
of an array is a function of (key, i) alone. Unsigned 32-bit words are held in int64 tensors or in
Python integers, which support the same arithmetic. Normals use Box and Muller (1958), since the
inverse error functions of JAX and torch differ by 1.5e-12 in float64 and by 6e-6 in float32.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

Key = tuple[int, int]
Word = TypeVar("Word", int, Tensor)

_MASK = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_CHUNK = 2**22
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def seed_key(seed: int) -> Key:
    """The raw data of `jax.random.key(seed, impl="threefry2x32")`; `seed` has 32 bits."""
    return 0, seed & _MASK


def fold_in(key: Key, data: int) -> Key:
    """`jax.random.fold_in`: the key of the stream numbered `data`, taken as uint32."""
    return threefry_2x32(key, 0, data & _MASK)


def threefry_2x32(key: Key, high: Word, low: Word) -> tuple[Word, Word]:
    """Both words of the hash of the 64-bit counters (high, low) with `key`."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    first, second = (high + schedule[0]) & _MASK, (low + schedule[1]) & _MASK
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            first = (first + second) & _MASK
            second = ((second << rotation) & _MASK | (second >> (32 - rotation))) ^ first
        first = (first + schedule[(block + 1) % 3]) & _MASK
        second = (second + schedule[(block + 2) % 3] + block + 1) & _MASK
    return first, second


def random_bits(key: Key, high: int, low: Word) -> Word:
    """Elements high · 2**32 + low of `jax.random.bits(key, (n,), "uint32")`."""
    first, second = threefry_2x32(key, low * 0 + high, low)
    return first ^ second


def normals(
    key: Key, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Float[Tensor, "..."]:
    """Standard normals of `shape` and `dtype` (float32 or float64), within ±6.8.

    They are drawn in row-major order. At most 2**32 elements.
    """
    size = math.prod(shape)
    if size > 2**32:
        raise ValueError(f"shape={tuple(shape)}: noise needs at most 2**32 elements per parameter")
    samples = torch.empty(size, dtype=dtype, device=device)
    for start in range(
        0, size, _CHUNK
    ):  # the counters and words are int64, twice as wide as float32
        counter = torch.arange(start, min(start + _CHUNK, size), device=device)
        first, second = threefry_2x32(key, torch.zeros_like(counter), counter)
        radius = torch.sqrt(-2 * torch.log((first.to(dtype) + 0.5) / 2.0**32))
        angle = 2 * math.pi * (second.to(dtype) / 2.0**32)
        samples[start : start + _CHUNK] = radius * torch.cos(angle)
    return samples.reshape(tuple(shape))
