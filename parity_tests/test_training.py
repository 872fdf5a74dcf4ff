"""Training: 200 optimizer steps in both frameworks, devices, step forms, a recorded loss list."""

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from bytelm import tolerances
from bytelm.config import (
    AdamWConfig,
    LionConfig,
    MuonConfig,
    QLearningAdamWConfig,
    QLearningConfig,
    QLearningSGDConfig,
    SGDConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from bytelm.schedules import learning_rate_schedule
from bytelm.trainable import EVERYTHING
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.models import define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from bytelm_jax.training.topology import Feeding
from bytelm_torch.models import build_model as build_torch_model
from bytelm_torch.optimizers.build import build_optimizer as build_torch_optimizer
from bytelm_torch.optimizers.build import clip_by_global_norm, set_rate
from bytelm_torch.optimizers.q_agent import q_learning_metrics as torch_q_learning_metrics
from bytelm_torch.optimizers.q_learning import EnhancedSGD
from bytelm_torch.optimizers.q_wrapper import QLearning
from bytelm_torch.training.loss import cross_entropy as torch_cross_entropy
from bytelm_torch.training.parallel import Group
from bytelm_torch.training.parallel import make_train_step as make_torch_step
from parity_tests.cases import quick
from parity_tests.twins import MEGABYTES, random_ids, random_params, twins

GOLDEN = Path(__file__).with_name("golden_losses.json")


def run_jax(config, optimizer, train, batches, params=None, parts=EVERYTHING, lora=None):
    """Losses and final state of a few steps on int32[S, B, T] batches."""
    mesh = meshes.make_mesh(train.devices, train.fsdp)
    bind, init = define_model(config, lora)
    transformation = build_optimizer(optimizer, train.steps, parts=parts)
    start = (lambda: init(train.seed)) if params is None else (lambda: params)
    state = steps.init_state(mesh, transformation, start)
    if train.average_decay:
        state = state._replace(average=dict.fromkeys(state.params.keys() - parts.frozen))
        state = state.begin_with(state.params)
    step = steps.make_train_step(bind, transformation, train, config.vocab.pad_id, mesh, parts)
    reports = []
    for ids in batches:
        state, report = step(state, meshes.put_batch(mesh, ids))
        reports.append({name: float(value) for name, value in report.items()})
    return reports, state


def ragged_batches(config, steps, rows, length):
    """int32[steps, rows, length]; the last ids of some rows are pads, so counts differ."""
    batches = np.stack([random_ids(config, rows, length, seed=s) for s in range(steps)])
    batches[:, ::3, length // 2 :] = config.vocab.pad_id
    return batches


STEERED = {"controller": QLearningConfig(interval=1), "weight_decay": 0.01}
OPTIMIZERS = {
    "adamw": AdamWConfig(learning_rate=3e-3, warmup_steps=20),
    "sgd": SGDConfig(learning_rate=1e-2, warmup_steps=20),
    "q_learning_adamw": QLearningAdamWConfig(learning_rate=3e-3, warmup_steps=20, **STEERED),
    "q_learning_sgd": QLearningSGDConfig(
        learning_rate=1e-2, warmup_steps=20, noise_scale=0.1, **STEERED
    ),
    "trust": QLearningAdamWConfig(
        learning_rate=3e-4,
        warmup_steps=20,
        controller=QLearningConfig(signal="trust", interval=5),
    ),
    "lion": LionConfig(learning_rate=1e-3, warmup_steps=20),
    "muon": MuonConfig(learning_rate=3e-3, adam_learning_rate=2e-3, warmup_steps=20),
}
PARITY = [
    ("paper", "adamw", 200, ()),
    ("in_action", "adamw", 200, pytest.mark.slow),
    ("paper", "sgd", 200, ()),
    ("paper", "q_learning_adamw", 200, pytest.mark.slow),
    ("paper", "q_learning_sgd", 200, pytest.mark.slow),
    ("paper", "trust", 200, pytest.mark.slow),
    ("paper", "lion", 200, pytest.mark.slow),
    ("paper", "muon", 200, ()),
    ("experts", "muon", 100, ()),
]
"""(model, optimizer, steps, marks) of each run; test_coverage.py asks for 200 steps of each
optimizer."""


@pytest.mark.parametrize(
    ("variant", "name", "count"),
    [pytest.param(*row, marks=marks) for *row, marks in PARITY],
)
def test_200_steps_end_at_the_same_parameters(variant, name, count, x64):
    """And an agent chooses the same actions at every step."""
    config, params, twin = twins(variant, "float64")
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    optimizer = OPTIMIZERS[name]
    train = TrainConfig(steps=count, batch_size=4, devices=1, compute_dtype="float32")
    batches = ragged_batches(config, count, 4, 11)
    # float64 all the way: cast_params would make the products float32.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "compute_dtype", lambda *_: jnp.dtype("float64"))
        reports, state = run_jax(config, optimizer, train, batches, params)
    try:
        agent_reports = run_torch(twin, optimizer, batches)
        theirs = {k: v.clone().numpy() for k, v in twin.state_dict().items()}
    finally:
        twin.load_state_dict(before)
    ours = to_torch(state.params)
    assert ours.keys() == theirs.keys()
    worst = max(relative_error(ours[key], theirs[key]) for key in ours)
    assert worst <= tolerances.AFTER_200_STEPS
    assert reports[-1]["loss"] < reports[0]["loss"]
    moved = relative_error(theirs["to_logits.weight"], before["to_logits.weight"].numpy())
    assert moved > 0.01
    assert len(agent_reports) == (count if optimizer.has_agent else 0)
    for report, metrics in zip(reports, agent_reports, strict=False):
        for what, value in metrics.items():
            assert report[what] == pytest.approx(value, rel=tolerances.AFTER_200_STEPS), what
    if agent_reports:
        actions = [(m["learning_rate_action"], m["momentum_action"]) for m in agent_reports]
        assert len(set(actions)) > (2 if name == "trust" else 10)


def run_torch(twin, optimizer, batches, parts=EVERYTHING, after_step=lambda: None):
    """Trains the twin in place; what the optimizer reported at every step."""
    stepper = build_torch_optimizer(optimizer, twin, parts=parts)
    schedule = learning_rate_schedule(optimizer, len(batches))
    agent_reports = []
    for count, ids in enumerate(batches):
        set_rate(stepper, schedule(count))
        tensor = torch.from_numpy(ids)
        nats, counted = torch_cross_entropy(twin(tensor), tensor, twin.config.vocab.pad_id)
        stepper.zero_grad()
        (nats / counted).backward()
        if isinstance(stepper, EnhancedSGD | QLearning):

            def value_fn(tensor=tensor):
                nats, counted = torch_cross_entropy(twin(tensor), tensor, twin.config.vocab.pad_id)
                return nats / counted

            stepper.step(loss=nats / counted, value_fn=value_fn)
            metrics = torch_q_learning_metrics(stepper)
            agent_reports.append({what: float(value) for what, value in metrics.items()})
        else:
            clip_by_global_norm(twin.parameters(), optimizer.max_grad_norm)
            stepper.step()
        after_step()
    return agent_reports


SMALL = replace(MEGABYTES["in_action"], init_std=0.05, dropout=0.1, global_layers=1, local_layers=1)
FIVE = ragged_batches(SMALL, 5, 16, 11)
# Plain SGD: it shows a gradient that is N times too large, which AdamW would hide.
PLAIN = SGDConfig(momentum=0.0, learning_rate=0.3, max_grad_norm=0.0)


def test_the_loss_can_be_asked_for_at_other_parameters():
    """An optimizer's `value_fn` has the rows, the micro-batches and the dropout of the step."""
    train = TrainConfig(steps=1, batch_size=16, devices=2, accumulation_steps=2)
    (bind, init), seen = define_model(SMALL), []

    def update(updates, state, params=None, **more):
        value, value_fn = more["value"], more["value_fn"]
        further = jax.tree.map(lambda p: p + 0.01, params)
        return updates, jnp.stack([value_fn(params) - value, value_fn(further) - value])

    for parallel in ("jit", "shard_map"):
        mesh = meshes.make_mesh(2)
        asks = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(2), update)
        state = steps.init_state(mesh, asks, lambda: init(0))
        pad_id = SMALL.vocab.pad_id
        step = steps.make_train_step(bind, asks, replace(train, parallel=parallel), pad_id, mesh)
        seen.append(step(state, meshes.put_batch(mesh, FIVE[0]))[0].opt_state)
    assert abs(seen[0] - seen[1]).max() < 1e-5 < abs(float(seen[0][1]))
    assert abs(float(seen[0][0])) < 1e-6


def test_so_can_the_loss_in_torch():
    model = build_torch_model(SMALL).train()
    found = []

    class Asks(torch.optim.SGD):
        def step(self, *, loss, value_fn):  # pyright: ignore[reportIncompatibleMethodOverride]
            found.append(float(value_fn() - loss))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.01
            found.append(float(value_fn() - loss))

    train = TrainConfig(steps=1, batch_size=16, accumulation_steps=2)
    group = Group(0, 1, torch.device("cpu"))
    optimizer = Asks(model.parameters(), lr=1.0)
    step = make_torch_step(model, optimizer, train, SMALL.vocab.pad_id, group)
    report = step(0, FIVE[0], 1.0, 0.0, False)
    assert abs(found[0]) < 1e-6 < abs(found[1]) and "objective" not in report


@pytest.fixture(scope="module")
def one_device():
    train = TrainConfig(steps=5, batch_size=16, devices=1)
    return run_jax(SMALL, PLAIN, train, FIVE)


FORMS = (
    {"devices": 8},
    {"devices": 8, "parallel": "shard_map"},
    {"devices": 8, "fsdp": 4},
    {"devices": 4, "fsdp": 2, "parallel": "shard_map", "accumulation_steps": 2},
    {"devices": 2, "parallel": "shard_map", "accumulation_steps": 4},
    {"devices": 1, "accumulation_steps": 4},
    {"devices": 1, "remat": True},
)


@pytest.mark.parametrize(
    "change",
    quick(FORMS, FORMS[1], *FORMS[2:4], FORMS[6]),
    ids=lambda change: " ".join(f"{k}={v}" for k, v in change.items()),
)
def test_devices_step_forms_accumulation_and_remat_change_nothing(change, one_device):
    expected, state = one_device
    train = TrainConfig(**({"steps": 5, "batch_size": 16} | change))
    reports, other = run_jax(SMALL, PLAIN, train, FIVE)
    for ours, theirs in zip(reports, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            error = abs(ours[name] - theirs[name]) / abs(theirs[name])
            assert error <= tolerances.DEVICES_AFTER_5_STEPS, (name, ours, theirs)
    for name, value in state.params.items():
        error = relative_error(np.asarray(other.params[name]), np.asarray(value))
        assert error <= tolerances.DEVICES_AFTER_5_STEPS, name


@pytest.mark.parametrize("form", ["jit", "shard_map"])
def test_rows_keep_their_dropout_wherever_the_wires_want_them(form, one_device, monkeypatch):
    """As over processes whose devices alternate, but in one process, which feeds them in order."""
    expected, _ = one_device
    blocks = (0, 4, 1, 5, 2, 6, 3, 7)
    monkeypatch.setattr(meshes, "_feeding", lambda mesh: Feeding(1, {0: 0}, blocks))
    placed = FIVE.reshape(5, 8, 2, 11)[:, blocks].reshape(FIVE.shape)
    train = TrainConfig(steps=5, batch_size=16, devices=8, parallel=form)
    reports, _ = run_jax(SMALL, PLAIN, train, placed)
    for ours, theirs in zip(reports, expected, strict=True):
        error = abs(ours["loss"] - theirs["loss"]) / theirs["loss"]
        assert error <= tolerances.DEVICES_AFTER_5_STEPS, (ours, theirs)


@pytest.mark.slow
def test_eight_devices_train_as_one_under_the_agent():
    """Its actions too: it is fed the mean loss of the whole batch."""
    steered = QLearningSGDConfig(learning_rate=0.1, controller=QLearningConfig(interval=1))
    one, state = run_jax(SMALL, steered, TrainConfig(steps=5, batch_size=16, devices=1), FIVE)
    train = TrainConfig(steps=5, batch_size=16, devices=8, parallel="shard_map")
    eight, other = run_jax(SMALL, steered, train, FIVE)
    assert [r["learning_rate_action"] for r in eight] == [r["learning_rate_action"] for r in one]
    for name, value in state.params.items():
        error = relative_error(np.asarray(other.params[name]), np.asarray(value))
        assert error <= tolerances.DEVICES_AFTER_5_STEPS, name


@pytest.mark.parametrize(
    "change",
    quick(
        ({"devices": 4, "fsdp": 4}, {"devices": 4, "fsdp": 2, "parallel": "shard_map"}),
        {"devices": 4, "fsdp": 2, "parallel": "shard_map"},
    ),
    ids=lambda change: " ".join(f"{k}={v}" for k, v in change.items()),
)
def test_muon_of_kernels_in_parts_is_muon_of_whole_kernels(change, x64):
    """Newton-Schulz runs on the global arrays in both forms of the step.

    In float64, since the first step of AdamW is the sign of the gradient, whatever its length.
    """
    muon = MuonConfig(learning_rate=1e-2, warmup_steps=0)
    ends = []
    layouts: tuple[dict[str, Any], ...] = ({"devices": 1}, change)
    for layout in layouts:
        train = TrainConfig(steps=2, batch_size=4, **layout)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "compute_dtype", lambda *_: jnp.dtype("float64"))
            params = random_params(SMALL, "float64")
            ends.append(run_jax(SMALL, muon, train, FIVE[:2, :4], params)[1])
    for name, value in ends[0].params.items():
        error = relative_error(np.asarray(ends[1].params[name]), np.asarray(value))
        assert error <= tolerances.AFTER_200_STEPS, name


def test_dropout_is_on_in_training_and_differs_between_steps_and_seeds(one_device):
    reports, _ = one_device
    repeated = np.repeat(FIVE[:1], 2, axis=0)
    still = replace(PLAIN, learning_rate=1e-12)
    first, _ = run_jax(SMALL, still, TrainConfig(steps=5, batch_size=16, devices=1), repeated)
    assert first[0]["loss"] == reports[0]["loss"]
    assert first[0]["loss"] != first[1]["loss"]
    other = TrainConfig(steps=5, batch_size=16, devices=1, seed=1)
    assert run_jax(SMALL, still, other, repeated)[0][0]["loss"] != first[0]["loss"]


def test_a_batch_that_does_not_divide_is_refused():
    mesh = meshes.make_mesh(8)
    with pytest.raises(ValueError, match="batch_size=12: must be a multiple of 8"):
        meshes.check_batch(mesh, TrainConfig(batch_size=12))
    with pytest.raises(ValueError, match="devices=9: there are 8"):
        meshes.make_mesh(9)
    with pytest.raises(ValueError, match="fsdp=3: must divide the number of devices, 8"):
        meshes.make_mesh(8, 3)


def golden_run():
    """20 losses of a tiny run whose bytes and seeds are written out here."""
    source = np.random.default_rng(7)
    words = [bytes(source.integers(97, 123, size)) for size in source.integers(2, 8, 40)]
    text = b" ".join(words[i] for i in source.integers(0, 40, 4000))
    ids = np.frombuffer(text[: 20 * 8 * 32], np.uint8).astype(np.int32).reshape(20, 8, 32)
    config = replace(MEGABYTES["paper"], init_std=0.02)
    train = TrainConfig(steps=20, batch_size=8, devices=1)
    reports, _ = run_jax(config, AdamWConfig(learning_rate=1e-2, warmup_steps=5), train, ids)
    return [report["loss"] for report in reports]


def test_golden_losses():
    recorded = json.loads(GOLDEN.read_text())
    for package, version in recorded["versions"].items():
        if importlib.metadata.version(package) != version:
            pytest.skip(f"recorded with {package} {version}")
    losses = np.array(golden_run())
    np.testing.assert_allclose(losses, recorded["losses"], rtol=tolerances.GOLDEN_LOSS)
    assert losses[-1] < losses[0] - 1


def test_configs_survive_json():
    for config in (*MEGABYTES.values(), PLAIN):
        assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


if __name__ == "__main__":  # python -m parity_tests.test_training records the list again
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
    }
    GOLDEN.write_text(json.dumps({"versions": versions, "losses": golden_run()}, indent=1) + "\n")
