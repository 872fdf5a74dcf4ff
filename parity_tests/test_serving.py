"""Slots against `generate`, and the API of a tiny model for a client that knows nothing of it."""

import functools
import gc
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm.serving.engine import Settings
from bytelm_jax.inference.generate import complete, generate
from bytelm_jax.inference.slots import JaxSlots
from bytelm_jax.models import abstract_params, define_model
from parity_tests.tiny_models import CONFIGS

# Libraries of the server warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = MegabyteConfig(
    patch_size=4, global_dim=8, local_dim=16, global_heads=2, local_heads=2, global_layers=1,
    local_layers=1, max_length=128,
)  # fmt: skip
SAMPLERS = (
    SamplerConfig(),
    SamplerConfig(sampler="greedy"),
    SamplerConfig(temperature=0.9, top_p=0.7),
    SamplerConfig(sampler="entropy"),
    SamplerConfig(top_k=3),
)


@functools.cache
def model_of(config):
    source = np.random.default_rng(0)
    params = {
        name: jnp.asarray(source.normal(0, 0.3, leaf.shape), leaf.dtype)
        for name, leaf in abstract_params(config).items()
    }
    return define_model(config)[0](params)


def written(engine, texts, rounds=3):
    """The bytes and probabilities of texts that come as slots get free."""
    waiting, slots = list(enumerate(texts)), {}
    found = [(b"", []) for _ in texts]
    while waiting or slots:
        free = [slot for slot in range(engine.slots) if slot not in slots][: len(waiting)]
        texts, waiting = waiting[: len(free)], waiting[len(free) :]
        slots |= dict(zip(free, (number for number, _ in texts), strict=True))
        engine.join([(slot, *text) for slot, (_, text) in zip(free, texts, strict=True)])
        while engine.read():
            pass
        for new in engine.advance(rounds)[0]:
            number = slots[new.slot]
            assert new.error is None
            data, scores = found[number]
            found[number] = (data + new.data, [*scores, *([new.scores] if new.scores else [])])
            if new.end:
                del slots[new.slot]
    return found


@pytest.mark.parametrize("config", [MODEL, CONFIGS["entropy"]], ids=["megabyte", "transformer"])
def test_a_text_is_that_of_generate_whatever_is_beside_it(config):
    model = model_of(config)
    prompts = [b"hello there", b"", b"abc", "é".encode()[:1], b"hello there", b"a b c d"]
    texts = [
        (
            prompt,
            Settings(
                max_new_bytes=6 + 5 * i,
                sampler=SAMPLERS[i % len(SAMPLERS)],
                seed=i,
                stop_at_eos=i % 2 == 0,
                valid_utf8=i % 3 > 0,
                scores=i % 2 == 1,
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    engine = JaxSlots(model, 3, 64)
    found = written(engine, texts)
    again = written(engine, texts[::-1])[::-1]  # other slots, other neighbours
    assert [data for data, _ in again] == [data for data, _ in found]
    for (prompt, s), (data, scores) in zip(texts, found, strict=True):
        (wanted,) = complete(
            model,
            [prompt],
            s.max_new_bytes,
            s.sampler,
            s.seed,
            s.stop_at_eos,
            valid_utf8=s.valid_utf8,
            log_probs=True,
        )
        assert data == wanted.text
        if not s.scores:
            assert not scores
            continue
        assert wanted.log_probs is not None
        logs = np.concatenate([each.log_probs for each in scores])
        np.testing.assert_allclose(logs, wanted.log_probs, rtol=1e-5, atol=1e-5)
        whole = engine.score(prompt + data)
        np.testing.assert_allclose(whole.log_probs[len(prompt) :], logs, rtol=1e-5, atol=1e-5)
        top = np.concatenate([each.top_log_probs for each in scores])
        assert (np.diff(top, axis=1) <= 0).all() and (top[:, 0] >= logs - 1e-6).all()


def test_samples_are_rows_of_their_seed_and_read_their_prompt_once(monkeypatch):
    model = model_of(MODEL)
    engine = JaxSlots(model, 2, 64)
    settings = Settings(max_new_bytes=9, sampler=SamplerConfig(), seed=5, valid_utf8=False)
    texts = [(b"prompt", replace(settings, sample=i)) for i in range(4)]
    reads = []
    prefilled = engine._prefilled
    monkeypatch.setattr(engine, "_prefilled", lambda p: (reads.append(prefilled(p)), reads[-1])[1])
    found = [data for data, _ in written(engine, texts)]
    assert found == generate(model, [b"prompt"] * 4, 9, SamplerConfig(), seed=5)
    assert len(reads) == 4 and all(cache is reads[0][0] for cache, _ in reads)


def test_a_slot_that_was_left_is_as_good_as_new():
    engine = JaxSlots(model_of(MODEL), 2, 64)
    settings = Settings(max_new_bytes=40, sampler=SamplerConfig(), seed=1)
    (wanted,) = written(engine, [(b"x", settings)])
    engine.join([(0, b"something else, and longer", settings)])
    engine.read()
    engine.advance(2)
    engine.leave(0)
    assert engine.advance(1) == ([], 0)
    assert written(engine, [(b"x", settings)]) == [wanted]


def test_what_does_not_fit_into_memory_is_refused():
    with pytest.raises(ValueError, match=r"slots=4096: caches of 4096 texts of .* give fewer"):
        JaxSlots(model_of(replace(MODEL, variant="in_action")), 4096, 1 << 26)


def test_logits_that_are_not_finite_end_one_text():
    model = model_of(MODEL)
    engine = JaxSlots(model, 2, 64)
    engine._params = [leaf * jnp.nan for leaf in engine._params]
    engine.join([(1, b"x", Settings(max_new_bytes=4, sampler=SamplerConfig(), seed=0))])
    engine.read()
    ((new,), _) = engine.advance(1)
    assert new.slot == 1 and "not finite" in (new.error or "")
    assert engine.advance(1)[0] == []


@pytest.fixture(scope="module")
def client(request):
    """The official client of a server with 3 slots."""
    openai = pytest.importorskip("openai", reason="needs the extra test")
    pytest.importorskip("fastapi", reason="needs the extra api")
    from bytelm.serving.api import Api
    from bytelm.serving.requests import Limits
    from bytelm.serving.server import Guard, Server, own_names

    engine = JaxSlots(model_of(MODEL), 3, 128)
    limits = Limits(prompt_bytes=64, new_bytes=64, capacity=engine.capacity)
    api = Api(engine, "tiny", limits, 8)
    engine.warm_up()
    guard = Guard(api.app(), own_names("127.0.0.1"), 2**16, limits.body_bytes)
    server = Server(guard, "127.0.0.1", 0)
    client = openai.OpenAI(base_url=f"{server.address}v1", api_key="-", max_retries=0, timeout=60)

    def end():
        client.close()
        server.close()
        api.close()
        gc.collect()

    request.addfinalizer(end)
    return client


def expected(prompt, count, seed, rows=1, **options):
    """What `generate` writes, as text."""
    texts = generate(
        model_of(MODEL), [prompt] * rows, count, SamplerConfig(), seed, valid_utf8=True, **options
    )
    return [text.decode() for text in texts]


def test_the_official_client_completes(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.completions.create(model="tiny", prompt="hé ", max_tokens=30, seed=3)
    assert answer.choices[0].text == expected("hé ".encode(), 30, 3)[0]
    written = len(answer.choices[0].text.encode())
    assert answer.usage.completion_tokens == written and answer.usage.prompt_tokens == 4
    assert answer.choices[0].finish_reason == ("length" if written == 30 else "stop")
    many = client.completions.create(model="tiny", prompt=[104, 105], max_tokens=20, seed=4, n=4)
    assert [choice.text for choice in many.choices] == expected(b"hi", 20, 4, rows=4)


def test_the_official_client_streams(client):
    stream = client.completions.create(
        model="tiny", prompt="hé ", max_tokens=60, seed=3, n=2, stream=True,
        extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
    )  # fmt: skip
    texts, ends, usage = ["", ""], {}, None
    for part in stream:
        usage = part.usage
        for choice in part.choices:
            assert "\ufffd" not in choice.text
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == expected("hé ".encode(), 60, 3, rows=2, stop_at_eos=False)
    assert ends == {0: "length", 1: "length"} and usage and usage.completion_tokens == 120


def test_the_official_client_stops_scores_and_echoes(client):
    create = functools.partial(client.completions.create, model="tiny", prompt="ab", seed=6)
    (whole,) = expected(b"ab", 40, 6)
    stop = whole[5:7]
    stopped = create(max_tokens=40, stop=stop).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == whole[: whole.index(stop)]
    scored = create(max_tokens=12, logprobs=2, echo=True).choices[0]
    (alone,) = expected(b"ab", 12, 6)
    assert scored.text == f"ab{alone}"
    (wanted,) = complete(
        model_of(MODEL), [b"ab"], 12, SamplerConfig(), 6, valid_utf8=True, log_probs=True
    )
    assert wanted.log_probs is not None
    logs = scored.logprobs.token_logprobs
    assert len(logs) == 2 + len(wanted.text)
    np.testing.assert_allclose(logs[2:], wanted.log_probs, rtol=1e-5, atol=1e-5)
    whole_text = JaxSlots(model_of(MODEL), 1, 64).score(b"ab" + wanted.text)
    np.testing.assert_allclose(logs, whole_text.log_probs, rtol=1e-5, atol=1e-5)
    raw = create(max_tokens=30, logprobs=0, extra_body={"valid_utf8": False}).choices[0]
    (data,) = generate(model_of(MODEL), [b"ab"], 30, SamplerConfig(), 6)
    assert raw.text == data.decode("utf-8", "replace") and "\ufffd" in raw.text
    first = next(byte for byte in data if byte >= 0x80)
    assert f"bytes:\\x{first:02x}" in raw.logprobs.tokens


def test_the_official_client_is_told_what_is_wrong(client):
    import openai

    create = functools.partial(client.completions.create, model="tiny")
    for error, body, says in (
        (openai.BadRequestError, {"prompt": "a" * 65}, "prompt: 65 bytes; at most 64"),
        (openai.BadRequestError, {"prompt": [256]}, "ids must be whole numbers from 0 to 255"),
        (openai.BadRequestError, {"prompt": "a", "temperature": -1}, "temperature=-1.0"),
        (openai.NotFoundError, {"prompt": "a", "model": "gpt"}, "this is tiny"),
    ):
        with pytest.raises(error, match=says):
            create(**body)
    with pytest.raises(openai.NotFoundError, match="There is no chat endpoint"):
        client.chat.completions.create(model="tiny", messages=[])
