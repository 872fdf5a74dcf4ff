"""Fingerprints of arrays, the same under any sharding, and whether all that they hold is finite."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_PIECE = 2**20
"""Elements that the host looks at together."""


class Mark(NamedTuple):
    """The results of one pass over an array.

    `fingerprint` is Σ bits_i · (2 i + 1) mod 2³², which any changed bit changes; `non_finite` is 0
    if every element is finite.
    """

    fingerprint: UInt32[Array | np.generic, ""]
    non_finite: UInt32[Array | np.generic, ""]


class NonFiniteError(ValueError):
    """An array holds NaN or infinity; the message names it."""


def examine(arrays: dict[str, Any]) -> dict[str, list[Mark]]:
    """The marks of each tree's leaves, as numbers on the host; the same in every process."""
    marks: dict[str, list[Mark]] = {name: [] for name in arrays}
    for name, tree in arrays.items():
        for leaf in jax.tree.leaves(tree):
            if _is_whole_here(leaf):
                marks[name].append(_mark_on_host(np.asarray(leaf)))
                continue
            marks[name].append(_mark(leaf))
            if jax.default_backend() == "cpu":
                # Programs of simulated devices share threads: two programs in progress at once
                # could each hold the threads that the other waits for.
                jax.block_until_ready(marks[name][-1])
    return jax.device_get(marks)


def _is_whole_here(leaf: Any) -> bool:
    """Whether a CPU holds all of an array in one place, where numpy reads it without a copy."""
    if not isinstance(leaf, jax.Array):
        return True
    on_cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    return on_cpu and leaf.is_fully_replicated and leaf.is_fully_addressable


def _mark_on_host(leaf: np.ndarray) -> Mark:
    """As `_mark`, where compiling a program for each shape would take longer than all the sums."""
    flat, width = np.atleast_1d(leaf).reshape(-1), 8 * leaf.dtype.itemsize
    words, non_finite = [[0, 0] for _ in range(0, max(width, 32), 32)], False
    for first in range(0, flat.size, _PIECE):
        piece = flat[first : first + _PIECE]
        index = np.arange(first, first + piece.size, dtype=np.uint64).astype(np.uint32)
        bits = piece.view(np.dtype(f"uint{width}"))
        for number, sums in enumerate(words):
            word = (bits >> (32 * number) if number else bits).astype(np.uint32)
            sums[0] += int(word.sum(dtype=np.uint32))
            sums[1] += int((word * index).sum(dtype=np.uint32))
        non_finite |= not np.isfinite(piece).all()
    total = 0
    for plain, weighted in words:
        total = total * 31 + 2 * weighted + plain
    return Mark(np.uint32(total % 2**32), np.uint32(non_finite))


@jax.jit  # one program per array: parameters and their moments share shapes, so few are compiled
def _mark(leaf: Any) -> Mark:
    leaf = jnp.asarray(leaf)
    real = jnp.issubdtype(leaf.dtype, jnp.inexact)
    bad = (~jnp.isfinite(leaf) if real else jnp.zeros(leaf.shape, bool)).astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = leaf.astype(unsigned) if leaf.dtype == bool else leaf.view(unsigned)
    index, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
        stride = stride * leaf.shape[axis] % 2**32
    total = non_finite = zero = jnp.zeros((), jnp.uint32)
    for shift in range(0, max(8 * leaf.dtype.itemsize, 32), 32):
        word = (bits >> shift).astype(jnp.uint32)
        # In one reduction: XLA splits up a single sum on a CPU and holds every term in memory.
        plain, weighted, non_finite = jax.lax.reduce(
            (word, word * index, bad),
            (zero, zero, zero),
            lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] | b[2]),
            range(leaf.ndim),
        )
        total = total * 31 + 2 * weighted + plain
    return Mark(total, non_finite)


def check_finite(arrays: dict[str, Any], marks: dict[str, list[Mark]] | None = None) -> None:
    """Raises `NonFiniteError` for the first leaf of `arrays` that is not finite.

    `marks` are the result of `examine`, if it is already known.
    """
    for name, leaves in (examine(arrays) if marks is None else marks).items():
        bad = next((i for i, mark in enumerate(leaves) if mark.non_finite), None)
        if bad is not None:
            path, _ = jax.tree.leaves_with_path(arrays[name])[bad]
            leaf = jax.tree_util.keystr(path, simple=True, separator=".")
            raise NonFiniteError(f"{name}.{leaf} holds NaN or infinity")


def fingerprints(marks: list[Mark]) -> list[int]:
    """Those of each leaf of a tree, as a checkpoint stores them."""
    return [int(mark.fingerprint) for mark in marks]
