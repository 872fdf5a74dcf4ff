"""Lion and Muon as torch optimizers: one step by hand, what they save, what they refuse."""

import copy
import doctest
import pickle

import pytest
import torch

import bytelm_torch.optimizers.lion
from bytelm_torch.optimizers.lion import Lion
from bytelm_torch.optimizers.muon import Muon, orthogonalize


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))


def muon(model):
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2]}]
    groups += [{"params": [p for p in model.parameters() if p.ndim == 1], "use_muon": False}]
    return Muon(groups, lr=0.05)


def lion(model):
    return Lion(model.parameters(), lr=0.01)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.eye(4)).square().sum().backward()
        optimizer.step()


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


@pytest.mark.parametrize("make", [lion, muon])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_bit_for_bit(make, how):
    model = network()
    optimizer = make(model)
    train(model, optimizer, 3)
    copied = {"deepcopy": copy.deepcopy, "pickle": through_pickle}
    other, copy_of_it = copied.get(how, through_state_dict(make))((model, optimizer))
    train(model, optimizer, 3)
    train(other, copy_of_it, 3)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(bytelm_torch.optimizers.lion).failed == 0


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
    with pytest.raises(ValueError, match=r"beta=1.0: must be in"):
        Muon([weight], beta=1.0)
