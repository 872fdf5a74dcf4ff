"""Attention by torch's kernels: the written-out softmax, and exactly nothing of what is masked."""

import pytest
import torch

import bytelm_torch
from bytelm import tolerances
from bytelm_torch import from_pretrained, save_pretrained
from bytelm_torch.layers.attention import multi_query_attention
from bytelm_torch.layers.grouped_attention import causal_attention, grouped_attention
from bytelm_torch.train import main
from parity_tests.tiny_models import CONFIGS

SHAPES = {
    "grouped": (2, 33, 4, 2, 8, 8),
    "one head": (1, 300, 1, 1, 16, 16),
    "wider keys": (2, 40, 4, 4, 16, 8),
    "one position": (3, 1, 2, 1, 8, 8),
}
"""Name → rows, length, heads, groups, widths of keys and of values."""


def written_out(q, k, v, mask):
    """Softmax over all scores, in the dtype of its arguments."""
    grouped = q.unflatten(-2, (k.shape[-2], -1))
    scores = torch.einsum("...tgrk,...sgk->...grts", grouped, k) * v.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[..., None, None, :, :], -torch.inf).softmax(dim=-1)
    return torch.einsum("...grts,...sgk->...tgrk", weights, v).reshape(*q.shape[:-1], v.shape[-1])


def heads(shape, dtype):
    rows, length, heads, groups, wide, narrow = SHAPES[shape]
    random = torch.Generator().manual_seed(0)
    sizes = ((heads, wide), (groups, wide), (groups, narrow))
    q, k, v = (3 * torch.randn(rows, length, *s, generator=random, dtype=dtype) for s in sizes)
    return q, k, v


def error(ours, theirs):
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_formula(shape, dtype):
    given = q, k, v = heads(shape, getattr(torch, dtype))
    for x in given:
        x.requires_grad_()
    length = given[0].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    expected = written_out(q, k, v, mask)
    slopes = torch.autograd.grad(expected.square().sum(), given)
    for seen in (None, mask, mask.expand(len(given[0]), -1, -1)):
        found = grouped_attention(q, k, v, seen)
        assert found.dtype == expected.dtype
        assert error(found, expected) <= tolerances.LOGITS[dtype]
        for ours, theirs in zip(
            torch.autograd.grad(found.square().sum(), given), slopes, strict=True
        ):
            if theirs.norm():  # one position has no choice, so its scores have no gradient
                assert error(ours, theirs) <= tolerances.GRADIENTS[dtype]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, 16])
def test_a_changed_future_and_changed_neighbours_change_nothing(window, dtype):
    given = q, k, v = heads("grouped", getattr(torch, dtype))
    before = causal_attention(q, k, v, window)
    for at in (1, 17, 32):
        q, k, v = (torch.cat([x[:, :at], 50 * x[:, at:].flip(0) - 1], dim=1) for x in given)
        assert torch.equal(causal_attention(q, k, v, window)[:, :at], before[:, :at])
    q, k, v = (torch.cat([x[:1], -7 * x[1:]]) for x in given)
    assert torch.equal(causal_attention(q, k, v, window)[0], before[0])


def test_one_shared_head_without_positions_is_the_same_kernel():
    q, k, v = heads("one head", torch.float64)
    q = q.expand(-1, -1, 3, -1) * torch.arange(1, 4)[:, None]
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
    expected = written_out(q, k, v, mask)
    for seen in (None, mask):
        found = multi_query_attention(q, k[..., 0, :], v[..., 0, :], seen)
        assert error(found, expected) <= tolerances.LOGITS["float64"]


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_runs_under_autocast(name):
    """Also where segments start anew: caches are wider than what is written to them."""
    torch.manual_seed(0)
    for config in (CONFIGS[name], CONFIGS[name].with_resets("newline")):
        model = bytelm_torch.build_model(config).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = bytelm_torch.generate(model, [b"a\nb", b"c"], 5, stop_at_eos=False)
        assert [len(each) for each in found] == [5, 5]


def test_what_no_graph_holds_is_refused_by_name(tmp_path):
    config = CONFIGS["lfbyte"]
    save_pretrained(bytelm_torch.build_model(config), tmp_path / "export")
    with pytest.raises(ValueError, match=r"^compiled=True: top_k=2: the number of positions"):
        from_pretrained(tmp_path / "export", compiled=True)
    run = tmp_path / "run"
    assert main(["lfbyte_tiny", "--compile", "--run-dir", str(run), "--steps", "1"]) == 2
    assert not run.exists()
