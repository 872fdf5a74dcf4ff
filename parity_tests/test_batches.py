"""What stands beside the ids of a batch, in both frameworks: sources of rows, and loss masks."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm import tolerances
from bytelm.config import SGDConfig, TrainConfig
from bytelm.data import open_corpus
from bytelm.trainable import EVERYTHING
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.models import define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import evaluate as jax_evaluate
from bytelm_jax.training import loss as jax_loss
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from bytelm_torch.training import evaluate as torch_evaluate
from bytelm_torch.training import loss as torch_loss
from bytelm_torch.training import parallel
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
        bind, optimizer, train, config.vocab.pad_id, mesh, EVERYTHING, jnp.dtype("float64"), names
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


def test_what_is_not_counted_has_no_gradient_and_both_agree(case):
    config, params, twin, ids, rest = case
    counted = np.random.default_rng(0).random(ids.shape) < 0.5
    counted[2] = False
    rest = {**rest, "counted": counted}
    train = TrainConfig(batch_size=ROWS, devices=1)
    ours = jax_step(config, params, ids, rest, train)
    others = [torch_step(config, twin, ids, rest, 2), torch_step(config, twin, ids, rest, 1)]
    plain = {"counted": counted}
    others += [jax_step(config, params, ids, plain, train), torch_step(config, twin, ids, plain, 1)]
    for other in others:
        for name, value in other.items():
            bound = tolerances.GRADIENTS if name == "grad_norm" else tolerances.LOGITS
            same = np.isclose(value, ours[name], bound["float64"], 0.0, equal_nan=True)
            assert same, (name, value, ours[name])

    pad_id, bind = config.vocab.pad_id, define_model(config)[0]
    mask = counted & (ids != pad_id)
    logits = jnp.asarray(np.asarray(bind(params)(ids)))
    nats, number = jax_loss.cross_entropy(logits, ids, pad_id, counted)
    assert int(number) == mask.sum() and float(nats / number) == pytest.approx(ours["loss"])
    slope = jax.grad(lambda x: jax_loss.cross_entropy(x, ids, pad_id, counted)[0])(logits)
    theirs = torch.from_numpy(np.array(logits)).requires_grad_()
    tensors = torch.from_numpy(ids), torch.from_numpy(counted)
    torch_loss.cross_entropy(theirs, tensors[0], pad_id, tensors[1])[0].backward()
    assert theirs.grad is not None
    for gradient in (np.asarray(slope), theirs.grad.numpy()):
        assert (gradient[~mask] == 0.0).all() and (gradient[mask] != 0.0).any(axis=-1).all()
    assert relative_error(theirs.grad.numpy(), np.asarray(slope)) <= tolerances.GRADIENTS["float64"]

    def gradients(counted):
        def loss(params):
            nats, number = jax_loss.cross_entropy(bind(params)(ids), ids, pad_id, counted)
            return nats / number

        return jax.jit(jax.grad(loss))(params)

    twin.zero_grad()
    nats, number = torch_loss.cross_entropy(twin(tensors[0]), tensors[0], pad_id, tensors[1])
    (nats / number).backward()
    own = to_torch(gradients(counted))
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            error = relative_error(parameter.grad.numpy(), np.asarray(own[name]))
            assert error <= tolerances.GRADIENTS["float64"], name


def test_evaluation_counts_completions_alone(case, tmp_path):
    config, params, twin, _, _ = case
    records = [{"p": f"{n} and one? ", "c": f"{n + 1}"} for n in range(9)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    corpus = open_corpus([path], prompt_field="p", completion_field="c")
    length = config.parity_length
    ours = jax_evaluate.evaluate(define_model(config)[0](params), corpus, length)
    theirs = torch_evaluate.evaluate(twin, corpus, length)
    assert ours.count == theirs.count == sum(len(record["c"]) for record in records)
    assert abs(ours.nats - theirs.nats) <= tolerances.LOGITS["float64"] * theirs.nats
    whole = jax_evaluate.evaluate(
        define_model(config)[0](params), "".join(r["p"] + r["c"] for r in records).encode(), length
    )
    assert whole.count == corpus.total_bytes and 0 < ours.nats < whole.nats
