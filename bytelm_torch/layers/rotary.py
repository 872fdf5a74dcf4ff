"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) over interleaved pairs.

Axes: B batch, T positions, H heads, K head width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.config.block import PAPER, BlockConfig
from bytelm.positions import rope_frequencies


class Rotation(NamedTuple):
    """Cosines and sines of the angles of K / 2 pairs; a leading axis of 1 serves all rows."""

    cos: Float[Tensor, "B T K//2"]
    sin: Float[Tensor, "B T K//2"]


def rotation(
    positions: Int[Tensor, "B T"],
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    block: BlockConfig = PAPER,
) -> Rotation:
    """Angles of pair i, in at least float32: position · theta^(−2i / K), or slower by `block`."""
    frequencies = torch.from_numpy(rope_frequencies(head_dim, theta, block))
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions[..., None].to(wide) * frequencies.to(positions.device, wide)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Float[Tensor, "B T H K"], rope: Rotation) -> Float[Tensor, "B T H K"]:
    """Rotates each pair (2i, 2i + 1) of the last axis by its angle."""
    first, second = x.to(rope.cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
