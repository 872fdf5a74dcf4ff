"""Schedule, clipping, decay mask and metrics files, against values written out."""

import json
import os
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import AdamWConfig, BLTConfig, EntropyConfig, MuonConfig, Recipe, TrainConfig
from bytelm.metrics import MetricsLog, Throughput, read_metrics
from bytelm.schedules import learning_rate_schedule as torch_schedule
from bytelm.trainable import Trainable, trainable
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.optimizers.build import (
    build_optimizer,
    clip_by_global_norm,
    decay_mask,
    learning_rate_schedule,
)
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from parity_tests.twins import MEGABYTES


def test_schedule_warms_up_and_decays_the_same_in_both_frameworks(x64):
    config = AdamWConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    ours = learning_rate_schedule(config, 12)
    theirs = torch_schedule(config, 12)
    counts = jnp.arange(15)
    actual = np.asarray(jax.vmap(ours)(counts))
    np.testing.assert_allclose(actual[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-15)
    assert actual[4] == 2.0 and actual[8] == pytest.approx(2.0 * 0.55) and actual[14] == 0.2
    assert (np.diff(actual[4:13]) < 0).all()
    np.testing.assert_allclose(actual, [theirs(int(c)) for c in counts], rtol=1e-15)
    assert actual.dtype == np.float64
    for change, ends in {
        ("linear", 0): {4: 2.0, 8: 1.1, 12: 0.2, 14: 0.2},
        ("constant", 0): {3: 2.0, 4: 2.0, 14: 2.0},
        ("wsd", 0): {3: 2.0, 4: 2.0, 14: 2.0},
        ("wsd", 4): {3: 2.0, 8: 2.0, 10: 1.1, 12: 0.2, 14: 0.2},
        ("wsd", 12): {3: 2.0, 8: 1.1, 12: 0.2},
    }.items():
        other = replace(config, schedule=change[0], decay_steps=change[1])
        rates = np.asarray(jax.vmap(learning_rate_schedule(other, 12))(counts))
        np.testing.assert_allclose(rates, [torch_schedule(other, 12)(int(c)) for c in counts])
        assert {at: rates[at] for at in ends} == pytest.approx(ends), change


def test_no_warm_up_starts_at_the_full_rate():
    schedule = learning_rate_schedule(AdamWConfig(learning_rate=3.0, warmup_steps=0), 10)
    assert float(schedule(jnp.asarray(0))) == 3.0


def test_clip_keeps_short_gradients_and_shortens_long_ones():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clip: Any = clip_by_global_norm(1.0)
    short, _ = clip.update(gradients, clip.init(gradients))
    np.testing.assert_allclose(short["b"], [[0.8]], rtol=1e-6)
    wide: Any = clip_by_global_norm(5.0)
    same, _ = wide.update(gradients, clip.init(gradients))
    np.testing.assert_array_equal(same["a"], gradients["a"])
    off, _ = clip_by_global_norm(0.0).update(gradients, clip.init(gradients))
    assert off is gradients
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    still, _ = clip.update(zeros, clip.init(zeros))
    assert np.isfinite(np.asarray(still["a"])).all()


def test_decay_leaves_norms_and_biases_alone():
    mask = decay_mask(abstract_params(MEGABYTES["paper"]))
    undecayed = {name for name, decays in mask.items() if not decays}
    assert undecayed and all(name.endswith((".scale", ".bias")) for name in undecayed)
    assert all(name.endswith((".kernel", ".embedding")) for name in mask.keys() - undecayed)


@pytest.mark.parametrize("kind", [AdamWConfig, MuonConfig])
def test_what_is_frozen_costs_nothing_and_counts_in_no_norm(kind):
    params = {"patcher.kernel": jnp.array([[-0.0, 2.0]]), "to_q.kernel": jnp.array([[3.0]])}
    config = kind(learning_rate=0.5, warmup_steps=0, weight_decay=0.1)
    whole: Any = build_optimizer(config, 10, parts=Trainable(frozenset({"patcher.kernel"})))
    alone: Any = build_optimizer(config, 10)
    moving = {"to_q.kernel": params["to_q.kernel"]}
    state = whole.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(alone.init(moving))
    huge = {"patcher.kernel": jnp.array([[1e9, 1e9]]), "to_q.kernel": jnp.array([[0.25]])}
    actual, _ = whole.update(huge, state, params)
    expected, _ = alone.update({"to_q.kernel": huge["to_q.kernel"]}, alone.init(moving), moving)
    np.testing.assert_array_equal(actual["to_q.kernel"], expected["to_q.kernel"])
    np.testing.assert_array_equal(actual["patcher.kernel"], [[0.0, 0.0]])


@pytest.mark.slow
def test_a_frozen_patcher_leaves_every_step_bit_for_bit():
    config = BLTConfig(
        entropy=EntropyConfig(dim=4, layers=1, heads=1, hidden_dim=4, window=4),
        **{"ngram_sizes": (3,), "ngram_rows": 7, "local_dim": 4, "local_window": 4},
        **{"encoder_heads": 1, "encoder_hidden_dim": 4, "decoder_layers": 1, "decoder_heads": 1},
        **{"decoder_hidden_dim": 4, "global_dim": 8, "global_layers": 1, "global_heads": 1},
        **{"global_hidden_dim": 4, "patch_budget": 1.0},
    )
    recipe = Recipe(name="frozen", model=config)
    parts = trainable(recipe, abstract_params(config))
    optimizer = build_optimizer(AdamWConfig(warmup_steps=0, weight_decay=0.5), 3, parts=parts)
    train = TrainConfig(steps=3, batch_size=2, devices=2, parallel="shard_map")
    mesh = meshes.make_mesh(2)
    bind, init = define_model(config)
    state = steps.init_state(mesh, optimizer, lambda: init(0))
    # A zero whose sign an added zero would turn.
    name = "patcher.norm.scale"
    state = state._replace(params=state.params | {name: state.params[name] * -0.0})
    before = jax.tree.map(np.asarray, state.params)
    step = steps.make_train_step(bind, optimizer, train, config.vocab.pad_id, mesh, parts)
    ids = np.random.default_rng(0).integers(4, 260, (2, 12)).astype(np.int32)
    state, _ = step(state, meshes.put_batch(mesh, ids))
    state, report = step(state, meshes.put_batch(mesh, ids))
    assert np.isfinite(float(report["grad_norm"])) and float(report["grad_norm"]) > 0
    for key, value in state.params.items():
        same = np.asarray(value).tobytes() == before[key].tobytes()
        assert same == key.startswith("patcher."), key
    assert int(state.step) == 2

    # A NaN weight makes a non-finite loss: the step counts and changes nothing.
    name = "to_logits.kernel"
    state = state._replace(params=state.params | {name: state.params[name] * np.nan})
    before = jax.tree.map(np.asarray, state)
    state, report = step(state, meshes.put_batch(mesh, ids))
    assert np.isnan(float(report["loss"])) and int(state.step) == 3
    for old, new in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(state[1:]), strict=True):
        assert np.asarray(new).tobytes() == old.tobytes()


def test_metrics_file_is_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 1.0 / step})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # what a kill leaves
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    log = MetricsLog(path, 2)
    log.write({"step": 3, "loss": 0.5})
    log.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.5},
    ]


def test_a_damaged_metrics_file_is_named_and_what_it_holds_is_kept(tmp_path, capsys):
    path, good = tmp_path / "metrics.jsonl", b'{"step": 1, "loss": 2.0}\n'
    for bad in (
        b'{"step": 2, "loss": "\xff"}', b"[1]", b"null", b'{"step": 2, "lo', b"[" * 10**5,
        b'{"step": 2, "loss": ' + b"9" * 5000 + b"}", b'{"step": "2"}', b" " * 2**21,
    ):  # fmt: skip
        path.write_bytes(good + bad + b"\n" + good)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is .*; remove") as caught:
            read_metrics(path)
        assert len(str(caught.value).splitlines()) == 1
        log = MetricsLog(path, 1)
        log.close()
        assert read_metrics(path) == log.records and log.records[0] == {"step": 1, "loss": 2.0}
        assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == good + bad + b"\n" + good
        (line,) = capsys.readouterr().err.splitlines()
        assert "warning" in line and "line 2" in line
    path.write_bytes(good + b'{"step": 2, "loss": NaN, "mfu": 1e999}\n' + good[:10])
    assert read_metrics(path)[1] == {"step": 2, "loss": None, "mfu": None}
    log = MetricsLog(path, 2)
    log.write({"step": 3, "loss": float("-inf")})
    log.close()
    for word in ("NaN", "Infinity", "1e999"):
        assert word not in path.read_text()
    path.unlink()
    os.mkfifo(path)
    for opens in (read_metrics, lambda path: MetricsLog(path, 0)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be .*not a plain file"):
            opens(path)
    path.unlink()
    log = MetricsLog(path, 0)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(ValueError, match=r"metrics\.jsonl: cannot be written \(No space left"):
        log.write({"step": 1})
    log.close()


def test_throughput_counts_what_was_added_since_the_last_reading(monkeypatch):
    now = 100.0
    monkeypatch.setattr("bytelm.metrics.time.perf_counter", lambda: now)
    rates = Throughput(flops_per_byte=10.0, devices=1, device="cpu")
    rates.add(500)
    now = 102.0
    assert rates.read() == {"bytes_per_second": 250.0, "seconds": 2.0}
    rates.add(100)
    now = 110.0
    rates.restart()
    rates.add(30)
    now = 111.0
    assert rates.read()["bytes_per_second"] == 30.0
