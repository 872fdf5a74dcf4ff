"""Cached decoding by blocks: rows at positions of their own, guesses that turn out wrong."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from bytelm.config import ModelConfig
from bytelm_torch.layers.caches import read_at, take_at, write_at
from bytelm_torch.models import build_model
from parity_tests.blocks import BLOCK, LENGTH, MODELS, PROMPT, check_blocks, texts


def random_model(config: ModelConfig) -> Any:
    """A float64 model with parameters under which every part of it matters."""
    model, source = build_model(config).double().eval(), np.random.default_rng(0)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            scale = 0.1 if value.ndim == 1 else 1.5 * value.shape[1] ** -0.5
            noise = scale * source.standard_normal(value.shape) + (value.ndim == 1)
            value.copy_(torch.from_numpy(noise))
    return model


def started(name: str) -> tuple[Any, torch.Tensor, np.ndarray, Any]:
    """A model, ids, their logits, and a cache that has read the prompts."""
    model, ids = random_model(MODELS[name]), torch.from_numpy(texts(MODELS[name])).long()
    with torch.inference_mode():
        cache = model.prefill(ids[:, :PROMPT], model.init_cache(3, LENGTH, by_byte=True))
        return model, ids, model(ids).numpy(), cache


@pytest.mark.parametrize(("name", "method"), list(itertools.product(MODELS, ["extend", "verify"])))
def test_blocks_give_the_logits_of_the_whole_text_whatever_was_guessed_before(name, method):
    model, ids, expected, cache = started(name)

    def read(before: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers = torch.from_numpy(before).long(), torch.from_numpy(index).long()
        with torch.inference_mode():
            if method == "verify":
                logits, _, reach = model.verify(numbers[0], cache, numbers[1])
                return logits.numpy(), reach.numpy()
            logits, _ = model.extend(numbers[0], cache, numbers[1])
            return logits.numpy(), np.full(3, BLOCK)

    check_blocks(ids.numpy(), expected, model.config.vocab.offset, read)


@pytest.mark.parametrize("name", ["in_action", "blt, newline", "lfbyte", "entropy"])
def test_one_number_may_be_the_index_of_all_rows(name):
    model, ids, expected, cache = started(name)
    shifted = torch.nn.functional.pad(ids, (1, BLOCK))
    with torch.inference_mode():
        for index in range(PROMPT, LENGTH, BLOCK):  # the last block reaches past the end
            logits, cache = model.extend(shifted[:, index : index + BLOCK], cache, index)
            count = min(BLOCK, LENGTH - index)
            whole = expected[:, index : index + count]
            np.testing.assert_allclose(logits[:, :count].numpy(), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["blt", "bytropix, newline"])
def test_a_draft_is_what_extend_gives_where_no_patch_ends(name):
    model, ids, expected, cache = started(name)
    shifted, same = torch.nn.functional.pad(ids, (1, 0)), 0
    with torch.inference_mode():
        for index in range(PROMPT, LENGTH):
            before = shifted[:, index : index + 1]
            guess = model.draft(before, cache, index)[0].numpy()
            logits = model.extend(before, cache, index)[0].numpy()
            np.testing.assert_allclose(logits[:, 0], expected[:, index], rtol=0, atol=1e-9)
            goes_on = (cache.patches[:, index] == cache.patches[:, index + 1]).numpy()
            # A segment that starts here starts a patch, which a draft leaves out.
            goes_on &= ids[:, index - 1].numpy() != model.config.vocab.offset + ord("\n")
            np.testing.assert_allclose(guess[goes_on], logits[goes_on], rtol=0, atol=1e-9)
            same += goes_on.sum()
    assert 0 < same < 3 * (LENGTH - PROMPT)


@pytest.mark.parametrize("name", ["blt, newline", "bytropix, newline"])
def test_a_segment_that_was_guessed_leaves_nothing_behind(name):
    model, ids, expected, cache = started(name)
    newline = torch.full((3, 1), model.config.vocab.offset + ord("\n"))
    with torch.inference_mode():
        for index in range(PROMPT, LENGTH):
            before = torch.cat([ids[:, index - 1 : index], newline], dim=1)
            logits, cache = model.extend(before, cache, index)
            np.testing.assert_allclose(logits[:, 0].numpy(), expected[:, index], rtol=0, atol=1e-9)


def test_what_lies_past_the_end_is_dropped_and_reads_as_zero():
    for index in (3, torch.tensor([3, 3]), torch.tensor([[3, 4, 5], [3, 4, 5]])):
        buffer = torch.arange(10).reshape(2, 5).clone()
        write_at(buffer, -torch.arange(1, 7).reshape(2, 3), index)
        assert buffer.tolist() == [[0, 1, 2, -1, -2], [5, 6, 7, -4, -5]]
        if not isinstance(index, int) and index.ndim == 2:
            assert take_at(buffer, index).tolist() == [[-1, -2, 0], [-4, -5, 0]]
        else:
            assert read_at(buffer, index, 3).tolist() == [[-1, -2, 0], [-4, -5, 0]]
    buffer = torch.zeros(2, 3)
    write_at((buffer,), (torch.ones(2, 2),), torch.tensor([0, 5]))
    assert buffer.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert write_at(buffer, torch.ones(2, 2), 4) is buffer
    assert buffer.sum() == 2
    buffer = torch.zeros(2, 4)
    scattered = torch.tensor([[9, 3, 9, 1], [9, 9, 9, 9]])
    write_at(buffer, torch.arange(2.0, 10.0).reshape(2, 4), scattered)
    assert buffer.tolist() == [[0, 5, 0, 3], [0, 0, 0, 0]]
