"""Speculation changes no byte; constraints, stops and log-probabilities mean what they say."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bytelm.generation import draft_table
from bytelm.generation.stops import cut_at_stop
from bytelm.sampling import SamplerConfig
from bytelm_torch.inference.generate import complete, generate, generate_uncached, stream
from bytelm_torch.inference.speculative import ngram_drafts, table_drafts
from bytelm_torch.tests.test_extend import random_model
from parity_tests.blocks import MODELS, TEXT
from parity_tests.cases import quick

NEW = 13
PROMPTS = [TEXT[:length] for length in (0, 5, 12)]
GREEDY = SamplerConfig(sampler="greedy")
SAMPLED = SamplerConfig(temperature=0.9)
TABLE = draft_table.build_table([TEXT * 20], slots=1 << 8)


def model_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with random parameters."""
    return random_model(replace(MODELS[name], **changes)).to(dtype)


@pytest.mark.parametrize("dtype", quick([torch.float64, torch.float32], torch.float32))
@pytest.mark.parametrize(
    ("name", "draft", "sampler"),
    [
        ("megabyte", "ngram", SAMPLED),
        ("in_action, newline", "model", SAMPLED),
        ("blt", "self", SAMPLED),
        ("bytropix, newline", "self", GREEDY),
        ("lfbyte, newline", "table", GREEDY),
        ("entropy", "model", GREEDY),
    ],
)
def test_the_text_of_a_seed_is_the_same_whatever_is_drafted(name, draft, sampler, dtype):
    model = model_of(name, dtype)
    # A model that drafts for itself is always right, its own local stacks often.
    drafts = {"model": model, "table": TABLE}
    expected = generate(model, PROMPTS, NEW, sampler, 3, False)
    assert generate_uncached(model, PROMPTS, NEW, sampler, 3, False) == expected
    found = complete(model, PROMPTS, NEW, sampler, 3, False, speculate=drafts.get(draft, draft))
    assert [each.text for each in found] == expected
    alone = generate(model, PROMPTS[:1], NEW, sampler, 3, False, speculate=drafts.get(draft, draft))
    assert alone == expected[:1]  # by one number for the index of all rows
    if draft in ("model", "self"):
        assert sum(each.accepted for each in found) > NEW


def test_a_round_appends_what_was_right_and_one_more_byte():
    model = model_of("lfbyte", torch.float64)
    (found,) = complete(model, [TEXT[:5]], 27, GREEDY, speculate=model)
    assert (found.rounds, found.drafted, found.accepted) == (3, 24, 24)
    assert found.end == "length"


def test_drafts_on_the_device_are_those_of_the_references():
    source = np.random.default_rng(0)
    text = np.stack([source.integers(97, 100, 60), np.resize(list(b"abcab"), 60)]).astype(np.uint8)
    for index in (1, 4, 30, 57):
        drafts, length = ngram_drafts(torch.from_numpy(text).long(), torch.full((2,), index), 8)
        for row in range(2):
            expected = draft_table.ngram_draft(text[row], index)
            if length[row] >= draft_table.SHORTEST_MATCH:
                np.testing.assert_array_equal(drafts[row].numpy(), expected)
            else:
                assert not expected.any()
    words = np.frombuffer(TEXT * 2, np.uint8)
    recent = np.stack([words[start : start + 8] for start in range(100)])
    recent[::7, 0] += 1
    recent[::5] = source.integers(0, 256, 8)
    expected, found = draft_table.look_up(TABLE, recent)
    assert 0 < found.sum() < 100
    keys, drafts = (torch.from_numpy(part.astype(np.int64)) for part in TABLE)
    ours = table_drafts(keys, drafts, torch.from_numpy(recent).long())
    np.testing.assert_array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_a_text_ends_before_the_first_stop(draft):
    model = model_of("lfbyte")
    whole = generate(model, PROMPTS, 40, GREEDY, stop_at_eos=False)
    stops = [whole[1][9:12], whole[0][20:21], b"never there"]
    found = complete(
        model, PROMPTS, 40, GREEDY, stop_at_eos=False, stop=stops, speculate=draft, log_probs=True
    )
    for each, text in zip(found, whole, strict=True):
        assert (each.text, each.end == "stop") == cut_at_stop(text, stops)
        assert each.log_probs is not None and len(each.log_probs) == len(each.text)
    assert any(each.end == "stop" for each in found)
    pieces = list(stream(model, PROMPTS[1], 40, GREEDY, 0, False, 4, speculate=draft, stop=stops))
    alone = generate(model, PROMPTS[1:2], 40, GREEDY, stop_at_eos=False)[0]
    assert b"".join(pieces) == cut_at_stop(alone, stops)[0]


@pytest.mark.parametrize("draft", ["none", "ngram"])
@pytest.mark.parametrize("name", ["megabyte", "lfbyte"])
def test_valid_utf8_completes_characters_and_cuts_none(name, draft):
    model = model_of(name)
    prompts = [b"", "é".encode()[:1], "日".encode()[:2], "🙂".encode()[:1], b"\xff\x80ab"]
    sampler, texts, options = SamplerConfig(temperature=2.0), [], {}
    for count in (3, 15, 16):
        options: dict[str, Any] = {"seed": count, "stop_at_eos": False, "valid_utf8": True}
        texts = generate(model, prompts, count, sampler, speculate=draft, **options)
        for prompt, text in zip(prompts, texts, strict=True):
            (prompt.removeprefix(b"\xff\x80") + text).decode()
            assert len(text) == count
    assert texts == generate_uncached(model, prompts, 16, sampler, **options)
    with pytest.raises(ValueError, match="ends inside a character that needs 3 more bytes"):
        generate(model, ["🙂".encode()[:1]], 2, valid_utf8=True)


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_log_probabilities_are_those_of_one_pass(draft):
    model = model_of("megabyte")
    (found,) = complete(model, [TEXT[:7]], NEW, SAMPLED, 1, speculate=draft, log_probs=True)
    ids = torch.tensor([list(TEXT[:7] + found.text)]) + model.config.vocab.offset
    with torch.no_grad():
        logs = model(ids).log_softmax(dim=-1)[0]
    expected = logs.gather(1, ids[0][:, None])[7:, 0].numpy()
    assert found.log_probs is not None
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-4)


def test_drafts_that_cannot_serve_are_refused():
    model, other = model_of("megabyte"), model_of("entropy")
    for speculate, says in (
        ("self", "Megabyte has no part that could draft alone"),
        ("often", "give none, ngram, self, a draft table or a model"),
        (other, "the drafting model's vocabulary"),
    ):
        with pytest.raises(ValueError, match=says):
            generate(model, [b"a"], 4, speculate=speculate)
    with pytest.raises(ValueError, match="drafting model has max_length=32, but prompt and new"):
        generate(model_of("in_action"), [b"a" * 30], 4, speculate=model)
    for stop, says in (([b""], "a text is empty"), ([b"a"] * 17, "give at most 16")):
        with pytest.raises(ValueError, match=says):
            generate(model, [b"a"], 4, stop=stop)
