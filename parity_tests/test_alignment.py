"""The stage that teaches a byte encoder a token model's embeddings, JAX against torch."""

import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bytelm_torch
from bytelm import alignment, tolerances
from bytelm.config import AdamWConfig, BLTConfig, DataConfig, Recipe, TrainConfig
from bytelm.export import imported_recipe
from bytelm.schedules import learning_rate_schedule
from bytelm_jax.interop.convert import export_model, to_torch
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import alignment as in_jax
from bytelm_jax.training.step import TrainState
from bytelm_torch import align
from bytelm_torch.training import alignment as in_torch
from bytelm_torch.training.parallel import Group
from parity_tests.twins import random_params

MODEL = BLTConfig(
    patcher="space", ngram_sizes=(3,), ngram_rows=11, local_dim=8, local_window=8,
    encoder_heads=2, encoder_hidden_dim=8, decoder_layers=1, decoder_heads=2,
    decoder_hidden_dim=8, global_dim=12, global_layers=1, global_heads=2, global_hidden_dim=8,
    patch_budget=1.0,
)  # fmt: skip
LENGTH, STEPS = 24, 4
RECIPE = Recipe(
    name="imported",
    model=MODEL,
    optimizer=AdamWConfig(learning_rate=0.01, warmup_steps=2),
    data=DataConfig(sequence_length=LENGTH),
    train=TrainConfig(steps=STEPS, batch_size=4, devices=1),
)


class Words:
    """A tokenizer whose tokens are words, and their ids the lengths of these."""

    def encode_batch(self, texts, add_special_tokens):
        assert not add_special_tokens
        found = ([match.span() for match in re.finditer(r"\S+", text)] for text in texts)
        return [SimpleNamespace(ids=[b - a for a, b in spans], offsets=spans) for spans in found]


def prepared(file):
    embeddings = np.random.default_rng(0).normal(size=(9, MODEL.global_dim)).astype(np.float32)
    text = "some words of a text, and the café of more of them ".encode()
    alignment.prepare([text * 20], Words(), embeddings, 0, file)
    return file


def test_both_packages_learn_the_same(tmp_path, x64):
    """Losses, cosines, norms and parameters of some steps, in float64; held-out text as well."""
    data, params = alignment.open_aligned(prepared(tmp_path / "x")), random_params(MODEL, "float64")
    ours = in_jax.Stage(RECIPE, data, jnp.float64)
    state = TrainState(jnp.zeros((), jnp.int32), params, ours.optimizer.init(params))
    theirs = in_torch.Stage(RECIPE, data, Group(0, 1, torch.device("cpu")))
    theirs.model.double()
    tensors = {name: torch.from_numpy(value) for name, value in to_torch(params).items()}
    theirs.model.load_state_dict(tensors)
    rate = learning_rate_schedule(RECIPE.optimizer, STEPS)
    for step in range(STEPS):
        state, expected = ours.step(state, step)
        actual = theirs.step(step, rate(step))
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            bound = tolerances.GRADIENTS if name == "grad_norm" else tolerances.LOGITS
            error = relative_error(actual[name].numpy(), np.asarray(value))
            assert error <= bound["float64"], (step, name, error)
    trained, moved = theirs.model.state_dict(), set()
    for name, value in to_torch(state.params).items():
        error = relative_error(trained[name].numpy(), value)
        assert error <= tolerances.AFTER_200_STEPS, (name, error)
        moved |= {name} if (value != tensors[name].numpy()).any() else set()
    assert moved == {n for n in tensors if n.startswith(("encoder.", "to_global."))}
    expected = ours.validate(state.params)
    for name, value in theirs.validate().items():
        error = relative_error(np.array(value), np.array(expected[name]))
        assert error <= tolerances.LOGITS["float64"], (name, error)


def test_the_recipe_of_the_stage():
    """Warm-up may be 0 steps; checkpoints are a quarter of the steps apart, or closer."""
    for changes, warmup, every in [
        ({}, 2, 1),
        ({"steps": 200, "warmup_steps": -1}, 2, 50),
        ({"steps": 4000, "warmup_steps": 0}, 0, 250),
        ({"warmup_steps": 3, "checkpoint_every": 4}, 3, 4),
    ]:
        stage = alignment.stage_recipe(RECIPE, "run", **changes)
        assert (stage.optimizer.warmup_steps, stage.train.checkpoint_every) == (warmup, every)
    with pytest.raises(ValueError, match="warmup_steps=-2"):
        alignment.stage_recipe(RECIPE, "run", warmup_steps=-2)
    of_export = imported_recipe(MODEL, {})  # as the help of torch's command says
    run, optimizer = of_export.train, of_export.optimizer
    assert (run.steps, run.batch_size) == (1000, 32)
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (1e-3, 100)


def test_the_command_of_torch_resumes_and_refuses(tmp_path, capsys):
    """Two steps and two more are four, bit for bit; RUN may be gone when it resumes."""
    export_model(MODEL, random_params(MODEL, "float32"), tmp_path / "run")
    command = [str(tmp_path / "run"), "--tokens", str(prepared(tmp_path / "x")), "--steps", "4"]
    command += ["--batch-size", "4", "--sequence-length", str(LENGTH), "--checkpoint-every", "2"]
    assert align.main([*command, "--run-dir", str(tmp_path / "whole")]) == 0
    assert align.main([*command, "--run-dir", str(tmp_path / "parts")]) == 0
    (tmp_path / "parts" / "checkpoints" / "4").rename(tmp_path / "gone")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert align.main([*command, "--run-dir", str(tmp_path / "parts")]) == 0
    assert "resuming aligned" in capsys.readouterr().out
    whole, parts = (bytelm_torch.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    for (name, one), two in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, two), name
    capsys.readouterr()
    assert align.main([*command, "--run-dir", str(tmp_path / "whole"), "--seed", "5"]) == 2
    assert "started with 0; keep that value or name another folder" in capsys.readouterr().err
    assert align.main([*command, "--run-dir", str(tmp_path / "new")]) == 2
    assert "run" in capsys.readouterr().err and not (tmp_path / "new").exists()
