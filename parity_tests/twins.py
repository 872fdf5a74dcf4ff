"""Tiny twins for the cross-checks, made once a session."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bytelm.config import LFByteConfig, MegabyteConfig, ModelConfig
from bytelm_jax.models import Params, define_model
from bytelm_jax.parity.twins import make_twin

# Heads that do not divide the width (5 · 6 = 30 of 32), a square kernel in the local stack, and
# weights large enough that every term of the model shows in the logits.
MEGABYTES = {
    variant: MegabyteConfig(
        variant=variant,
        patch_size=4,
        global_dim=8,
        local_dim=16,
        max_length=32,
        global_layers=2,
        global_heads=5,
        local_layers=2,
        local_heads=2,
        init_std=0.3,
    )
    for variant in ("paper", "in_action")
}

MODELS: dict[str, ModelConfig] = {
    **MEGABYTES,
    "experts": LFByteConfig(
        embed_dim=8, num_layers=1, adapt_dim=4, rank=2, kernel_length=8, dropout=0.0,
        num_experts=3, top_k=2, balance_coefficient=0.0, token_mixing="none", init_std=0.3,
    )
}  # fmt: skip
"""All of them, with one whose kernels have three axes.

Its router picks two experts: the weight of a single one is 1, and has no gradient but rounding."""


def random_params(config: ModelConfig, dtype: str) -> Params:
    """Random parameters, biases and norms included, so that none of them can hide."""
    _, init = define_model(config)
    source = np.random.default_rng(0)
    return {
        name: jnp.asarray(
            np.asarray(value) + 0.1 * source.standard_normal(value.shape) * (value.ndim == 1), dtype
        )
        for name, value in sorted(jax.jit(init, static_argnums=0)(0).items())
    }


def random_ids(config: ModelConfig, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """int32[rows, length] ids of random bytes."""
    source = np.random.default_rng(seed)
    offset = config.vocab.offset
    return source.integers(offset, offset + 256, (rows, length)).astype(np.int32)


@functools.cache
def twins(name: str, dtype: str) -> tuple[ModelConfig, Params, Any]:
    """Config, parameters and the torch twin of the tiny model called `name`, in `dtype`."""
    config = MODELS[name]
    with jax.enable_x64(dtype == "float64"):
        params = random_params(config, dtype)
        return config, params, make_twin(config, params)
