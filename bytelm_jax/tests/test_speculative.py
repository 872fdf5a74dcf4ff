"""Speculation changes no byte; constraints, stops and log-probabilities mean what they say."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.generation import draft_table
from bytelm.generation.stops import cut_at_stop
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.generate import complete, generate, generate_uncached, stream
from bytelm_jax.inference.speculative import ngram_drafts, table_drafts
from bytelm_jax.models import define_model
from bytelm_jax.tests.test_extend import random_params
from parity_tests.blocks import MODELS, TEXT
from parity_tests.cases import quick

NEW = 13
PROMPTS = [TEXT[:length] for length in (0, 5, 12)]
GREEDY = SamplerConfig(sampler="greedy")
SAMPLED = SamplerConfig(temperature=0.9)
TABLE = draft_table.build_table([TEXT * 20], slots=1 << 8)


def model_of(name: str, **changes: Any) -> Any:
    """A tiny model with random parameters, float64 where that is on."""
    config = replace(MODELS[name], **changes)
    return define_model(config)[0](random_params(config))


@pytest.mark.parametrize(
    ("name", "draft", "sampler"),
    [
        ("megabyte", "ngram", SAMPLED),
        pytest.param("in_action, newline", "model", SAMPLED, marks=pytest.mark.slow),
        ("blt", "self", SAMPLED),
        pytest.param("lfbyte, newline", "table", GREEDY, marks=pytest.mark.slow),
    ],
)
def test_the_text_of_a_seed_is_the_same_whatever_is_drafted(name, draft, sampler):
    with jax.enable_x64(True):
        model = model_of(name)
        # A model that drafts for itself is always right, its own local stacks often.
        drafts = {"model": model, "table": TABLE}
        expected = generate(model, PROMPTS, NEW, sampler, 3, False)
        assert generate_uncached(model, PROMPTS, NEW, sampler, 3, False) == expected
        found = complete(model, PROMPTS, NEW, sampler, 3, False, speculate=drafts.get(draft, draft))
        assert [each.text for each in found] == expected
        if draft in ("model", "self"):
            assert sum(each.accepted for each in found) > NEW


def test_a_round_appends_what_was_right_and_one_more_byte():
    with jax.enable_x64(True):
        model = model_of("lfbyte")
        (found,) = complete(model, [TEXT[:5]], 27, GREEDY, speculate=model)
    assert (found.rounds, found.drafted, found.accepted) == (3, 24, 24)
    assert found.end == "length"


def test_drafts_on_the_device_are_those_of_the_references():
    source = np.random.default_rng(0)
    text = np.stack([source.integers(97, 100, 60), np.resize(list(b"abcab"), 60)]).astype(np.uint8)
    for index in (1, 4, 30, 57):
        at = jnp.full(2, index, jnp.int32)
        drafts, length = ngram_drafts(jnp.asarray(text, jnp.int32), at, 8)
        for row in range(2):
            expected = draft_table.ngram_draft(text[row], index)
            if length[row] >= draft_table.SHORTEST_MATCH:
                np.testing.assert_array_equal(drafts[row], expected)
            else:
                assert not expected.any()
    words = np.frombuffer(TEXT * 2, np.uint8)
    recent = np.stack([words[start : start + 8] for start in range(100)])
    recent[::7, 0] += 1
    recent[::5] = source.integers(0, 256, 8)
    expected, found = draft_table.look_up(TABLE, recent)
    assert 0 < found.sum() < 100
    device: Any = draft_table.DraftTable(*map(jnp.asarray, TABLE))  # pyright: ignore
    np.testing.assert_array_equal(table_drafts(device, jnp.asarray(recent, jnp.int32)), expected)


@pytest.mark.parametrize("draft", quick(["none", "ngram"], "ngram"))
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
    pieces = list(stream(model, PROMPTS[1], 40, GREEDY, 0, False, 4, speculate=draft, stop=stops))
    assert (
        b"".join(pieces)
        == cut_at_stop(generate(model, PROMPTS[1:2], 40, GREEDY, stop_at_eos=False)[0], stops)[0]
    )


@pytest.mark.parametrize("draft", ["none", "ngram"])
@pytest.mark.parametrize("name", ["megabyte", "lfbyte"])
def test_valid_utf8_completes_characters_and_cuts_none(name, draft):
    model = model_of(name)
    prompts = [b"", "é".encode()[:1], "日".encode()[:2], "🙂".encode()[:1], b"\xff\x80ab"]
    sampler = SamplerConfig(temperature=2.0)
    for count in (3, 15, 16):
        options: dict[str, Any] = {"seed": count, "stop_at_eos": False, "valid_utf8": True}
        texts = generate(model, prompts, count, sampler, speculate=draft, **options)
        for prompt, text in zip(prompts, texts, strict=True):
            (prompt.removeprefix(b"\xff\x80") + text).decode()
            assert len(text) == count
    assert texts == generate_uncached(model, prompts, count, sampler, **options)
    with pytest.raises(ValueError, match="ends inside a character that needs 3 more bytes"):
        generate(model, ["🙂".encode()[:1]], 2, valid_utf8=True)


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_log_probabilities_are_those_of_one_pass(draft):
    model = model_of("megabyte")
    (found,) = complete(model, [TEXT[:7]], NEW, SAMPLED, 1, speculate=draft, log_probs=True)
    ids = np.frombuffer(TEXT[:7] + found.text, np.uint8).astype(np.int32)[None]
    ids += model.config.vocab.offset
    logs = np.asarray(jax.nn.log_softmax(model(ids), axis=-1))[0]
    expected = np.take_along_axis(logs, ids[0][:, None], axis=1)[7:, 0]
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
