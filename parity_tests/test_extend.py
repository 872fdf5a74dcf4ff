"""Cached decoding by blocks gives the same logits in both packages, row by row."""

from typing import Any

import jax
import numpy as np
import pytest
import torch

from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tests.test_extend import random_params
from parity_tests.blocks import LENGTH, MODELS, PROMPT, blocks, texts

NAMES = ("in_action, newline", "lfbyte, newline", "bytropix, newline, small budget")


@pytest.mark.parametrize("name", NAMES)
def test_both_packages_read_the_same_blocks_alike(name, x64):
    config, ids = MODELS[name], texts(MODELS[name])
    params, bind = random_params(config), define_model(config)[0]
    twin, given = make_twin(config, params), torch.from_numpy(ids).long()

    @jax.jit
    def start(params: Any) -> Any:
        model = bind(params)
        return model.prefill(ids[:, :PROMPT], model.init_cache(3, LENGTH, by_byte=True))

    @jax.jit
    def extend(params: Any, before: Any, cache: Any, index: Any) -> Any:
        return bind(params).extend(before, cache, index)

    cache, read = start(params), 0
    with torch.inference_mode():
        ours: Any = twin.prefill(given[:, :PROMPT], twin.init_cache(3, LENGTH, by_byte=True))
        for before, index, right in blocks(ids, config.vocab.offset):
            expected, cache = extend(params, before, cache, index)
            numbers = torch.from_numpy(before).long(), torch.from_numpy(index).long()
            logits, ours = twin.extend(numbers[0], ours, numbers[1])
            for row, count in enumerate(right):
                found, wanted = logits[row, :count].numpy(), np.asarray(expected)[row, :count]
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)
            read += int(right.sum())
    assert read == 3 * LENGTH - sum((0, 9, 16))
