"""Layers cut over devices (`train.tensor`) are the layers of one device."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm import recipes, tolerances
from bytelm.config import (
    OPTIMIZER_CONFIGS,
    BlockConfig,
    BLTConfig,
    EntropyConfig,
    Recipe,
    SGDConfig,
    TrainConfig,
)
from bytelm_jax.cli import main as cli
from bytelm_jax.kernels.lookup import look_up
from bytelm_jax.kernels.partitioned import by_rows
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.parity.report import relative_error
from bytelm_jax.tools.collectives import read_collectives
from bytelm_jax.training import checkpoint
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from bytelm_jax.training.tensor import CUTS, tensor_axis
from parity_tests.cases import quick
from parity_tests.twins import MEGABYTES, random_ids, random_params

_SMALL: dict[str, Any] = {"global_layers": 1, "local_layers": 1, "global_heads": 6}
"""Heads that do not divide the width, 6 · 5 = 30 of 32."""

_BLT = BLTConfig(
    patcher="space", ngram_sizes=(3, 4), local_dim=32, local_window=16,
    encoder_heads=4, encoder_hidden_dim=48, decoder_layers=1, decoder_heads=4,
    decoder_hidden_dim=48, global_dim=64, global_layers=1, global_heads=4, global_hidden_dim=80,
)  # fmt: skip
MODELS: dict[str, Any] = {
    "paper": replace(MEGABYTES["paper"], **_SMALL),
    "in_action": replace(MEGABYTES["in_action"], **_SMALL),
    "plain": replace(MEGABYTES["paper"], **_SMALL | {"local_layers": 0}, patch_size=1),
    "blt": replace(_BLT, ngram_rows=302, global_kv_heads=2),
    "donor": replace(
        _BLT, global_kv_heads=2,
        global_block=BlockConfig(norm="after", qk_norm="projection", bias="all", final_norm=True),
    ),
    "bytropix": replace(
        _BLT, patcher="histogram", ngram_rows=301, feedforward="spline", entropy_attention=True,
        positions="sinusoidal", ngram_combine="mean",
    ),
    "entropy": EntropyConfig(dim=32, layers=1, heads=4, kv_heads=2, hidden_dim=48, window=8),
}  # fmt: skip
ONE_BY_ONE = SGDConfig(momentum=0.0, learning_rate=1.0, max_grad_norm=0.0, warmup_steps=0)


def compile_step(config, train, dtype="float64", rows=8, length=24):
    """The abstract state, the compiled step, and the mesh."""
    mesh = meshes.make_mesh(train.devices, train.fsdp, train.tensor)
    bind, init = define_model(config)
    optimizer = build_optimizer(ONE_BY_ONE, train.steps)
    state = steps.abstract_init(mesh, optimizer, jax.eval_shape(lambda: init(0)))
    step: Any = steps.make_train_step(
        bind, optimizer, train, config.vocab.pad_id, mesh, dtype=jnp.dtype(dtype)
    )
    like = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=meshes.batch_sharding(mesh))
    return state, step.lower(state, like).compile(), mesh


def step_of(config, ids, **layout):
    """The loss of a step, and every gradient, which SGD with a rate of 1 shows; in float64."""
    train = TrainConfig(steps=2, batch_size=len(ids), **layout)
    mesh = meshes.make_mesh(train.devices, train.fsdp, train.tensor)
    bind, _ = define_model(config)
    optimizer = build_optimizer(ONE_BY_ONE, 2)
    before = random_params(config, "float64")
    state = steps.TrainState(jnp.zeros((), jnp.int32), before, optimizer.init(before))
    step = steps.make_train_step(
        bind, optimizer, train, config.vocab.pad_id, mesh, dtype=jnp.dtype("float64")
    )
    known = {name: np.asarray(value) for name, value in before.items()}
    state, report = step(meshes.place(mesh, state), meshes.put_batch(mesh, ids))
    after = meshes.fetch(mesh, state.params)
    return float(report["loss"]), {name: known[name] - after[name] for name in known}


@pytest.mark.parametrize("name", quick(MODELS, "paper"))
def test_eight_devices_that_share_layers_compute_as_one(name, x64):
    """Loss and the gradient of every leaf, over 2 groups of 2 (fsdp) x 2 (tensor)."""
    config = MODELS[name]
    ids = random_ids(config, 8, 24)
    ids[:, ::5] = 32 + config.vocab.offset
    ids[::3, 16:] = config.vocab.pad_id
    loss, gradients = step_of(config, ids, devices=1)
    other, cut = step_of(config, ids, devices=8, fsdp=2, tensor=2)
    assert abs(other - loss) <= tolerances.LOGITS["float64"] * loss
    moved = [leaf for leaf, value in gradients.items() if np.any(value)]
    assert len(moved) > len(gradients) - 3  # γ and β of a guided layer begin at 0
    for leaf in moved:
        error = relative_error(cut[leaf], gradients[leaf])
        assert error <= tolerances.GRADIENTS["float64"], leaf


def tensor_collectives(config, count):
    """(kind, count) over the two devices of a mesh that has no other collectives, and the text."""
    train = TrainConfig(steps=2, batch_size=8, devices=2, tensor=2)
    _, compiled, _ = compile_step(replace(config, global_layers=count), train, "float32")
    text = compiled.as_text()
    return {each.kind: each.count for each in read_collectives(text, 2) if each.group == 2}, text


def test_a_layer_needs_one_sum_in_each_half_and_direction():
    """As Megatron's cut promises; and nothing as wide as all hidden features or heads is there."""
    config = replace(MODELS["plain"], global_dim=44, local_dim=44, global_heads=4)
    (one, _), (three, text) = (tensor_collectives(config, count) for count in (1, 3))
    assert one.keys() == three.keys() == {"all-reduce"}
    assert three["all-reduce"] - one["all-reduce"] == 2 * 4
    shapes = [match.split(",") for match in re.findall(r"f32\[([\d,]+)\]", text)]
    wide = [shape for shape in shapes if "176" in shape]  # 4 · 44
    halves = [shape for shape in shapes if "88" in shape]
    assert halves and not wide


def test_blt_gathers_nothing_over_the_devices_of_a_layer():
    counts, text = tensor_collectives(MODELS["blt"], 1)
    assert counts.keys() == {"all-reduce"}
    assert "[604,32]" not in text and "[302,32]" in text  # half of the n-gram tables


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_masked_look_up_is_a_look_up(dtype):
    """Bit for bit, ids outside the table included; its gradient is summed over the devices."""
    mesh = meshes.make_mesh(8, 2, 2)
    source = np.random.default_rng(0)
    table = jnp.asarray(source.normal(size=(10, 3)), dtype)
    weights = jnp.asarray(source.normal(size=(8, 5, 3)), dtype)
    ids = jnp.asarray(source.integers(0, 10, (8, 5)), jnp.int32)
    strange = ids.at[0, :3].set(jnp.asarray([-1, 10, -11]))

    def look_up_twice(table, ids, strange):
        def total(table):
            return (by_rows(look_up, table, ids, jnp.nan) * weights).sum()

        return by_rows(look_up, table, strange, jnp.nan), jax.grad(total)(table)

    expected, gradient = jax.jit(look_up_twice)(table, ids, strange)
    assert np.isnan(np.asarray(expected, "f4"))[0, 1:3].all()
    with meshes.layers_on(mesh):
        lowered = jax.jit(lambda *given: look_up_twice(*given)).lower(table, ids, strange)
    assert "all_reduce" in lowered.as_text()
    found, summed = lowered.compile()(table, ids, strange)
    np.testing.assert_array_equal(np.asarray(found, "f4"), np.asarray(expected, "f4"))
    if dtype == "float32":  # in 16 bits each device rounds its part
        error = relative_error(np.asarray(summed), np.asarray(gradient))
        assert error <= tolerances.GRADIENTS[dtype]


def test_every_leaf_of_every_family_stands_in_the_table():
    """And the table has no row that no family needs."""
    seen = set()
    names = [n for n in recipes.names() if n.endswith("_tiny") and not n.startswith("lfbyte")]
    for config in [*(recipes.get(n).model for n in names), *MODELS.values()]:
        for name, leaf in abstract_params(config).items():
            axis = tensor_axis(name, leaf.shape, 2)
            assert axis is None or leaf.shape[axis] % 2 == 0
            module, _, kind = name.rpartition(".")
            last = module.rpartition(".")[2]
            seen.add(("" if last.endswith("norm") else last, kind))
    assert seen == {(cut.module, cut.leaf) for cut in CUTS}
    with pytest.raises(KeyError, match=r"layers.0.taps: the table of cuts does not know it"):
        tensor_axis("layers.0.taps", (4, 4), 2)


@pytest.mark.parametrize("name", [name for name in OPTIMIZER_CONFIGS])
def test_the_state_of_an_optimizer_is_cut_like_its_parameter(name):
    mesh = meshes.make_mesh(8, 2, 2)
    _, init = define_model(MODELS["bytropix"])
    optimizer = build_optimizer(OPTIMIZER_CONFIGS[name](), 10)
    state = steps.abstract_init(mesh, optimizer, jax.eval_shape(lambda: init(0)))
    params: Any = state.params
    cut = {name for name, leaf in params.items() if "tensor" in str(leaf.sharding.spec)}
    assert len(cut) < len(params)
    assert {n.rpartition(".layers.0.")[2] for n in cut} >= {
        "attention.to_q.kernel",
        "attention.beta",
    }
    found = 0
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if keys and keys[-1] in state.params and leaf.shape == state.params[keys[-1]].shape:
            assert leaf.sharding == state.params[keys[-1]].sharding, path
            found += keys[-1] in cut
    assert found >= len(cut) or name == "sgd"


@pytest.mark.parametrize("sizes", [(2, 1), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_a_checkpoint_opens_on_another_tensor_size(sizes, tmp_path):
    config, states = MODELS["plain"], []
    _, init = define_model(config)
    optimizer = build_optimizer(OPTIMIZER_CONFIGS["adamw"](), 10)
    for tensor in sizes:
        mesh = meshes.make_mesh(8, 2, tensor)
        states.append(steps.abstract_init(mesh, optimizer, jax.eval_shape(lambda: init(0))))
    made = steps.compile_init(optimizer, lambda: init(0), states[0])()
    moments = jax.tree.map(lambda x: x + 1, made.opt_state)
    run = tmp_path / "run"
    run.mkdir()
    recipe = Recipe(name="x", model=config, train=TrainConfig(tensor=sizes[0]))
    with checkpoint.open_checkpoints(run, recipe.train) as manager:
        checkpoint.save(manager, 3, made.params, moments, recipe, "data", None)
        checkpoint.finish(manager)
    read = checkpoint.recover(run, states[1].params, states[1].opt_state)
    assert read is not None and read.step == 3
    pairs = (
        (made.params, read.params, states[1].params),
        (moments, read.opt_state, states[1].opt_state),
    )
    for ours, theirs, template in pairs:
        for a, b, like in zip(*map(jax.tree.leaves, (ours, theirs, template)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            assert b.sharding == like.sharding


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["lfbyte_tiny", "--tensor", "2"], "train.tensor=2: layers of lfbyte are not cut; use 1"),
        (["megabyte_tiny", "--tensor", "3"], "train.tensor=3: must divide model.global_heads=4"),
        (["blt_tiny", "--patcher", "space", "--tensor", "8"], "must divide model.encoder_heads=4"),
        (
            ["megabyte_tiny", "--tensor", "2", "--parallel", "shard_map"],
            "tensor=2: parallel=shard_map cuts no layers; use parallel=jit",
        ),
        (["megabyte_tiny", "--tensor", "0"], "tensor=0: must be at least 1"),
        (
            ["megabyte_tiny", "--tensor", "4", "--devices", "2"],
            "tensor=4: must divide the number of devices, 2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_before_anything_is_written(options, says, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert cli.main(["train", *options, "--run-dir", str(run_dir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not run_dir.exists()
