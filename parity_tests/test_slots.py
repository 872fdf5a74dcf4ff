"""Texts that share a batch of slots are those of `generate`, in both packages."""

from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm.config import BLTConfig
from bytelm.sampling import SamplerConfig
from bytelm.serving.engine import Settings
from bytelm.serving.prompts import Prompts
from bytelm_jax.models import abstract_params
from bytelm_jax.parity.twins import make_twin
from parity_tests.cases import quick
from parity_tests.packages import MODEL, PACKAGES, model_of
from parity_tests.tiny_models import CONFIGS

# A budget that no patches overflow: how many fit otherwise depends on the longest text.
BLT = replace(cast(BLTConfig, CONFIGS["blt"]), patch_budget=1.0)
CASES = {
    "jax megabyte": MODEL, "jax transformer": CONFIGS["entropy"], "torch megabyte": MODEL,
    "torch transformer": CONFIGS["entropy"], "torch lfbyte": CONFIGS["lfbyte"], "torch blt": BLT,
}  # fmt: skip
SAMPLERS = (
    SamplerConfig(),
    SamplerConfig(sampler="greedy"),
    SamplerConfig(temperature=0.9, top_p=0.7),
    SamplerConfig(sampler="entropy"),
    SamplerConfig(top_k=3),
)
PLAIN = Settings(max_new_bytes=9, sampler=SamplerConfig(), seed=5, valid_utf8=False)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def written(engine, texts, rounds=3, reads=1):
    """The bytes and probabilities of texts that come as slots get free.

    Few `reads` before each advance, so that texts are written beside prompts that are read.
    """
    waiting, slots, writing = list(enumerate(texts)), {}, False
    found = [(b"", []) for _ in texts]
    while waiting or slots:
        free = [slot for slot in range(engine.slots) if slot not in slots][: len(waiting)]
        joining, waiting = waiting[: len(free)], waiting[len(free) :]
        if joining:
            slots |= {slot: number for slot, (number, _) in zip(free, joining, strict=True)}
            engine.join([(slot, *text) for slot, (_, text) in zip(free, joining, strict=True)])
        for _ in range(reads):
            engine.read(writing)
        for new in engine.advance(rounds)[0]:
            number = slots[new.slot]
            assert new.error is None
            data, scores = found[number]
            found[number] = (data + new.data, [*scores, *([new.scores] if new.scores else [])])
            if new.end:
                del slots[new.slot]
        writing = bool(slots)
    return found


def passes(engine, monkeypatch):
    """What is read from here on."""
    found, following = [], engine._prompts.next

    def following_and_noted(most):
        found.append(following(most))
        return found[-1]

    monkeypatch.setattr(engine._prompts, "next", following_and_noted)
    return found


@pytest.mark.parametrize("case", quick(CASES, "jax megabyte", "torch transformer", "torch blt"))
def test_a_text_is_that_of_generate_whatever_is_beside_it(case, monkeypatch):
    package, model = PACKAGES[case.split()[0]], model_of(case.split()[0], CASES[case])
    monkeypatch.setattr(package.module, "PART_BYTES", 8)
    prompts = [b"hello there, you two", b"", b"abc", "é".encode()[:1], b"hello there", b"a b c d"]
    prompts += [b"hello there, you all", b"hello there"]
    texts = [
        (
            prompt,
            Settings(
                max_new_bytes=4 + 3 * i,
                sampler=SAMPLERS[i % len(SAMPLERS)],
                seed=i,
                stop_at_eos=i % 2 == 0,
                valid_utf8=i % 3 > 0,
                scores=i % 2 == 1,
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    engine = package.engine(model, 3, 48)
    read = passes(engine, monkeypatch)
    found = written(engine, texts)
    if model.prefills_in_parts:
        assert any(each.start for each in read if each)
    assert any(each.sources for each in read if each)
    again = written(engine, texts[::-1])[::-1]  # other slots, other neighbours
    assert [data for data, _ in again] == [data for data, _ in found]
    for (prompt, s), (data, scores) in zip(texts, found, strict=True):
        options = {"valid_utf8": s.valid_utf8, "log_probs": True}
        (wanted,) = package.generation.complete(
            model, [prompt], s.max_new_bytes, s.sampler, s.seed, s.stop_at_eos, **options
        )
        assert data == wanted.text
        if not s.scores:
            assert not scores
            continue
        logs = np.concatenate([each.log_probs for each in scores])
        np.testing.assert_allclose(logs, wanted.log_probs, rtol=1e-4, atol=1e-4)
        whole = engine.score(prompt + data)
        np.testing.assert_allclose(whole.log_probs[len(prompt) :], logs, rtol=1e-4, atol=1e-4)
        top = np.concatenate([each.top_log_probs for each in scores])
        assert (np.diff(top, axis=1) <= 0).all() and (top[:, 0] >= logs - 1e-6).all()


@pytest.fixture(scope="module", params=PACKAGES)
def two(request):
    """Two slots of MEGABYTE, and what `generate` writes as rows of the seed 5."""
    package, model = PACKAGES[request.param], model_of(request.param, MODEL)
    rows = package.generation.generate(model, [b"prompt"] * 4, 9, SamplerConfig(), seed=5)
    engine = package.engine(model, 2, 64)
    return request.param, engine, rows


def test_samples_are_rows_of_their_seed_and_read_their_prompt_once(two, monkeypatch):
    _, engine, rows = two
    engine.join([(0, b"something else, and longer", PLAIN)])
    engine.read(writing=False)
    engine.advance(1)
    engine.leave(0)
    assert engine.advance(1) == ([], 0)
    read = passes(engine, monkeypatch)
    samples = [(b"prompt", replace(PLAIN, sample=i)) for i in range(4)]
    found = [written(engine, samples[i : i + 2], reads=2) for i in (0, 2)]
    assert [data for pair in found for data, _ in pair] == rows
    assert [list(each.sources) for each in read if each] == [[], [0], [0, 1]]


@pytest.mark.parametrize("package", PACKAGES)
def test_half_of_an_idle_batch_is_read_at_once(package, monkeypatch, caplog):
    model = model_of(package, MODEL)
    prompts = [b"prompt %d" % (i % 11) for i in range(20)]
    rows = PACKAGES[package].generation.generate(model, prompts, 9, SamplerConfig(), seed=5)
    engine = PACKAGES[package].engine(model, 20, 64)
    engine.warm_up()
    read = passes(engine, monkeypatch)
    texts = [(prompt, replace(PLAIN, sample=i)) for i, prompt in enumerate(prompts)]
    with jax.log_compiles():
        assert [data for data, _ in written(engine, texts, reads=4)] == rows
    assert "Compiling" not in caplog.text
    work = [(len(each.slots), bool(each.sources)) for each in read if each]
    assert work == [(10, False), (10, True)]
    late = [(prompt, replace(PLAIN, sample=i)) for i, (prompt, _) in enumerate(texts[:10])]
    engine.join([(19, b"another", replace(PLAIN, max_new_bytes=40))])
    engine.read(writing=False)
    engine.advance(1)
    engine.join([(slot, *text) for slot, text in enumerate(late)])
    read.clear()
    while engine.read(writing=True):
        pass
    assert all(len(each.slots) <= 8 for each in read)


def test_logits_that_are_not_finite_end_one_text_and_leave_nothing(two):
    package, engine, rows = two
    if package == "jax":
        whole, engine._params = engine._params, [leaf * jnp.nan for leaf in engine._params]
    else:
        whole = engine._model
        engine._model = build_broken()
    engine.join([(1, b"prompt", replace(PLAIN, max_new_bytes=4))])
    engine.read(writing=False)
    engine._prompts.forget(0)  # its row is computed with these weights as well
    ((new,), _) = engine.advance(1)
    assert new.slot == 1 and "not finite" in (new.error or "")
    assert engine.advance(1)[0] == []
    if package == "jax":
        engine._params = whole
    else:
        engine._model = whole
    for slot in (1, 0):
        engine.join([(slot, b"prompt", replace(PLAIN, sample=1 - slot))])
        engine.read(writing=False)
        texts = b"".join(new.data for _ in range(4) for new in engine.advance(1)[0])
        assert texts == rows[1 - slot]


def build_broken():
    broken = make_twin(MODEL, {
        name: jnp.full(leaf.shape, jnp.nan, leaf.dtype)
        for name, leaf in abstract_params(MODEL).items()
    })  # fmt: skip
    assert isinstance(broken, torch.nn.Module)
    return broken


@pytest.mark.parametrize("package", PACKAGES)
def test_what_does_not_fit_into_memory_is_refused(package):
    model = model_of(package, replace(MODEL, variant="in_action"))
    with pytest.raises(ValueError, match=r"slots=4096: caches of 4096 texts of .* give fewer"):
        PACKAGES[package].engine(model, 4096, 1 << 30)


def plan(prompts, part: int | None = 8):
    """The passes that read these prompts, each with the slots that were ready behind it."""
    reader, found = Prompts(4, part), []
    for slot, prompt in enumerate(prompts):
        reader.join(slot, prompt)
    while work := reader.next():
        slots, sources = list(work.slots), list(work.sources)
        found.append((slots, work.start, work.size, sources, reader.done(work)))
    return found


def test_prompts_are_read_in_groups_parts_and_copies():
    reader = Prompts(4, 8)
    for prompt in (b"abcdefghijkl", b"abcdefgh", b"abcdefghijkl"):  # one after another
        reader.join(0, prompt)
        found = []
        while work := reader.next():
            found.append((work.start, work.size, list(work.sources), reader.done(work)))
        if prompt == b"abcdefgh":
            assert found == [(0, 0, [0], [0])]
    assert found == [(0, 0, [0], []), (8, 4, [], [0])]
    assert plan([b"abcd", b"", b"abcdefg", b"xy", b"abcdefgh"]) == [
        ([0, 1, 3, 4], 0, 8, [], [0, 1, 3, 4]),  # whole rounds; the same prompt once
        ([2], 0, 0, [0], [2]),
    ]
    long = bytes(range(128, 128 + 20)) * 8
    short = [b"%04d" % i for i in range(10)]  # in turns with the long one
    assert plan([long, *short])[:4] == [
        ([1, 2, 3, 4, 5, 6, 7, 8], 0, 4, [], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([0], 0, 8, [], []),
        ([9, 10], 0, 4, [], [9, 10]),
        ([0], 8, 8, [], []),
    ]
    assert plan([long, long[:140] + b"z" * 20], None) == [
        ([0], 0, 160, [], [0]),
        ([1], 0, 160, [], [1]),
    ]
    assert plan([long, long[:150] + b"z" * 10], 64) == [
        ([0], 0, 64, [], []),
        ([0], 64, 64, [], []),
        ([0], 128, 32, [], [0]),
        ([1], 0, 0, [0], []),  # waits for what the other one reads
        ([1], 148, 12, [], [1]),
    ]
