"""Cached decoding by blocks: rows at positions of their own, guesses that turn out wrong."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import BLTConfig, ModelConfig
from bytelm_jax.models import abstract_params, define_model
from parity_tests.tiny_models import CONFIGS

BLOCK, LENGTH = 5, 32
BYTROPIX = {
    "patcher": "histogram",
    "threshold": 7.0,
    "ngram_combine": "mean",
    "feedforward": "spline",
    "entropy_attention": True,
    "positions": "sinusoidal",
}
TEXT = "Aé b: 🙂x, 日本 — the end.\nNo. And (on)\n and on … ".encode() * 3
BLT = CONFIGS["blt"]


def resetting(config: ModelConfig, reset_on: str = "newline") -> ModelConfig:
    """`config` with resets, also in its entropy model."""
    if isinstance(config, BLTConfig):
        config = replace(
            config, entropy=replace(config.entropy, reset_on=reset_on), reset_on=reset_on
        )
    return replace(config, reset_on=reset_on)


MODELS = {
    **CONFIGS,
    **{f"{name}, newline": resetting(c) for name, c in CONFIGS.items()},
    "blt, small budget": replace(BLT, patch_budget=0.05),
    "blt, space": replace(BLT, patcher="space", ngram_sizes=()),
    "blt, fixed, document": resetting(
        replace(BLT, patcher="fixed", patch_size=5, local_window=0), "document"
    ),
    "bytropix": replace(BLT, **BYTROPIX),
    "bytropix, newline": resetting(replace(BLT, **BYTROPIX)),
    "bytropix, newline, small budget": resetting(replace(BLT, **BYTROPIX, patch_budget=0.1)),
    "blt, byte": replace(BLT, patcher="byte"),
    "blt, word, newline": resetting(replace(BLT, patcher="word")),
}


def random_params(config: ModelConfig) -> dict[str, Any]:
    """Float64 parameters under which every part of a model matters."""
    source, params = np.random.default_rng(0), {}
    for key, leaf in sorted(abstract_params(config).items()):
        scale = 0.1 if leaf.ndim == 1 else 1.5 * leaf.shape[key.endswith("embedding")] ** -0.5
        params[key] = jnp.asarray(scale * source.standard_normal(leaf.shape) + (leaf.ndim == 1))
    return params


QUICK = ("blt", "bytropix, newline", "megabyte, newline", "in_action", "lfbyte, newline", "entropy")


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in MODELS],
)
def test_blocks_give_the_logits_of_the_whole_text_whatever_was_guessed_before(name):
    config, source = MODELS[name], np.random.default_rng(1)
    ids = np.array([list(TEXT[start : start + LENGTH]) for start in (0, 7, 38)], np.int32)
    ids += config.vocab.offset
    with jax.enable_x64(True):
        params, bind = random_params(config), define_model(config)[0]
        expected = np.asarray(jax.jit(lambda params: bind(params)(ids))(params))

        @jax.jit
        def start(params: Any) -> Any:
            model = bind(params)
            return model.prefill(ids[:, :16], model.init_cache(3, LENGTH, by_byte=True))

        @jax.jit
        def extend(params: Any, before: Any, cache: Any, index: Any) -> Any:
            return bind(params).extend(before, cache, index)

        # Rows begin where their prompts end, behind which the prefill has read another text.
        cache, index = start(params), np.array([0, 9, 16], np.int32)
        while (index < LENGTH).any():
            before, right = np.zeros((3, BLOCK), np.int32), np.zeros(3, np.int32)
            for row, at in enumerate(index):
                there = np.clip(np.arange(at - 1, at - 1 + BLOCK), 0, LENGTH - 1)
                before[row] = ids[row, there]
                right[row] = min(source.integers(1, BLOCK + 1), max(LENGTH - at, 0))
                wrong = source.integers(0, 256, BLOCK) + config.vocab.offset
                before[row, right[row] :] = wrong[right[row] :]
            logits, cache = extend(params, before, cache, jnp.asarray(index))
            for row, at in enumerate(index):
                seen = np.asarray(logits)[row, : right[row]]
                np.testing.assert_allclose(
                    seen, expected[row, at : at + right[row]], rtol=0, atol=1e-9
                )
            index = index + right
