"""The registry of model configurations, and functions that apply to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import get_args

from bytelm.config.blt import BLTConfig, EntropyConfig
from bytelm.config.lfbyte import LFByteConfig
from bytelm.config.megabyte import MegabyteConfig

__all__ = ["BLTConfig", "EntropyConfig", "LFByteConfig", "MegabyteConfig"]
"""What `bytelm.config`, `bytelm`, `bytelm_jax` and `bytelm_torch` offer of this module by `*`."""

ModelConfig = MegabyteConfig | EntropyConfig | BLTConfig | LFByteConfig

MODEL_CONFIGS: tuple[type[ModelConfig], ...] = get_args(ModelConfig)


def models_with(field_name: str) -> list[str]:
    """Tags of the architectures whose configuration has the field."""
    return [
        kind.architecture
        for kind in MODEL_CONFIGS
        if field_name in {field.name for field in fields(kind)}
    ]


def training_flops_per_byte(
    config: ModelConfig, length: int, frozen: Mapping[str, int] | None = None
) -> float:
    """Operations per byte of a training step: the backward pass costs twice the forward pass.

    A frozen entropy model only runs forward. `frozen` holds the parameters that the run does not
    train, by name, with their numbers of elements: their kernels have no gradient, which is half of
    the backward pass, but pass one on to what is below them.
    """
    work = 3 * config.flops_per_byte(length) - 2 * config.frozen_flops_per_byte(length)
    return work - _gradients_left_out(config, length, frozen)


def executed_training_flops_per_byte(
    config: ModelConfig, length: int, frozen: Mapping[str, int] | None = None
) -> float:
    """As `training_flops_per_byte`, with what is computed for capacity that stays empty."""
    work = 3 * config.executed_flops_per_byte(length) - 2 * config.frozen_flops_per_byte(length)
    return work - _gradients_left_out(config, length, frozen)


def _gradients_left_out(
    config: ModelConfig, length: int, frozen: Mapping[str, int] | None
) -> float:
    kernels = {k: v for k, v in (frozen or {}).items() if k.endswith((".kernel", ".kernels"))}
    return 2 * sum(v * config.uses_per_byte(k, length) for k, v in kernels.items())
