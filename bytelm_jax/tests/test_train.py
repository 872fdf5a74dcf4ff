"""Runs that are killed, stopped, resumed and refused, through the real command."""

import contextlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm import runs
from bytelm.config import MegabyteConfig
from bytelm.metrics import comparable, read_metrics
from bytelm_jax.cli import main as cli
from bytelm_jax.training import checkpoint
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps

TINY = [
    *("--model.patch-size", "4", "--model.global-dim", "8", "--model.local-dim", "16"),
    *("--model.global-layers", "1", "--model.local-layers", "1", "--model.global-heads", "2"),
    *("--model.local-heads", "2", "--model.max-length", "64", "--model.dropout", "0.1"),
    *("--sequence-length", "64", "--batch-size", "8", "--warmup-steps", "5"),
]
DEADLINE = 240


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    source = random.Random(5)
    words = ["".join(source.choices("abcdefgh", k=source.randint(2, 7))) for _ in range(50)]
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(source.choices(words, k=400)))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, one compilation cache for all processes of this file, and no torch to import."""
    cache = str(tmp_path_factory.mktemp("cache"))
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "torch.py").write_text("raise ImportError('training in JAX needs no torch')")
    one, eight = (f"--xla_force_host_platform_device_count={count}" for count in (1, 8))
    assert eight in os.environ["XLA_FLAGS"]
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": f"{hidden}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(eight, one),
    }


class Run:
    """`bytelm train` as a process that cannot outlive its deadline."""

    def __init__(self, run_dir, text, environment, *options):
        command = [sys.executable, "-m", "bytelm_jax.cli", "train", "megabyte_tiny", *TINY]
        command += ["--data", str(text), "--run-dir", str(run_dir), *map(str, options)]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.run_dir = Path(run_dir)

    def finish(self):
        try:
            out, err = self.process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            pytest.fail(f"past its deadline: {out}{err}")
        return self.process.returncode, out, err

    def wait_for_step(self, step):
        """Until the metrics show `step`; the run itself is the clock, not the machine's speed."""
        path, deadline = self.run_dir / "metrics.jsonl", time.monotonic() + DEADLINE
        while time.monotonic() < deadline and self.process.poll() is None:
            # A run that resumes cuts the file, perhaps while it is read here.
            with contextlib.suppress(ValueError):
                if path.exists() and any(r["step"] >= step for r in read_metrics(path)):
                    return
            time.sleep(0.002)
        assert self.process.poll() is None or self.process.returncode == 0, self.finish()


def result(run_dir):
    """Parameters and metrics of a finished run, wall-clock fields left out."""
    _, params, step = checkpoint.load_run(Path(run_dir))
    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    return step, {k: np.asarray(v) for k, v in params.items()}, comparable(records)


def assert_same(ours, theirs):
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]
    assert ours[1].keys() == theirs[1].keys()
    for name in ours[1]:
        assert ours[1][name].tobytes() == theirs[1][name].tobytes(), name


LAST = 120
OPTIONS = ("--steps", LAST, "--log-every", 1, "--eval-every", 30, "--checkpoint-every", 10)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text, environment):
    run = Run(tmp_path_factory.mktemp("run") / "whole", text, environment, *OPTIONS)
    code, out, err = run.finish()
    assert code == 0, err
    assert "done: step 120 is saved" in out
    return run.run_dir


def test_metrics_hold_every_step_and_the_loss_falls(undisturbed):
    step, _, records = result(undisturbed)
    assert step == 120
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == list(range(1, 121))
    assert training[-1]["loss"] < training[0]["loss"] - 1
    for record in training:
        assert {"bits_per_byte", "learning_rate", "grad_norm"} < record.keys()
        assert record["bits_per_byte"] == pytest.approx(record["loss"] / np.log(2))
    validation = [r["step"] for r in records if "validation_bits_per_byte" in r]
    assert validation == [30, 60, 90, 120]
    with checkpoint.open_checkpoints(undisturbed) as manager:
        steps = sorted(manager.all_steps())
        assert steps[-1] == 120
        assert 2 <= len(steps) <= 3  # the last two, and the best if it is another
        scores = {
            r["step"]: r["validation_bits_per_byte"]
            for r in records
            if r["step"] in steps and "validation_bits_per_byte" in r
        }
        assert checkpoint.choose_step(manager, "best") == min(scores, key=lambda s: scores[s])


@pytest.mark.parametrize(
    ("number", "kills"),
    [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 4, marks=pytest.mark.slow)],
)
def test_stopped_and_killed_runs_end_bit_for_bit_the_same(
    number, kills, undisturbed, tmp_path, text, environment
):
    run = Run(tmp_path / "run", text, environment, *OPTIONS)
    run.wait_for_step(13)
    run.process.send_signal(number)
    code, out, err = run.finish()
    assert code == 0, err
    step = int(out.split("step ")[1].split()[0])
    assert out.startswith(f"stopped: step {step} is saved in") and 13 <= step < LAST
    assert checkpoint.load_run(run.run_dir)[2] == step

    chance = random.Random(time.time_ns())
    marks = sorted(chance.sample(range(step + 1, LAST - 5), kills))
    print(f"kills after steps {marks}")
    for mark in marks:
        run = Run(tmp_path / "run", text, environment, *OPTIONS)
        run.wait_for_step(mark)
        time.sleep(chance.random() * 0.05)
        run.process.send_signal(signal.SIGKILL)
        run.finish()
    code, _, err = Run(tmp_path / "run", text, environment, *OPTIONS).finish()
    assert code == 0, err
    assert_same(result(run.run_dir), result(undisturbed))


@pytest.mark.slow
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, text, environment):
    options = (
        "--steps",
        60,
        "--checkpoint-every",
        2,
        "--optimizer.name",
        "sgd",
        "--warmup-steps",
        40,
    )
    rate = ("--lr", "1e4", "--max-grad-norm", 0, "--weight-decay", 0)
    code, _, err = Run(tmp_path / "run", text, environment, *options, *rate).finish()
    assert code == 1, err
    last = err.strip().splitlines()[-1]
    assert "lower optimizer.learning_rate=10000.0" in last
    step = checkpoint.load_run(tmp_path / "run")[2]
    assert f"the checkpoint of step {step} is kept" in last
    _, params, records = result(tmp_path / "run")
    assert all(np.isfinite(value).all() for value in params.values())
    assert all(np.isfinite(r.get("loss", 0.0)) for r in records)


def test_another_run_in_the_same_folder_is_refused(undisturbed, tmp_path, text, capsys):
    before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
    command = ["train", "megabyte_tiny", *TINY, "--run-dir", str(undisturbed), *map(str, OPTIONS)]

    def refusal(*change: str, data: Path = text) -> str:
        capsys.readouterr()
        assert cli.main([*command, "--data", str(data), *change]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    for change, line in {
        ("--model.patch-size", "8"): "model.patch_size=8: {} was started with 4",
        ("--learning-rate", "0.5"): "optimizer.learning_rate=0.5: {} was started with 0.003",
        ("--train.seed", "3"): "train.seed=3: {} was started with 0",
    }.items():
        assert line.format(undisturbed) in refusal(*change)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("quite other bytes " * 500)
    assert "data: not the bytes that" in refusal(data=other)
    assert before == {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}


def test_config_json_rebuilds_the_recipe(undisturbed):
    recipe = runs.load_recipe(undisturbed)
    assert recipe.train.steps == 120 and isinstance(recipe.model, MegabyteConfig)
    assert recipe.model.patch_size == 4
    raw = json.loads((undisturbed / "config.json").read_text())
    assert raw["model"]["architecture"] == "megabyte" and raw["name"] == "megabyte_tiny"


def test_a_step_compiled_ahead_is_not_compiled_again(caplog):
    mesh = meshes.make_mesh(2, 1)

    @jax.jit
    def step(state, ids):
        return state._replace(step=state.step + ids.sum())

    state = steps.TrainState(jnp.int32(0), {}, ())
    state = jax.device_put(state, meshes.replicated(mesh))
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        with steps.compiling(step, template, (4, 6), mesh):
            pass
        state = step(state, meshes.put_batch(mesh, np.ones((4, 6), np.int32)))
    compiled = [
        r.getMessage() for r in caplog.records if "compilation of jit(step)" in r.getMessage()
    ]
    assert int(state.step) == 24
    assert not compiled  # in this thread, whose compilations alone are logged here
