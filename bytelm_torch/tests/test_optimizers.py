"""Every optimizer as torch's are: copied, saved, given new groups; Lion and Muon by hand."""

import copy
import pickle
from typing import Any

import pytest
import torch

from bytelm.config.q_learning import QLearningConfig
from bytelm_torch.optimizers.lion import Lion
from bytelm_torch.optimizers.muon import Muon, orthogonalize
from bytelm_torch.q_learning import EnhancedSGD, q_learning

EVERY_STEP = QLearningConfig(interval=1)


def network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))


def muon(model):
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2]}]
    groups += [{"params": [p for p in model.parameters() if p.ndim == 1], "use_muon": False}]
    return Muon(groups, lr=0.05)


def lion(model):
    return Lion(model.parameters(), lr=0.01)


def enhanced_sgd(model):
    return EnhancedSGD(model.parameters(), lr=0.01, noise_scale=0.1, controller=EVERY_STEP)


def steered_adamw(model):
    return q_learning(torch.optim.AdamW(model.parameters(), lr=0.01), EVERY_STEP, seed=3)


def steered_sgd(model):
    inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return q_learning(inner, EVERY_STEP, max_grad_norm=0.5)


def steered_muon(model):
    return q_learning(muon(model), EVERY_STEP)


MAKERS = [lion, muon, enhanced_sgd, steered_adamw, steered_sgd, steered_muon]


def train(model, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        loss = model(torch.eye(4)).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def through_state_dict(make):
    def copied(pair):
        model, optimizer = pair
        other = copy.deepcopy(model)
        restored = make(other)
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return other, restored

    return copied


def equal(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_bit_for_bit(make, how):
    model = network()
    optimizer = make(model)
    train(model, optimizer, 3)
    copied = {"deepcopy": copy.deepcopy, "pickle": through_pickle}
    other, copy_of_it = copied.get(how, through_state_dict(make))((model, optimizer))
    train(model, optimizer, 3)
    assert not equal(model, other)
    train(other, copy_of_it, 3)
    assert equal(model, other)
    agents = [getattr(each, "agent", None) for each in (optimizer, copy_of_it)]
    assert str(agents[0]) == str(agents[1])


@pytest.mark.parametrize("make", MAKERS)
def test_a_group_added_in_mid_training_is_trained_and_saved(make):
    model = network()
    late = model[2].requires_grad_(False)
    optimizer = make(torch.nn.Sequential(model[0]))
    train(model, optimizer, 3)
    before = late.weight.clone()
    late.requires_grad_(True)
    optimizer.add_param_group({"params": [late.weight], "lr": 0.001})
    assert [group["lr"] for group in optimizer.param_groups[-2:]] == [
        optimizer.param_groups[0]["lr"],
        0.001,
    ]
    first, last = optimizer.param_groups[0], optimizer.param_groups[-1]
    assert first.keys() - {"use_muon"} == last.keys() - {"use_muon"}
    train(model, optimizer, 3)
    assert not torch.equal(late.weight, before)
    assert optimizer.state[late.weight].keys() == optimizer.state[model[0].weight].keys()
    other, copy_of_it = copy.deepcopy((model, optimizer))
    restored = make(torch.nn.Sequential(other[0]))
    restored.add_param_group({"params": [other[2].weight]})
    restored.load_state_dict(copy_of_it.state_dict())
    train(model, optimizer, 3)
    train(other, restored, 3)
    assert equal(model, other)
    assert restored.param_groups[-1]["lr"] == 0.001


@pytest.mark.parametrize("make", MAKERS)
def test_a_group_that_cannot_work_is_not_added(make):
    model = network()
    optimizer = make(torch.nn.Sequential(model[0]))
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"^lr=-1.0: must be at least 0"):
        optimizer.add_param_group({"params": [model[2].weight], "lr": -1.0})
    assert len(optimizer.param_groups) == count
    train(model, optimizer, 1)


def test_the_agent_leaves_the_momentum_of_a_new_group_in_proportion():
    model = network()
    optimizer = steered_sgd(torch.nn.Sequential(model[0]))
    optimizer.add_param_group({"params": [model[2].weight], "momentum": 0.5})
    optimizer.add_param_group({"params": [model[2].bias], "momentum": 0.0})
    seen = []
    optimizer.inner.register_step_pre_hook(
        lambda inner, *_: seen.append([(g["lr"], g["momentum"]) for g in inner.param_groups])
    )
    train(model, optimizer, 20)
    for old, new, plain in seen:
        assert plain[1] == 0.0
        assert old[1] == new[1]
        assert old[0] / (1 - old[1]) * 0.1 == pytest.approx(plain[0])  # the length of a step
        assert new[0] / (1 - new[1]) * 0.5 == pytest.approx(plain[0])
    assert len({old[1] for old, *_ in seen}) > 1
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.5, 0.0]


@pytest.mark.parametrize("make", MAKERS)
def test_a_scheduler_and_a_gradient_scaler_work_with_a_copy_too(make):
    model = network()
    optimizer = make(model)
    train(model, optimizer, 2)
    other, copy_of_it = copy.deepcopy((model, optimizer))
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    rates = []
    for each, stepper in ((model, optimizer), (other, copy_of_it)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scheduler = one_cycle(stepper, max_lr=0.1, total_steps=9, cycle_momentum=False)
        for _ in range(3):
            stepper.zero_grad()
            loss = each(torch.eye(4)).square().sum()
            scaler.scale(loss).backward()
            scaler.step(stepper, **({"loss": loss} if hasattr(stepper, "agent") else {}))
            scaler.update()
            scheduler.step()
        rates.append([group["lr"] for group in stepper.param_groups])
    assert equal(model, other)
    assert rates[0] == rates[1] != [0.01] * len(rates[0])
    if hasattr(optimizer, "agent"):  # which would set the momentum that the scheduler had set
        with pytest.raises(ValueError, match="cycle_momentum"):
            one_cycle(optimizer, max_lr=0.1, total_steps=9)


def test_newton_schulz_keeps_the_singular_vectors_of_each_matrix():
    torch.manual_seed(0)
    stack = torch.randn(2, 7, 4, dtype=torch.float64)
    actual = orthogonalize(stack)
    for one, other in zip(stack, actual, strict=True):
        left, _, right = torch.linalg.svd(one, full_matrices=False)
        values = left.mT @ other @ right.mT
        spread = torch.diagonal(values)
        assert ((spread > 0.6) & (spread < 1.3)).all()
        assert torch.allclose(values, torch.diag(spread), atol=1e-12)
        assert torch.allclose(orthogonalize(one.mT), other.mT, atol=1e-12)
    assert torch.equal(orthogonalize(torch.zeros(3, 2)), torch.zeros(3, 2))


def test_every_group_keeps_its_share_of_a_rate_that_is_set():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [
        {"params": [w], "use_muon": False, "lr_scale": s}
        for w, s in zip(weights, (1.0, 0.5), strict=True)
    ]
    optimizer = Muon(groups, lr=1.0, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.25
    for weight in weights:
        weight.grad = torch.ones(2)
    optimizer.step()
    assert [w[0].item() for w in weights] == pytest.approx([0.75, 0.875])


def test_what_cannot_work_is_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(3,\) is not a matrix; put it in a group"):
        Muon([weight])
    with pytest.raises(ValueError, match=r"lr=-1.0: must be at least 0"):
        Lion([weight], lr=-1.0)
    with pytest.raises(ValueError, match=r"betas=\(0.9, 1.0\): must be in"):
        Lion([{"params": [weight], "betas": (0.9, 1.0)}])
    optimizer = Muon([torch.nn.Parameter(torch.ones(3, 3))])
    with pytest.raises(ValueError, match=r"shape \(3,\) is not a matrix; put it in a group"):
        optimizer.add_param_group({"params": [weight]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"beta=1.0: must be in"):
        Muon([weight], beta=1.0)
