"""Cached decoding by blocks: rows at positions of their own, guesses that turn out wrong."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import ModelConfig
from bytelm_jax.models import abstract_params, define_model
from parity_tests.blocks import BLOCK, LENGTH, MODELS, PROMPT, check_blocks, texts


def random_params(config: ModelConfig) -> dict[str, Any]:
    """Float64 parameters under which every part of a model matters."""
    source, params = np.random.default_rng(0), {}
    for key, leaf in sorted(abstract_params(config).items()):
        scale = 0.1 if leaf.ndim == 1 else 1.5 * leaf.shape[key.endswith("embedding")] ** -0.5
        params[key] = jnp.asarray(scale * source.standard_normal(leaf.shape) + (leaf.ndim == 1))
    return params


QUICK = ("bytropix, newline", "megabyte, newline", "in_action", "lfbyte, newline", "entropy")


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *[
            pytest.param(name, "extend", marks=() if name in QUICK else pytest.mark.slow)
            for name in MODELS
        ],
        ("megabyte, newline", "verify"),
        ("blt, newline", "verify"),
    ],
)
def test_blocks_give_the_logits_of_the_whole_text_whatever_was_guessed_before(name, method):
    config, ids = MODELS[name], texts(MODELS[name])
    with jax.enable_x64(True):
        params, bind = random_params(config), define_model(config)[0]
        expected = np.asarray(jax.jit(lambda params: bind(params)(ids))(params))

        @jax.jit
        def start(params: Any) -> Any:
            model = bind(params)
            return model.prefill(ids[:, :PROMPT], model.init_cache(3, LENGTH, by_byte=True))

        @jax.jit
        def step(params: Any, before: Any, cache: Any, index: Any) -> Any:
            if method == "verify":
                return bind(params).verify(before, cache, index)
            return *bind(params).extend(before, cache, index), np.full(3, BLOCK)

        cache = start(params)

        def read(before: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            nonlocal cache
            logits, cache, reach = step(params, before, cache, index)
            return np.asarray(logits), np.asarray(reach)

        check_blocks(ids, expected, config.vocab.offset, read)
