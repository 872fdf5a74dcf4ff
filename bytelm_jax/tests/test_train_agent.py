"""Training under the Q-learning agent: resumed bit for bit, and on past skipped steps."""

import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from bytelm import recipes
from bytelm.config import (
    DataConfig,
    MegabyteConfig,
    MuonConfig,
    QLearningConfig,
    QLearningSGDConfig,
    TrainConfig,
)
from bytelm.metrics import comparable, read_metrics
from bytelm.runs import DivergedError
from bytelm_jax.training import checkpoint
from bytelm_jax.training import step as steps
from bytelm_jax.training.loop import train

MODEL = MegabyteConfig(
    patch_size=4,
    global_dim=8,
    local_dim=16,
    max_length=32,
    global_layers=1,
    global_heads=2,
    local_layers=1,
    local_heads=2,
)
STEERED = QLearningSGDConfig(
    learning_rate=0.1,
    noise_scale=0.1,
    controller=QLearningConfig(interval=1),
)


@pytest.fixture
def recipe(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some bytes to learn from, again and again; " * 60)
    return replace(
        recipes.megabyte_tiny(),
        model=MODEL,
        optimizer=STEERED,
        data=DataConfig(paths=(str(text),), sequence_length=32, validation_fraction=0.0),
        train=TrainConfig(steps=8, batch_size=4, devices=1, log_every=1, checkpoint_every=4),
    )


def records(run_dir):
    lines = read_metrics(run_dir / "metrics.jsonl")
    return comparable(lines)


def fingerprints_of_a_whole_and_a_resumed_run(recipe, tmp_path, monkeypatch):
    make, compiled = steps.make_train_step, []  # both runs share the compiled step

    def make_once(*arguments, names):
        compiled.extend([] if compiled else [make(*arguments, names=names)])
        return compiled[0]

    monkeypatch.setattr(steps, "make_train_step", make_once)
    train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "8")
    train(recipe, tmp_path / "resumed")
    marks = []
    for name in ("whole", "resumed"):
        with checkpoint.open_checkpoints(tmp_path / name) as manager:
            marks.append(checkpoint.read_metadata(manager, 8)["fingerprints"])
    return marks


@pytest.mark.slow
def test_a_resumed_run_under_muon_ends_with_the_same_state(recipe, tmp_path, monkeypatch):
    recipe = replace(recipe, optimizer=MuonConfig())
    marks = fingerprints_of_a_whole_and_a_resumed_run(recipe, tmp_path, monkeypatch)
    assert marks[0] == marks[1] and len(marks[0]["optimizer"]) > 20


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_agent(recipe, tmp_path, monkeypatch):
    marks = fingerprints_of_a_whole_and_a_resumed_run(recipe, tmp_path, monkeypatch)
    assert marks[0] == marks[1] and len(marks[0]["optimizer"]) > 20
    logged = records(tmp_path / "whole")
    assert logged == records(tmp_path / "resumed") and len(logged) == 8
    for record in logged:
        scheduled = 0.1 * record["step"] / STEERED.warmup_steps
        assert record["learning_rate"] == pytest.approx(scheduled * record["learning_rate_scale"])
    assert len({record["learning_rate_scale"] for record in logged}) > 1
    assert {"momentum", "epsilon", "reward", "momentum_action", "skipped_steps"} <= logged[0].keys()


@pytest.mark.parametrize(("skips", "broken", "stops"), [(1, 19, 0), (1, 20, 21), (0, 20, 21)])
def test_a_run_stops_where_its_optimizer_cannot_go_on(
    recipe, tmp_path, monkeypatch, skips, broken, stops
):
    """Steps 2 to 1 + `broken` are non-finite; `skips`: whether the optimizer reports skips."""

    def make_train_step(*arguments, names):
        def step(state, ids):
            count = int(state.step) + 1
            loss = jnp.float32(math.nan if 2 <= count <= 1 + broken else 2.0)
            report = {"loss": loss, "grad_norm": jnp.float32(1.0)}
            report |= {"skipped_steps": jnp.int32(min(count - 1, broken))} if skips else {}
            return state._replace(step=state.step + 1), report

        vars(step)["lower"] = lambda *_: SimpleNamespace(compile=None)
        return step

    monkeypatch.setattr(steps, "make_train_step", make_train_step)
    recipe = replace(recipe, train=replace(recipe.train, steps=24, log_every=24))
    if stops:
        with pytest.raises(DivergedError, match=f"step {stops}: the loss is nan"):
            train(recipe, tmp_path / "run")
        return
    assert train(recipe, tmp_path / "run").step == 24
    logged = records(tmp_path / "run")
    assert [record["step"] for record in logged] == [*range(2, 21), 24]
    assert all("loss" not in record for record in logged[:-1])
    assert [record["skipped"] for record in logged[:-1]] == list(range(1, 20))
    assert logged[-1]["skipped_steps"] == 19
