"""What stands beside the ids of a batch, in both frameworks: the sources of rows."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm.config import SGDConfig, TrainConfig
from bytelm_jax.models import define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from bytelm_torch.training import parallel
from parity_tests import tolerances
from parity_tests.twins import random_ids, twins

NAMES = ("web", "code", "absent")
ROWS, LENGTH = 8, 11


@pytest.fixture
def case(x64):
    config, params, twin = twins("paper", "float64")
    ids = random_ids(config, ROWS, LENGTH, seed=1)
    ids[::3, LENGTH // 2 :] = config.vocab.pad_id
    sources = np.array([0, 1, 1, 0, 0, 0, 1, 0], np.int32)
    return config, params, twin, ids, {"sources": sources}


def jax_step(config, params, ids, rest, train):
    """The report of a step, and the gradients, which SGD with a rate of 1 shows."""
    mesh = meshes.make_mesh(train.devices)
    optimizer = build_optimizer(
        SGDConfig(learning_rate=1.0, warmup_steps=0, momentum=0.0, weight_decay=0.0), 10
    )
    bind, _ = define_model(config)
    names = NAMES if "sources" in rest else ()
    step = steps.make_train_step(
        bind, optimizer, train, config.vocab.pad_id, mesh, (), jnp.dtype("float64"), names
    )
    state = steps.init_state(mesh, optimizer, lambda: params)
    rows = {name: meshes.put_batch(mesh, each) for name, each in {"ids": ids, **rest}.items()}
    _, report = step(state, **rows)
    return {name: float(value) for name, value in report.items()}


def torch_step(config, twin, ids, rest, parts):
    train = TrainConfig(batch_size=ROWS, accumulation_steps=parts, compute_dtype="float32")
    group = parallel.Group(0, 1, torch.device("cpu"))
    nothing = torch.optim.SGD(twin.parameters(), lr=0.0)
    names = NAMES if "sources" in rest else ()
    step = parallel.make_train_step(twin, nothing, train, config.vocab.pad_id, group, names)
    report = step(0, ids, 0.0, 0.0, False, **rest)
    return {name: float(value) for name, value in report.items() if name != "stop"}


def test_losses_by_source_are_the_same_in_both(case):
    config, params, twin, ids, rest = case
    train = TrainConfig(batch_size=ROWS, devices=1)
    ours = jax_step(config, params, ids, rest, train)
    counts = [
        int((ids[rest["sources"] == index] != config.vocab.pad_id).sum()) for index in range(2)
    ]
    mean = (ours["loss/web"] * counts[0] + ours["loss/code"] * counts[1]) / sum(counts)
    assert abs(mean - ours["loss"]) <= tolerances.LOGITS["float64"] * mean
    assert np.isnan(ours["loss/absent"]) and ours["loss/web"] != ours["loss/code"]
    spread = replace(train, devices=4, parallel="shard_map", accumulation_steps=2)
    others = [jax_step(config, params, ids, rest, spread), torch_step(config, twin, ids, rest, 2)]
    without = torch_step(config, twin, ids, {}, 1)
    for other in [*others, without]:
        for name, value in other.items():
            same = np.isclose(value, ours[name], tolerances.LOGITS["float64"], 0.0, equal_nan=True)
            assert same, (name, value, ours[name])
