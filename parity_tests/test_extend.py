"""Cached decoding by blocks gives the same logits in both packages, row by row."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm_jax.layers import caches
from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tests.test_extend import random_params
from bytelm_torch.layers import caches as torch_caches
from parity_tests.blocks import LENGTH, MODELS, PROMPT, check_blocks, texts
from parity_tests.cases import quick

NAMES = ("in_action, newline", "lfbyte, newline", "blt, space")


@pytest.mark.parametrize("name", quick(NAMES, "blt, space"))
def test_both_packages_read_the_same_blocks_alike(name, x64):
    config, ids = MODELS[name], texts(MODELS[name])
    params, bind = random_params(config), define_model(config)[0]
    twin, given = make_twin(config, params), torch.from_numpy(ids).long()

    @jax.jit
    def start(params: Any) -> Any:
        model = bind(params)
        return model.prefill(ids[:, :PROMPT], model.init_cache(3, LENGTH, by_byte=True))

    @jax.jit
    def verify(params: Any, before: Any, cache: Any, index: Any) -> Any:
        return bind(params).verify(before, cache, index)

    expected = np.asarray(jax.jit(lambda params: bind(params)(ids))(params))
    cache = start(params)
    ours: Any = twin.prefill(given[:, :PROMPT], twin.init_cache(3, LENGTH, by_byte=True))

    def read(before: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nonlocal cache
        theirs, cache, reach = verify(params, before, cache, index)
        numbers = torch.from_numpy(before).long(), torch.from_numpy(index).long()
        logits, _, certain = twin.verify(numbers[0], ours, numbers[1])
        reach = np.minimum(np.asarray(reach), certain.numpy())
        for row, count in enumerate(reach):
            real = slice(min(count, LENGTH - index[row]))
            found, wanted = logits[row, real].numpy(), np.asarray(theirs)[row, real]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)
        return np.asarray(theirs), reach

    with torch.inference_mode():
        check_blocks(ids, expected, config.vocab.offset, read)


@pytest.mark.parametrize("index", [1, [1, 4], [[0, 6, 2], [9, 1, 5]]])
def test_caches_by_head_hold_what_those_by_position_hold(index: Any):
    new, empty = np.arange(1.0, 25.0).reshape(2, 3, 2, 2), np.zeros((2, 6, 2, 2))
    at = index if isinstance(index, int) else torch.tensor(index)
    plain = torch_caches.write_at(torch.from_numpy(empty.copy()), torch.from_numpy(new), at)
    by_head = torch.from_numpy(empty.swapaxes(1, 2).copy())
    assert torch_caches.write_heads_at(by_head, torch.from_numpy(new), at) is by_head
    assert torch.equal(by_head.transpose(1, 2), plain)
    theirs = jnp.asarray(empty.swapaxes(1, 2), jnp.float32)
    theirs = caches.write_heads_at(theirs, jnp.asarray(new, jnp.float32), jnp.asarray(index))
    np.testing.assert_array_equal(theirs, by_head)

    starts = torch.tensor([0, 3])
    near = torch_caches.read_heads_at(by_head, starts, 3)
    assert torch.equal(near.transpose(1, 2), torch_caches.read_at(plain, starts, 3))
    np.testing.assert_array_equal(caches.read_heads_at(theirs, jnp.array([0, 3]), 3), near)
    assert torch.equal(torch_caches.read_heads_at(by_head, 2, 3), by_head[:, :, 2:5])
