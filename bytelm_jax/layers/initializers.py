"""Initialisation by fan-in, as the Byte Latent Transformer does it."""

from flax import nnx
from jax.nn.initializers import Initializer


def fan_in_normal(fan_in: int) -> Initializer:
    """Normal with σ = fan_in^-0.5, cut at ±3σ (σ being that before the cut)."""
    return nnx.initializers.truncated_normal(fan_in**-0.5, lower=-3.0, upper=3.0)
