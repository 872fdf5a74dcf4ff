"""`EnhancedSGD` as a torch optimizer: what it accepts, saves, refuses, and one step by hand."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from bytelm_torch.optimizers import q_learning, threefry
from bytelm_torch.optimizers.q_agent import QLearningConfig, q_learning_metrics
from bytelm_torch.optimizers.q_learning import EnhancedSGD, _layout
from bytelm_torch.optimizers.q_wrapper import QLearning

EVERY_STEP = QLearningConfig(interval=1)
FROZEN = QLearningConfig(interval=10**6, epsilon=0.0, epsilon_floor=0.0)  # the agent never acts


def model(dtype=torch.float64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(dtype)


def loss_of(network):
    parameter = next(network.parameters())
    inputs = torch.linspace(-1, 1, 15, dtype=parameter.dtype).reshape(5, 3)
    return (network(inputs) - inputs[:, :2]).square().mean()


def train(network, optimizer, steps):
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(network)
        loss.backward()
        optimizer.step(loss=loss)
    return loss.detach()


def equal(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_closure_and_loss_are_the_same_and_one_of_them_is_needed():
    one, other = model(), model()
    ours = EnhancedSGD(one.parameters(), lr=0.1, controller=EVERY_STEP)
    theirs = EnhancedSGD(other.parameters(), lr=0.1, controller=EVERY_STEP)

    def closure():
        theirs.zero_grad()
        loss = loss_of(other)
        loss.backward()
        return loss

    for _ in range(5):
        returned = theirs.step(closure)
        assert torch.equal(returned, train(one, ours, 1))
    assert equal(one, other)
    with pytest.raises(ValueError, match="loss=None: the agent needs the mean loss"):
        ours.step()
    with pytest.raises(ValueError, match="loss: has shape"):
        ours.step(loss=torch.ones(3))


def test_it_learns_from_a_closure_with_plain_parameters():
    network = model(torch.float32)
    optimizer = EnhancedSGD(network.parameters(), lr=0.1, controller=EVERY_STEP)
    before = float(loss_of(network).detach())
    assert float(train(network, optimizer, 80)) < before / 2
    metrics = q_learning_metrics(optimizer)
    assert int(metrics["decisions"]) == 79
    assert all(torch.isfinite(value) for value in metrics.values())


def test_patch_size_warns_once():
    q_learning._warn_of_patch_size.cache_clear()
    with pytest.warns(UserWarning, match="patch_size has no effect") as caught:
        for _ in range(3):
            EnhancedSGD(model().parameters(), lr=1e-3, entropy_threshold=0.3, patch_size=6)
    assert len(caught) == 1


def test_with_an_agent_at_rest_it_is_plain_sgd_with_momentum():
    one, other = model(), model()
    ours = EnhancedSGD(
        one.parameters(),
        lr=0.1,
        weight_decay=0.0,
        max_grad_norm=0.0,
        centralize=False,
        controller=FROZEN,
    )
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        train(one, ours, 1)
        plain.zero_grad()
        loss_of(other).backward()
        plain.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_like_the_original(copied):
    network = model()
    optimizer = EnhancedSGD(
        network.named_parameters(), lr=0.1, noise_scale=0.1, controller=EVERY_STEP
    )
    train(network, optimizer, 7)
    other, copy_of_optimizer = copied((network, optimizer))
    train(network, optimizer, 7)
    train(other, copy_of_optimizer, 7)
    assert equal(network, other)


def test_a_state_dict_keeps_float32_momenta_of_bfloat16_weights():
    network = model(torch.bfloat16)
    optimizer = EnhancedSGD(network.parameters(), lr=0.1, controller=EVERY_STEP)
    train(network, optimizer, 7)
    other = copy.deepcopy(network)
    restored = EnhancedSGD(other.parameters(), lr=0.1)
    restored.load_state_dict(optimizer.state_dict())
    train(network, optimizer, 7)
    train(other, restored, 7)
    assert equal(network, other)
    momenta = [memory["momentum_buffer"] for memory in restored.state.values()]
    assert {momentum.dtype for momentum in momenta} == {torch.float32}


def test_a_saved_state_is_not_touched_by_later_steps():
    network = model()
    optimizer = EnhancedSGD(network.parameters(), lr=0.1, controller=EVERY_STEP)
    train(network, optimizer, 40)
    saved = optimizer.state_dict()["q_learning"]["agent"]
    table = saved["q_learning_rate"].clone()
    train(network, optimizer, 20)
    assert torch.equal(saved["q_learning_rate"], table)
    assert not torch.equal(optimizer.agent.q_learning_rate, table)


def test_a_state_dict_of_another_optimizer_is_refused():
    network = model()
    plain = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="state_dict: has no q_learning"):
        EnhancedSGD(network.parameters()).load_state_dict(plain.state_dict())


def test_a_scheduler_sets_the_base_that_the_agent_scales():
    network = model()
    optimizer = EnhancedSGD(network.parameters(), lr=0.1, controller=EVERY_STEP)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(5):
        train(network, optimizer, 1)
        metrics = q_learning_metrics(optimizer)
        base = float(metrics["learning_rate"] / metrics["learning_rate_scale"])
        assert base == pytest.approx(0.1 * 0.5**step)
        scheduler.step()


def test_groups_have_rates_and_decays_of_their_own():
    network = model()
    first, last = network[0], network[2]
    groups = [
        {"params": [first.weight], "lr": 0.0},
        {"params": [last.weight], "lr": 0.2, "weight_decay": 0.5},
    ]
    optimizer = EnhancedSGD(groups, lr=9.0, controller=FROZEN)
    before = first.weight.clone(), last.weight.clone()
    loss_of(network).backward()
    for weight in (first.weight, last.weight):
        weight.grad.zero_()
    optimizer.step(loss=1.0)
    assert torch.equal(first.weight, before[0])
    torch.testing.assert_close(last.weight, before[1] * (1 - 0.2 * 0.5))


def test_parameters_without_a_gradient_are_left_out():
    network = model()
    network[2].requires_grad_(False)
    frozen = network[2].weight.clone()
    optimizer = EnhancedSGD(network.parameters(), lr=0.1, noise_scale=0.1, controller=EVERY_STEP)
    train(network, optimizer, 3)
    assert torch.equal(network[2].weight, frozen)
    assert len(optimizer.state) == 4
    optimizer.zero_grad()
    optimizer.step(loss=1.0)
    assert optimizer.agent.count == 3


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(broken):
    network = model()
    optimizer = EnhancedSGD(network.parameters(), lr=0.1, controller=EVERY_STEP)
    train(network, optimizer, 3)
    before = copy.deepcopy(network)
    momenta = [m["momentum_buffer"].clone() for m in optimizer.state.values()]
    scale = float(q_learning_metrics(optimizer)["learning_rate_scale"])
    loss = loss_of(network)
    optimizer.zero_grad()
    loss.backward()
    if broken == "gradient":
        network[0].weight.grad[1, 1] = math.inf
    optimizer.step(loss=math.nan if broken == "loss" else loss)
    assert equal(network, before)
    for momentum, memory in zip(momenta, optimizer.state.values(), strict=True):
        assert torch.equal(momentum, memory["momentum_buffer"])
    metrics = q_learning_metrics(optimizer)
    assert int(metrics["skipped_steps"]) == 1
    assert float(metrics["reward"]) == -1.0
    assert float(metrics["learning_rate_scale"]) == pytest.approx(scale / 2)


def test_noise_drawn_in_pieces_is_the_same(monkeypatch):
    whole = threefry.normals((1, 2), (7, 300), torch.float32)
    monkeypatch.setattr(threefry, "_CHUNK", 1000)
    assert torch.equal(threefry.normals((1, 2), (7, 300), torch.float32), whole)


def parameter(*shape, path=None):
    weight = nn.Parameter(torch.zeros(shape))
    if path is not None:
        vars(weight)["bytelm_path"] = path
    return weight


@pytest.mark.parametrize(
    ("weight", "name", "expected"),
    [
        (parameter(4, 3), "fc.weight", ("fc.kernel", (1,), True)),
        (parameter(4, 3, 2, 2), "conv.weight", ("conv.kernel", (1, 2, 3), True)),
        (parameter(4), "norm.weight", ("norm.scale", (), False)),
        (parameter(4), "fc.bias", ("fc.bias", (), False)),
        (parameter(4, 3), "12", ("12", (1,), True)),
        (parameter(4), "3", ("3", (), False)),
        (parameter(4, 3), "mixer.taps", ("mixer.taps", (), True)),
        (parameter(4, 3, path="a.b.kernel"), "x.weight", ("a.b.kernel", (1,), True)),
        (parameter(2, 4, 3, path="a.kernel"), "0", ("a.kernel", (2,), True)),
        (parameter(2, 3, 4, path="a.kernels"), "a.kernels", ("a.kernels", (1,), True)),
        (parameter(9, 3, path="e.embedding"), "e.weight", ("e.embedding", (), True)),
        (parameter(2, 4, path="a.bias"), "a.bias", ("a.bias", (), False)),
    ],
)
def test_layout(weight, name, expected):
    assert _layout(weight, name) == expected


FINITE = "must be a finite value, at most 3.402823e+38"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "lr=-0.1: must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be at least 0"),
        ({"momentum": 0.2}, "momentum=0.2: must be in [0.5, 0.995]"),
        ({"max_grad_norm": math.nan}, f"max_grad_norm=nan: {FINITE}"),
        ({"noise_scale": -0.1}, "noise_scale=-0.1: must be at least 0"),
        ({"noise_scale": math.inf}, f"noise_scale=inf: {FINITE}"),
        ({"lr": math.inf}, f"lr=inf: {FINITE}"),
        ({"weight_decay": 1e30}, "weight_decay=1e+30: times learning_rate=0.001 it must be at"),
        ({"seed": 2**32}, "seed=4294967296: choose one from 0 to 4294967295"),
        ({"seed": 2**63}, "seed=9223372036854775808: choose one from 0 to 4294967295"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError) as error:
        EnhancedSGD(model().parameters(), **arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 1e39}, f"lr=1e+39: {FINITE}"),
        ({"weight_decay": 1e30}, "weight_decay=1e+30: times learning_rate=0.001 it must be at"),
    ],
)
def test_bad_numbers_of_a_wrapped_optimizer_are_named(arguments, message):
    inner = torch.optim.AdamW(model().parameters(), **arguments)
    with pytest.raises(ValueError) as error:
        QLearning(inner)
    assert str(error.value).startswith(message)
    with pytest.raises(ValueError, match="seed=-1: choose one from 0 to 4294967295"):
        QLearning(torch.optim.AdamW(model().parameters()), seed=-1)
