"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) over interleaved pairs.

Axes: B batch, T positions, H heads, K head width.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bytelm.config.block import PAPER, BlockConfig
from bytelm.positions import rope_frequencies


class Rotation(NamedTuple):
    """Cosines and sines of the angles of K / 2 pairs; a leading axis of 1 serves all rows."""

    cos: Float[Array, "B T K//2"]
    sin: Float[Array, "B T K//2"]


def rotation(
    positions: Int[Array, "B T"],
    head_dim: int,
    theta: float,
    dtype: jnp.dtype,
    block: BlockConfig = PAPER,
) -> Rotation:
    """Angles of pair i, in at least float32: position · theta^(−2i / K), or slower by `block`."""
    frequencies = rope_frequencies(head_dim, theta, block)
    wide = jnp.promote_types(dtype, jnp.float32)
    angles = positions[..., None].astype(wide) * jnp.asarray(frequencies, wide)[None, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T H K"], rope: Rotation) -> Float[Array, "B T H K"]:
    """Rotates each pair (2i, 2i + 1) of the last axis by its angle."""
    # Neighbours by shifts: splitting the axis into pairs is a transpose on a GPU.
    wide, even = x.astype(rope.cos.dtype), np.arange(x.shape[-1]) % 2 == 0
    partner = jnp.where(_last(even), jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    cos, sin = (jnp.repeat(part, 2, axis=-1)[:, :, None, :] for part in rope)
    return (wide * cos + partner * jnp.where(_last(even), -sin, sin)).astype(x.dtype)


def _last(values: np.ndarray) -> np.ndarray:
    return values.reshape(1, 1, 1, -1)
