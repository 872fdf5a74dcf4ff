"""Cached decoding by blocks: rows at positions of their own, guesses that turn out wrong."""

from typing import Any

import numpy as np
import pytest
import torch

from bytelm.config import ModelConfig
from bytelm_torch.layers.caches import read_at, take_at, write_at
from bytelm_torch.models import build_model
from parity_tests.blocks import LENGTH, MODELS, PROMPT, check_blocks, texts


def random_model(config: ModelConfig) -> Any:
    """A float64 model with parameters under which every part of it matters."""
    model, source = build_model(config).double().eval(), np.random.default_rng(0)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            scale = 0.1 if value.ndim == 1 else 1.5 * value.shape[1] ** -0.5
            noise = scale * source.standard_normal(value.shape) + (value.ndim == 1)
            value.copy_(torch.from_numpy(noise))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_blocks_give_the_logits_of_the_whole_text_whatever_was_guessed_before(name):
    config, ids = MODELS[name], texts(MODELS[name])
    model, given = random_model(config), torch.from_numpy(ids).long()
    with torch.inference_mode():
        cache = model.init_cache(3, LENGTH, by_byte=True)
        cache = model.prefill(given[:, :PROMPT], cache)

        def extend(before: np.ndarray, index: np.ndarray) -> np.ndarray:
            numbers = torch.from_numpy(before).long(), torch.from_numpy(index).long()
            return model.extend(numbers[0], cache, numbers[1])[0].numpy()

        check_blocks(ids, model(given).numpy(), config.vocab.offset, extend)
