"""`bytelm lm-eval` in both packages: the harness is told the model's own log-likelihoods."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from bytelm import harness, tolerances
from bytelm.config import ModelConfig, Recipe
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.generate import generate
from bytelm_jax.interop import convert
from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tests.test_cli import refused
from bytelm_jax.tools.harness import harness_place as place_of_jax
from bytelm_jax.training import checkpoint
from bytelm_torch import lm_eval as torch_command
from bytelm_torch.tools.harness import harness_place as place_of_torch
from parity_tests.cases import quick
from parity_tests.tiny_models import CONFIGS
from parity_tests.twins import random_params

WINDOW = 24
MODELS: dict[str, ModelConfig] = {
    **{name: config for name, config in CONFIGS.items() if config.causal},
    "resets": replace(CONFIGS["megabyte"], reset_on="newline"),
}
TEXT = "Lines of text,\nκαὶ ἄλλα ψεύδεα.\n" * 3
BOUND = tolerances.LOGITS["float32"]
GREEDY = SamplerConfig(temperature=0.0)


class Request(NamedTuple):
    """What the harness hands over, as far as it is read."""

    args: tuple[Any, ...]


class Hook:
    """The harness's cache of answers."""

    def __init__(self):
        self.seen = []

    def add_partial(self, kind, args, answer):
        self.seen.append((kind, args, answer))


class Base:
    """Stands in for the harness's own class of models."""

    def __init__(self):
        self.cache_hook = Hook()


def answering(place: harness.Place, window: int = WINDOW, rows: int = 4) -> Any:
    made = harness._model_class(Base, place, window)
    return made.create_from_arg_obj({}, {"batch_size": str(rows), "device": None})


def log_likelihood(model: Any, data: bytes, counted: int) -> tuple[float, bool]:
    """Of the last `counted` bytes of `data`, in one pass of their own without padding."""
    if not counted:
        return 0.0, True
    ids = torch.tensor([list(data)]) + model.config.vocab.offset
    with torch.inference_mode():
        chances = model(ids)[0].double().log_softmax(dim=-1)
    kept = chances[-counted:].gather(1, ids[0, -counted:, None])
    return float(kept.sum()), bool((chances.argmax(dim=-1) == ids[0])[-counted:].all())


CONTEXTS = [0, 3, WINDOW - 5, WINDOW - 4, WINDOW - 3, 60]
"""Bytes before a continuation of 4: none; below, at and above the window."""


@pytest.mark.parametrize("name", quick(MODELS, "megabyte", "blt"))
def test_every_architecture_answers_with_its_own_log_likelihoods(name):
    config = MODELS[name]
    params = random_params(config, "float32")
    twin = make_twin(config, params)
    text = "".join(c if c.isascii() and c != " " else "." for c in TEXT)
    pairs = [(text[:size], text[size : size + 4]) for size in CONTEXTS]
    expected = [
        log_likelihood(twin, (context + more).encode()[-WINDOW:], 4) for context, more in pairs
    ]
    texts = [text[:size] for size in (0, 1, WINDOW, WINDOW + 1, 2 * WINDOW - 1, 70)]
    for place in place_of_jax(define_model(config)[0](params)), place_of_torch(twin):
        model = answering(place)
        found = model.loglikelihood([Request(pair) for pair in pairs])
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        values = [value for value, _ in found]
        assert values == pytest.approx([value for value, _ in expected], rel=BOUND)
        wanted = [
            sum(
                log_likelihood(twin, each.encode()[begin:end], end - first)[0]
                for begin, first, end in harness.windows(len(each), 0, WINDOW)
            )
            for each in texts
        ]
        rolling = model.loglikelihood_rolling([Request((each,)) for each in texts])
        assert rolling == pytest.approx(wanted, rel=BOUND)
        assert len(model.cache_hook.seen) == len(pairs) + len(texts)


def test_windows_are_those_of_the_harness():
    """Its example: one id of context, the last window filled up; here no id stands for a start."""
    assert list(harness.windows(10, 0, 5)) == [(0, 0, 5), (4, 5, 9), (5, 9, 10)]
    assert list(harness.windows(5, 0, 5)) == [(0, 0, 5)] and not list(harness.windows(0, 0, 5))
    assert list(harness.windows(9, 6, 5)) == [(4, 6, 9)]
    assert list(harness.windows(10, 6, 5)) == [(5, 6, 10)]
    assert list(harness.windows(13, 6, 5)) == [(5, 6, 10), (8, 10, 13)]
    for size in range(20):
        for start in range(size + 1):
            cut = harness.windows(size, start, 5)
            seen = [i for _, first, end in cut for i in range(first, end)]
            assert seen == list(range(start, size))


def test_bytes_are_counted_and_white_space_belongs_to_the_continuation():
    twin = make_twin(CONFIGS["megabyte"], random_params(CONFIGS["megabyte"], "float32"))
    model = answering(place_of_torch(twin), 32)
    (spaced, _), (moved, _), (accent, _) = model.loglikelihood(
        [Request(("ab \n", "cd")), Request(("ab", " \ncd")), Request(("é", "ψ"))]
    )
    assert spaced == moved == pytest.approx(log_likelihood(twin, b"ab \ncd", 4)[0], rel=BOUND)
    assert accent == pytest.approx(log_likelihood(twin, "éψ".encode(), 2)[0], rel=BOUND)
    likely = place_of_torch(twin).generate([b"ab"], 1, GREEDY, 0)[0]
    greedy = [model.loglikelihood([Request(("ab", chr(byte)))])[0][1] for byte in range(33, 127)]
    assert sum(greedy) == likely.isascii() and greedy[likely[0] - 33]


def test_generation_stops_where_it_is_told():
    config = CONFIGS["megabyte"]
    params = random_params(config, "float32")
    model = define_model(config)[0](params)
    prompts, new = ["ab", "a longer context", "x" * 100], 12
    rooms = [prompt.encode()[-(WINDOW - new) :] for prompt in prompts]
    whole = [generate(model, [room], new, GREEDY)[0] for room in rooms]
    for place in place_of_jax(model), place_of_torch(make_twin(config, params)):
        answers = answering(place)
        settings: dict[str, Any] = {"max_gen_toks": new, "until": []}
        found = answers.generate_until([Request((prompt, settings)) for prompt in prompts])
        assert found == [each.decode("utf-8", "replace") for each in whole]
        stop = next(chr(byte) for byte in whole[0][3:] if byte < 128)
        (cut,) = answers.generate_until([Request(("ab", {**settings, "until": ["never", stop]}))])
        assert cut == whole[0].split(stop.encode())[0].decode("utf-8", "replace")
        sampled = {"max_gen_toks": new, "do_sample": True, "temperature": 0.9, "seed": 3}
        (first,), (again,) = (answers.generate_until([Request(("ab", sampled))]) for _ in range(2))
        assert first == again and answers.generate_until([]) == []


def test_what_cannot_be_honoured_is_refused(tmp_path, capsys, monkeypatch):
    config = CONFIGS["megabyte"]
    twin = make_twin(config, random_params(config, "float32"))
    model = answering(place_of_torch(twin))
    for settings, says in (
        ({"max_gen_toks": WINDOW}, "max_gen_toks=24: the window has 24 bytes"),
        ({"max_gen_toks": 4, "repetition_penalty": 1.2}, "repetition_penalty=1.2: these models"),
    ):
        with pytest.raises(ValueError, match=says):
            model.generate_until([Request(("ab", settings))])
    with pytest.raises(ValueError, match="batch_size auto: give a number"):
        harness._model_class(Base, place_of_torch(twin), 8).create_from_arg_obj(
            {}, {"batch_size": "auto"}
        )
    with pytest.raises(ValueError, match="no chat template"):
        model.apply_chat_template([])
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    run = str(tmp_path)
    assert "install the extra lm-eval" in refused(capsys, "lm-eval", run, "--", "--tasks", "x")
    assert "--model_args: the model is given" in refused(capsys, "lm-eval", run, "--", "-a", "x")
    assert "write the harness's options behind it" in refused(capsys, "lm-eval", run)


def test_the_commands_call_the_harness(tmp_path, capsys, monkeypatch):
    """With a stand-in for its command line, which is installed nowhere here."""
    config = CONFIGS["megabyte"]
    params = random_params(config, "float32")
    checkpoint.create_run(tmp_path / "run", Recipe(name="tiny", model=config), params)
    convert.export_model(config, params, tmp_path / "export")
    registered: dict[str, Any] = {}

    def cli_evaluate():
        made = registered["bytelm"].create_from_arg_obj({}, {"batch_size": "16"})
        answer = made.loglikelihood_rolling([Request((TEXT,))])[0]
        print(sys.argv[1:], answer)

    parts = {"lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": Base}}
    parts["lm_eval.__main__"] = {"cli_evaluate": cli_evaluate}

    def register_model(name):
        return lambda kind: registered.update({name: kind}) or kind

    parts["lm_eval.api.registry"] = {"register_model": register_model}
    for name, contents in parts.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "require_harness", lambda: None)
    from bytelm_jax.cli import main as cli

    words = ["--window", "32", "--", "--tasks", "mine", "--batch_size", "2"]
    before = sys.argv
    assert cli.main(["lm-eval", str(tmp_path / "run"), *words]) == 0
    assert torch_command.main([str(tmp_path / "export"), *words]) == 0
    ours, theirs = capsys.readouterr().out.splitlines()
    assert sys.argv is before and f"pretrained='{tmp_path}/run'" in ours
    assert "'--tasks', 'mine', '--batch_size', '2'" in theirs
    values = [float(line.rpartition(" ")[2]) for line in (ours, theirs)]
    assert values[0] == pytest.approx(values[1], rel=BOUND)
    assert "this model sees at most" in refused(
        capsys, "lm-eval", str(tmp_path / "run"), "--window", "99999", "--", "--tasks", "x"
    )
