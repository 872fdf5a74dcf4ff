"""Rows that each device treats alone: the same values and gradients, and no more work each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from bytelm import tolerances
from bytelm.config import DataConfig, LFByteConfig, Recipe, TrainConfig
from bytelm_jax.kernels.rows import on_each_device, split_rows
from bytelm_jax.models import define_model
from bytelm_jax.parity.report import relative_error
from bytelm_jax.tools.collectives import read_collectives
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps

MODEL = LFByteConfig(
    embed_dim=16, num_layers=1, num_experts=8, top_k=2, adapt_dim=16, rank=2,
    kernel_length=32, dropout=0.1,
)  # fmt: skip


def test_each_device_sees_its_own_rows_and_gradients_are_summed():
    mesh = meshes.make_mesh(8, 2)
    seen = []

    def scaled(factor, x):
        seen.append(x.shape)
        return factor * x**2

    def total(factor, x):
        with split_rows(mesh, meshes.ROWS):
            return jnp.sum(on_each_device(scaled, factor, x))

    x = jnp.arange(16.0)
    placed = jax.device_put(x, meshes.batch_sharding(mesh))
    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(jnp.asarray(3.0), placed)
    assert set(seen) == {(2,)}
    assert value == 3 * jnp.sum(x**2) and gradients[0] == jnp.sum(x**2)
    np.testing.assert_array_equal(gradients[1], 6 * x)


@pytest.mark.parametrize("cut", [0, 1, None])
def test_large_gradients_of_what_was_gathered_are_summed_within_groups_first(cut):
    """Over the 2 devices of a group, and the cut parts over 4 groups; others at once over 8."""
    mesh, table = meshes.make_mesh(8, 2), jnp.arange(8.0).reshape(4, 2)

    def total(table, x):
        with split_rows(mesh, meshes.ROWS, gathered=True, cut=lambda shape: cut):
            return jnp.sum(on_each_device(lambda shared, x: x @ shared["table"], table, x))

    x = jnp.arange(64.0).reshape(16, 4)
    placed = jax.device_put(x, meshes.batch_sharding(mesh))
    lies = NamedSharding(mesh, jax.P(*(None,) * (cut or 0), None if cut is None else meshes.FSDP))
    run = jax.jit(jax.grad(total), out_shardings=lies).lower({"table": table}, placed).compile()
    expected = jnp.broadcast_to(x.sum(0)[:, None], table.shape)
    np.testing.assert_array_equal(run({"table": table}, placed)["table"], expected)
    sums = {each.group: each.bytes for each in read_collectives(run.as_text() or "", 8)}
    assert sums == ({8: 8 * 4} if cut is None else {2: 8 * 4, 4: 4 * 4})


@pytest.mark.parametrize("rows", [7, 0])
def test_rows_that_cannot_be_split_evenly_stay_together(rows):
    mesh, seen = meshes.make_mesh(8), []
    with split_rows(mesh, meshes.ROWS):
        jax.eval_shape(lambda x: on_each_device(lambda _, x: [seen.append(len(x)), x][1], (), x),
                       jax.ShapeDtypeStruct((rows, 2), jnp.float32))  # fmt: skip
    assert seen == [rows]


def train(devices, fsdp):
    """Losses of three steps with sparse experts, the parameters after them, a device's work."""
    run = TrainConfig(devices=devices, fsdp=fsdp, batch_size=16)
    recipe = Recipe(name="x", model=MODEL, train=run, data=DataConfig(sequence_length=32))
    mesh, (bind, init) = meshes.make_mesh(devices, fsdp), define_model(recipe.model)
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    step = steps.make_train_step(bind, optimizer, run, MODEL.vocab.pad_id, mesh)
    state = steps.init_state(mesh, optimizer, lambda: init(0))
    ids = np.random.default_rng(0).integers(0, 256, (16, 32), np.int32)
    batch = meshes.put_batch(mesh, ids)
    compiled = step.lower(state, batch).compile()  # pyright: ignore[reportFunctionMemberAccess]
    losses = []
    for _ in range(3):
        state, report = compiled(state, batch)
        losses.append(float(report["loss"]))
    return np.asarray(losses), jax.device_get(state.params), compiled.cost_analysis()["flops"]


@pytest.mark.slow
def test_one_device_is_eight_of_which_each_does_an_eighth_of_the_work():
    losses, params, work = train(1, 1)
    other, their, part = train(8, 2)
    assert losses[2] < losses[0]
    assert relative_error(other, losses) <= tolerances.DEVICES_AFTER_5_STEPS
    for name, leaf in params.items():
        assert relative_error(their[name], leaf) <= tolerances.DEVICES_AFTER_5_STEPS, name
    # Before, each device sorted, transformed and multiplied the rows of all.
    assert abs(8 * part / work - 1) < 0.1
