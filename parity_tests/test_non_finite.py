"""Loss and weights that are not finite: how runs of both packages end, and what they leave."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bytelm_jax
import bytelm_torch
from bytelm import recipes as jax_recipes
from bytelm.config import DataConfig, MegabyteConfig, Recipe, TrainConfig, to_dict
from bytelm.metrics import METRIC, Evaluation
from bytelm.sampling import SamplerConfig
from bytelm_jax.cli import main as cli
from bytelm_jax.inference.sampling import next_ids
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.training import checkpoint as jax_checkpoint
from bytelm_jax.training import loop as jax_train
from bytelm_jax.training import step as jax_step
from bytelm_torch.inference.sampling import next_ids as torch_next_ids
from bytelm_torch.interop import export
from bytelm_torch.train import main
from bytelm_torch.training import checkpoint, parallel, reporter
from bytelm_torch.training import loop as train

MODEL = MegabyteConfig(
    patch_size=4,
    global_dim=4,
    local_dim=8,
    max_length=16,
    global_layers=1,
    global_heads=2,
    local_layers=1,
    local_heads=2,
)
RECIPE = Recipe(
    name="megabyte_tiny",
    model=MODEL,
    data=DataConfig(sequence_length=16, validation_fraction=0.3),
    train=TrainConfig(
        steps=3, batch_size=2, devices=1, log_every=1, eval_every=0, checkpoint_every=1
    ),
)


def zeros(optimizer, init, template, given):
    """In the place of `steps.compile_init`, which would take most of the time here."""
    return lambda: jax.tree.map(
        lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding), template
    )


class Package:
    """One package's command on `RECIPE`, its step replaced by one that fails on request.

    `skipped` steps have no finite loss; from step `spoiled` on, the weights are not finite;
    `validations` are the bits per byte that one evaluation after another gives.
    """

    def __init__(self, name, folder, monkeypatch):
        self.name, self.run, self._patch = name, folder / "run", monkeypatch
        self.config = folder / "recipe.json"
        self.text = folder / "text"
        self.text.mkdir()
        for i in range(8):
            (self.text / str(i)).write_text("some bytes to learn from; " * 4)
        self.leaf = "params.to_logits.bias" if name == "jax" else "model.to_logits.bias"

    def command(self, skipped=(), spoiled=99, validations=(1.0, 1.0, 1.0), **changes):
        """The exit code of training."""
        recipe = replace(RECIPE, train=replace(RECIPE.train, **changes))
        module, steps = (jax_train, jax_step) if self.name == "jax" else (train, parallel)
        evaluations = iter([Evaluation(bits * math.log(2), 1) for bits in validations])
        self._patch.setattr(module, "evaluate_batches", lambda *_: next(evaluations))
        make = self._jax_step if self.name == "jax" else self._torch_step
        self._patch.setattr(steps, "make_train_step", make(skipped, spoiled))
        paths = ["--run-dir", str(self.run), "--data", str(self.text)]
        if self.name == "torch":
            self.config.write_text(json.dumps(to_dict(recipe)))
            return main([str(self.config), *paths])
        self._patch.setattr(jax_recipes, "get", lambda _: recipe)
        self._patch.setattr(jax_step, "compile_init", zeros)
        return cli.main(["train", recipe.name, *paths])

    def _jax_step(self, skipped, spoiled):
        def make(*_, names):
            def step(state, ids):
                count, params = int(state.step) + 1, dict(state.params)
                if count >= spoiled:
                    params["to_logits.bias"] = params["to_logits.bias"].at[300].set(jnp.inf)
                loss = jnp.float32("nan" if count in skipped else 2.0)
                report = {"loss": loss, "grad_norm": jnp.float32(1.0)}
                return state._replace(step=state.step + 1, params=params), report

            vars(step)["lower"] = lambda *_: SimpleNamespace(compile=None)
            return step

        return make

    def _torch_step(self, skipped, spoiled):
        def make(model, *_):
            def step(count, rows, rate, clip, stop):
                if count + 1 >= spoiled:
                    model.to_logits.bias.data[300] = torch.inf
                loss = torch.tensor(torch.nan if count + 1 in skipped else 2.0)
                one = torch.tensor(1.0)
                return {"loss": loss, "grad_norm": one, "stop": torch.tensor(float(stop))}

            return step

        return make

    def steps(self):
        """The steps on disk, all of which can be read."""
        steps = checkpoint.saved_steps(self.run)
        for step in steps:
            if self.name == "jax":
                jax_checkpoint.load_run(self.run, str(step))
            else:
                export.from_pretrained(self.run / "checkpoints" / str(step))
        return steps


@pytest.fixture(params=["jax", "torch"])
def package(request, tmp_path, monkeypatch):
    return Package(request.param, tmp_path, monkeypatch)


def last_line(capsys):
    """The last line on standard error of a command that says nothing on standard output."""
    output = capsys.readouterr()
    assert "done" not in output.out and "stopped" not in output.out
    return output.err.strip().splitlines()[-1]


def test_a_run_that_ends_on_skipped_steps_says_what_is_on_disk(package, capsys):
    assert package.command(skipped=(2, 3), validations=[float("nan")]) == 1
    line = last_line(capsys)
    assert "train: step 3: the last steps (2) were skipped because " in line
    assert "the checkpoint of step 1 is kept; lower optimizer.learning_rate=0.001" in line
    assert package.steps() == [1]


def test_good_weights_are_saved_at_the_end_even_where_the_last_step_was_skipped(package, capsys):
    assert package.command(skipped=(3,), checkpoint_every=0) == 0
    assert capsys.readouterr().out.startswith("done: step 3 is saved")
    assert package.steps() == [3]


@pytest.mark.parametrize(
    ("spoiled", "eval_every", "note"),
    [(1, 1, "no checkpoint was saved"), (3, 0, "the checkpoint of step 2 is kept")],
)
def test_weights_that_are_not_finite_end_the_run(package, spoiled, eval_every, note, capsys):
    assert package.command(spoiled=spoiled, eval_every=eval_every) == 1
    line = last_line(capsys)
    assert f"train: step {spoiled}: {package.leaf} holds NaN or infinity; {note}" in line
    assert package.steps() == list(range(1, spoiled))


@pytest.fixture
def careless(package, monkeypatch):
    """A run that saved non-finite weights at step 3, as runs did before saving looked at them."""
    with monkeypatch.context() as unguarded:
        unguarded.setattr(jax_checkpoint, "check_finite", lambda *_: None)
        for module in (export, checkpoint, reporter):
            unguarded.setattr(module, "first_non_finite", lambda *_: None)
        assert package.command(spoiled=3) == 0
    assert checkpoint.saved_steps(package.run)[-2:] == [2, 3]
    return package


@pytest.mark.parametrize("package", ["jax"], indirect=True)
def test_no_command_takes_weights_that_are_not_finite(careless, tmp_path, capsys):
    run, text = str(careless.run), str(careless.text)
    capsys.readouterr()
    for command in (
        ["eval", run, "--data", text],
        ["generate", run],
        ["inspect", "text", "--model", run],
        ["export", run, "--out", str(tmp_path / "out")],
        ["calibrate", run, "--data", text],
        ["parity", run],
    ):
        assert cli.main(command) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err == (
            f"bytelm {command[0]}: checkpoint 3 in {run}/checkpoints: params.to_logits.bias holds "
            "NaN or infinity, so the run had diverged; choose another checkpoint\n"
        )
    assert not (tmp_path / "out").exists()


def test_no_run_goes_on_from_weights_that_are_not_finite(careless, capsys):
    capsys.readouterr()
    if careless.name == "jax":
        assert careless.command() == 0
        output = capsys.readouterr()
        assert "checkpoint 3 in " in output.err and "holds NaN or infinity" in output.err
        assert f"it is now {careless.run}/damaged/3, and the run continues from" in output.err
        assert careless.steps()[-2:] == [2, 3]
    else:
        assert careless.command() == 2
        assert last_line(capsys).startswith(
            f"train: {careless.run}/checkpoints/3/model.safetensors: to_logits.bias: holds NaN"
        )


def test_nothing_is_written_of_a_run_that_is_refused(package, monkeypatch, capsys):
    """Trackers are opened last of all: what they refuse leaves no config.json behind."""

    def refuse(*_):
        raise ValueError("train.track=wandb: no")

    with monkeypatch.context() as patch:
        patch.setattr(jax_train if package.name == "jax" else train, "open_trackers", refuse)
        assert package.command() == 2
    assert last_line(capsys).endswith("train: train.track=wandb: no")
    assert not (package.run / "config.json").exists()
    assert package.command() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_whose_validation_is_not_finite_are_not_saved(package, value, capsys):
    changes = {"steps": 4, "eval_every": 1, "keep_last": 2, "keep_best": 1}
    assert package.command(validations=(3.0, value, 2.0, value), **changes) == 1
    said = capsys.readouterr()
    assert "step 2: validation is not finite" in said.err and "done" not in said.out
    why = "train: step 4: the validation of its weights is not finite, so the end of the run is not"
    assert why in said.err.splitlines()[-1]
    assert package.steps() == [1, 3]
    if package.name == "jax":
        assert jax_checkpoint.load_run(package.run, "best")[2] == 3
    lines = (package.run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    scores = [r[METRIC] for r in records if METRIC in r]
    assert scores == [3.0, None, 2.0, None]


def test_a_run_without_progress_stops_early(package, capsys):
    changes = {"steps": 9, "eval_every": 1, "checkpoint_every": 0, "patience": 2}
    assert package.command(validations=(3.0, 2.0, 2.0, float("nan")), **changes) == 1
    assert package.command(validations=(3.0, 2.0, 2.5, 2.0), **changes) == 0
    said = capsys.readouterr()
    line = "stopped early: 2 evaluations in a row not below 2.0000 bits per byte at step 2"
    assert line in said.err and "done: step 4 is saved in" in said.out and package.steps() == [4]
    assert package.command(validations=(), **changes) == 0  # it has stopped
    assert line in capsys.readouterr().err and package.steps() == [4]
    changes |= {"patience": 3}
    assert package.command(validations=(2.5,), **changes) == 0
    assert package.steps() == [4, 5]
    capsys.readouterr()
    assert package.command(patience=1, eval_every=0) == 2
    assert "patience=1: counts evaluations; set train.eval_every above 0" in last_line(capsys)


def test_nothing_is_sampled_from_logits_that_are_not_finite():
    """Finite weights can be too large to compute with."""
    params = {n: jnp.full(leaf.shape, 1e30) for n, leaf in abstract_params(MODEL).items()}
    model: Any = define_model(MODEL)[0](params)
    for generate, of in (
        (bytelm_jax.generate, model),
        (bytelm_torch.generate, make_twin(MODEL, params)),
    ):
        with pytest.raises(ValueError, match=r"^the model's logits are not finite, so nothing"):
            generate(of, [b"ab"], 4)
    rows = np.zeros((3, MODEL.vocab.size), np.float32)
    rows[0, 7], rows[1, 8] = np.nan, np.inf
    for name in ("greedy", "categorical", "entropy"):
        sampler, uniform = SamplerConfig(sampler=name), np.zeros(3, np.float32)
        ours = next_ids(jnp.asarray(rows), jnp.asarray(uniform), sampler, MODEL.vocab)
        theirs = torch_next_ids(
            torch.from_numpy(rows), torch.from_numpy(uniform), sampler, MODEL.vocab
        )
        assert ours.tolist() == theirs.tolist() == [MODEL.vocab.pad_id] * 2 + [0]


def test_what_older_runs_stored_is_never_the_best_either(package, monkeypatch):
    with monkeypatch.context() as older:
        for module in (jax_checkpoint, checkpoint):
            older.setattr(module, "score", lambda metrics: metrics and metrics[METRIC])
        older.setattr(jax_checkpoint, "_rank", lambda metrics: 0.0)
        options = {"eval_every": 1, "keep_last": 3}
        assert package.command(validations=(3.0, 2.0, float("nan")), **options) == 0
    assert package.steps() == [1, 2, 3]
    if package.name == "jax":
        assert jax_checkpoint.load_run(package.run, "best")[2] == 2
    options = {"eval_every": 1, "keep_last": 1, "keep_best": 1, "steps": 4}
    assert package.command(validations=(5.0,), **options) == 0
    assert package.steps() == [2, 4]
