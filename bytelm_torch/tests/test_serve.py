"""Texts that share a batch are those of `generate`, and are served by `python -m`."""

import http.client
import json
import re
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch

from bytelm.config import BLTConfig, MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm.serving.engine import Settings
from bytelm_torch import build_model, save_pretrained, serve
from bytelm_torch.inference.generate import complete, generate
from bytelm_torch.inference.slots import TorchSlots
from parity_tests.tiny_models import CONFIGS

MODEL = MegabyteConfig(
    patch_size=4, global_dim=8, local_dim=16, global_heads=2, local_heads=2, global_layers=1,
    local_layers=1, max_length=128,
)  # fmt: skip
BLT = cast(BLTConfig, CONFIGS["blt"])
SAMPLERS = (
    SamplerConfig(),
    SamplerConfig(sampler="greedy"),
    SamplerConfig(temperature=0.9, top_p=0.7),
    SamplerConfig(sampler="entropy"),
    SamplerConfig(top_k=3),
)


def model_of(config):
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


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


@pytest.mark.parametrize(
    "config",
    # A budget that no patches overflow: how many fit otherwise depends on the longest text.
    [MODEL, CONFIGS["entropy"], CONFIGS["lfbyte"], replace(BLT, patch_budget=1.0)],
    ids=["megabyte", "transformer", "lfbyte", "blt"],
)
def test_a_text_is_that_of_generate_whatever_is_beside_it(config):
    model = model_of(config)
    prompts = [b"hello there", b"", b"abc", "é".encode()[:1], b"hello there", b"a b c d"]
    texts = [
        (
            prompt,
            Settings(
                max_new_bytes=4 + 4 * i,
                sampler=SAMPLERS[i % len(SAMPLERS)],
                seed=i,
                stop_at_eos=i % 2 == 0,
                valid_utf8=i % 3 > 0,
                scores=i % 2 == 1,
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    engine = TorchSlots(model, 3, 36)
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
        np.testing.assert_allclose(logs, wanted.log_probs, rtol=1e-4, atol=1e-4)
        whole = engine.score(prompt + data)
        np.testing.assert_allclose(whole.log_probs[len(prompt) :], logs, rtol=1e-4, atol=1e-4)


def test_samples_are_rows_of_their_seed_and_slots_are_as_good_as_new():
    model = model_of(MODEL)
    engine = TorchSlots(model, 2, 64)
    engine.warm_up()
    settings = Settings(max_new_bytes=9, sampler=SamplerConfig(), seed=5, valid_utf8=False)
    engine.join([(0, b"something else, and longer", settings)])
    engine.read()
    engine.advance(1)
    engine.leave(0)
    assert engine.advance(1) == ([], 0)
    found = written(engine, [(b"prompt", replace(settings, sample=i)) for i in range(4)])
    wanted = generate(model, [b"prompt"] * 4, 9, SamplerConfig(), seed=5)
    assert [data for data, _ in found] == wanted


def test_logits_that_are_not_finite_end_one_text():
    model = model_of(MODEL)
    engine = TorchSlots(model, 2, 64)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    engine.join([(1, b"x", Settings(max_new_bytes=4, sampler=SamplerConfig(), seed=0))])
    engine.read()
    ((new,), _) = engine.advance(1)
    assert new.slot == 1 and "not finite" in (new.error or "")
    assert engine.advance(1) == ([], 0)
    with pytest.raises(ValueError, match=r"slots=4096: caches of 4096 texts of .* give fewer"):
        TorchSlots(model_of(replace(MODEL, variant="in_action")), 4096, 1 << 26)


@pytest.mark.filterwarnings("ignore")  # libraries of the server warn of each other
def test_the_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("fastapi", reason="needs the extra api")
    model = model_of(MODEL)
    save_pretrained(model, tmp_path / "tiny")
    heard = []

    def visit():
        address = re.findall(r"at http://(\S+)/ until", capsys.readouterr().out)[0]
        connection = http.client.HTTPConnection(address, timeout=60)
        body = {"model": "tiny", "prompt": "ab", "max_tokens": 20, "seed": 3, "valid_utf8": False}
        connection.request("POST", "/v1/completions", json.dumps(body))
        heard.append(json.loads(connection.getresponse().read())["choices"][0]["text"])
        connection.close()

    monkeypatch.setattr("bytelm.serving.command.wait_for_interrupt", visit)
    options = ["--port", "0", "--slots", "2", "--max-prompt-bytes", "20", "--max-new-bytes", "20"]
    assert serve.main([str(tmp_path / "tiny"), *options]) == 0
    (wanted,) = generate(model, [b"ab"], 20, SamplerConfig(), seed=3)
    assert heard == [wanted.decode("utf-8", "replace")]
    for argv, says in (
        ([str(tmp_path / "none")], "none"),
        ([str(tmp_path / "tiny"), "--slots", "0"], "--slots 0: must be from 1 to 4096"),
    ):
        assert serve.main(argv) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
