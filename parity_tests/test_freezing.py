"""Frozen and slowed parameters: the same in both packages, for every optimizer, on any mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm import tolerances
from bytelm.config import AdamWConfig, DataConfig, Recipe, TrainConfig
from bytelm.trainable import Trainable, trainable
from bytelm_jax.cli import main as cli
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.models import abstract_params
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.parity.report import relative_error
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tools import dry_run
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from bytelm_torch.models import parameter_paths
from bytelm_torch.training import loop as torch_loop
from parity_tests.cases import quick
from parity_tests.test_training import OPTIMIZERS, SMALL, ragged_batches, run_jax, run_torch
from parity_tests.twins import random_params, twins

FREEZE = ("global_*", "*.bias")
SCALES = ("local_*=0.25", "local_*norm*=1", "to_logits.weight=3")


def parts_of(config, freeze=FREEZE, scales=SCALES, **rest):
    train = TrainConfig(freeze=freeze, learning_rate_scale=scales)
    recipe = Recipe(name="parts", model=config, train=train, **rest)
    return trainable(recipe, abstract_params(config))


@pytest.mark.parametrize("name", quick(OPTIMIZERS, "q_learning_sgd", "muon"))
def test_both_packages_freeze_and_scale_alike(name, x64):
    config, params, _ = twins("paper", "float64")
    twin = make_twin(config, params)
    parts, optimizer = parts_of(config), OPTIMIZERS[name]
    assert set(parameter_paths(twin).values()) == abstract_params(config).keys()
    assert any(".norm" in name for name in params) and set(parts.scales.values()) == {0.25, 3}
    batches = ragged_batches(config, 12, 4, 11)
    train = TrainConfig(steps=12, batch_size=4, devices=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "compute_dtype", lambda *_: jnp.dtype("float64"))
        _, state = run_jax(config, optimizer, train, batches, params, parts)
    run_torch(twin, optimizer, batches, parts)
    ours, before = to_torch(state.params), to_torch(params)
    paths = parameter_paths(twin)
    for key, theirs in twin.state_dict().items():
        frozen = paths[key] in parts.frozen
        assert (twin.get_parameter(key).grad is None) == frozen, key
        assert (ours[key].tobytes() == before[key].tobytes()) == frozen, key
        assert relative_error(ours[key], theirs.numpy()) <= tolerances.AFTER_200_STEPS, key


@pytest.mark.parametrize("name", quick(OPTIMIZERS, "q_learning_sgd", "muon"))
def test_a_scale_multiplies_the_finished_update(name):
    """Decay and agent included; what is not scaled moves as without the scale."""
    params = {"to_q.kernel": jnp.ones((2, 3)), "norm.scale": jnp.ones(3)}
    gradients = jax.tree.map(lambda x: 0.5 * x, params)
    ends = []
    for scales in ({}, {"to_q.kernel": 0.125}):
        optimizer = build_optimizer(OPTIMIZERS[name], 9, parts=Trainable(scales=scales))
        state, moves = optimizer.init(params), params
        for _ in range(3):
            loss = {"value": jnp.ones(()), "value_fn": lambda params: params["norm.scale"].mean()}
            moves, state = optimizer.update(gradients, state, params, **loss)
        ends.append(moves)
    np.testing.assert_array_equal(ends[1]["to_q.kernel"], 0.125 * ends[0]["to_q.kernel"])
    np.testing.assert_array_equal(ends[1]["norm.scale"], ends[0]["norm.scale"])


LAYOUTS = [{"devices": 1}, {"devices": 8, "fsdp": 4}]


@pytest.mark.parametrize("change", quick(LAYOUTS, LAYOUTS[1]), ids=str)
def test_100_steps_leave_what_is_frozen_as_it_was(change):
    """Bit for bit, and the state has the moments of the rest and nothing else."""
    optimizer = AdamWConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5)
    parts, params = parts_of(SMALL, ("global_*",), ()), random_params(SMALL, "float32")
    train = TrainConfig(steps=100, batch_size=8, **change)
    batches = np.tile(ragged_batches(SMALL, 5, 8, 11), (20, 1, 1))
    before = {name: np.asarray(value) for name, value in params.items()}
    _, state = run_jax(SMALL, optimizer, train, batches, params, parts)
    for name, value in state.params.items():
        same = np.asarray(value).tobytes() == before[name].tobytes()
        assert same == (name in parts.frozen), name
    moving = sum(v.nbytes for name, v in before.items() if name not in parts.frozen)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    assert held == 2 * moving + 2 * 4  # two counters
    recipe = Recipe(
        name="x", model=SMALL, optimizer=optimizer, data=DataConfig(sequence_length=16),
        train=replace(train, freeze=("global_*",)),
    )  # fmt: skip
    mesh = meshes.make_mesh(train.devices, train.fsdp)
    memory = dry_run.estimate_memory(recipe, mesh, dry_run.abstract_state(recipe, mesh))
    on_one = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state.opt_state)]
    assert memory.optimizer_state == sum(on_one) < 2 * memory.parameters
    assert memory.gradients == (memory.optimizer_state - 2 * 4) // 2


OPTIONS = [
    "--patch-size", "4", "--global-dim", "8", "--local-dim", "16", "--max-length", "16",
    "--global-layers", "1", "--global-heads", "2", "--local-layers", "1", "--local-heads", "2",
    "--sequence-length", "16", "--batch-size", "8", "--steps", "2", "--data", "text",
]  # fmt: skip


SCALED = ["--learning-rate-scale", "to_logits.*=0.5"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"some text " * 400)


def test_what_cannot_be_frozen_or_scaled_is_refused(text, tmp_path, capsys):
    for options, says in {
        ("--freeze", "globl_*"): "train.freeze=globl_*: matches no parameter; near names: global_",
        ("--freeze", "*"): "train.freeze=*: leaves nothing to train",
        ("--learning-rate-scale", "global_*"): "write PATTERN=NUMBER",
        ("--learning-rate-scale", "global_*=0"): "or freeze those parameters",
        ("--freeze", "global_*", *SCALED, "global_*=2"): "all that it matches is frozen",
        (*SCALED, "*=2"): "to_logits.*: later entries match all that it matches",
        ("--learning-rate-scale", "*=1e9"): "*=1e+09: weight_decay=0.1: times learning_rate",
    }.items():
        assert cli.main(["train", "megabyte_tiny", *OPTIONS, *options]) == 2, options
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (options, error)
    assert [each.name for each in tmp_path.iterdir()] == ["text"]
    with pytest.raises(ValueError, match=r"freeze=none: matches no parameter"):
        recipe = Recipe(name="x", model=SMALL, train=TrainConfig(freeze=("none",)))
        torch_loop.train(recipe, tmp_path / "torch")
    assert not (tmp_path / "torch").exists()


@pytest.mark.slow
def test_the_command_freezes_and_says_what_it_costs(text, capsys):
    frozen = ["train", "megabyte_tiny", *OPTIONS, "--freeze", "global_*", "*.norm.*"]
    assert cli.main([*frozen, *SCALED, "--dry-run", "--devices", "8", "--fsdp", "2"]) == 0
    assert "parameters frozen: of the others, gradients take" in capsys.readouterr().out
    assert cli.main([*frozen, *SCALED]) == 0
    assert "of them frozen, on" in capsys.readouterr().err
    assert cli.main([*frozen, "--steps", "3"]) == 2
    assert "train.learning_rate_scale=[]: " in capsys.readouterr().err
