"""Schedule, clipping, decay mask and metrics files, against values written out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm_jax.config import OptimizerConfig, to_dict
from bytelm_jax.metrics import MetricsLog, Throughput, read_metrics
from bytelm_jax.models import abstract_params
from bytelm_jax.optim import clip_by_global_norm, decay_mask, learning_rate_schedule
from bytelm_torch.config import OptimizerConfig as TorchOptimizerConfig
from bytelm_torch.config import from_dict
from bytelm_torch.optim import learning_rate_schedule as torch_schedule
from parity_tests.twins import MEGABYTES


def test_schedule_warms_up_and_decays_the_same_in_both_frameworks(x64):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    ours = learning_rate_schedule(config, 12)
    theirs = torch_schedule(from_dict(TorchOptimizerConfig, to_dict(config)), 12)
    counts = jnp.arange(15)
    found = np.asarray(jax.vmap(ours)(counts))
    np.testing.assert_allclose(found[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-15)
    assert found[4] == 2.0 and found[8] == pytest.approx(2.0 * 0.55) and found[14] == 0.2
    assert (np.diff(found[4:13]) < 0).all()
    np.testing.assert_allclose(found, [theirs(int(c)) for c in counts], rtol=1e-15)
    assert found.dtype == np.float64


def test_no_warm_up_starts_at_the_full_rate():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=3.0, warmup_steps=0), 10)
    assert float(schedule(jnp.asarray(0))) == 3.0


def test_clip_keeps_short_gradients_and_shortens_long_ones():
    gradients = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    clip = clip_by_global_norm(1.0)
    short, _ = clip.update(gradients, clip.init(gradients))
    np.testing.assert_allclose(short["b"], [[0.8]], rtol=1e-6)
    same, _ = clip_by_global_norm(5.0).update(gradients, clip.init(gradients))
    np.testing.assert_array_equal(same["a"], gradients["a"])
    off, _ = clip_by_global_norm(0.0).update(gradients, clip.init(gradients))
    assert off is gradients
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    still, _ = clip.update(zeros, clip.init(zeros))
    assert np.isfinite(np.asarray(still["a"])).all()


def test_decay_leaves_norms_and_biases_alone():
    mask = decay_mask(abstract_params(MEGABYTES["paper"]))
    kept = {name for name, decays in mask.items() if not decays}
    assert kept and all(name.endswith((".scale", ".bias")) for name in kept)
    assert all(name.endswith((".kernel", ".embedding")) for name in mask.keys() - kept)


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


def test_throughput_counts_what_was_added_since_the_last_reading(monkeypatch):
    now = 100.0
    monkeypatch.setattr("bytelm_jax.metrics.time.perf_counter", lambda: now)
    rates = Throughput(flops_per_byte=10.0, devices=1)
    rates.add(500)
    now = 102.0
    assert rates.read() == {"bytes_per_second": 250.0, "seconds": 2.0}
    rates.add(100)
    now = 110.0
    rates.restart()
    rates.add(30)
    now = 111.0
    assert rates.read()["bytes_per_second"] == 30.0
