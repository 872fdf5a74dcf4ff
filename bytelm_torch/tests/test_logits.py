"""Logits are not rounded, whatever the dtype of the weights."""

import pytest
import torch

from bytelm import tolerances
from bytelm_torch.layers.logits import LogitsLinear


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_16_bits_the_products_are_those_of_float32(dtype, bias):
    torch.manual_seed(0)
    layer = LogitsLinear(6, 5, bias=bias).to(dtype)
    x = torch.randn(2, 8, 6).to(dtype)
    exact = torch.nn.Linear(6, 5, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    actual, expected = layer(x), exact(x.double())
    assert actual.dtype == torch.float32
    assert relative(actual, expected) <= tolerances.LOGITS["float32"]
    weight = torch.randn(2, 8, 5)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, ours in layer.named_parameters():
        theirs = exact.get_parameter(name).grad
        assert ours.grad is not None and theirs is not None and ours.grad.dtype == dtype
        assert relative(ours.grad, theirs) <= tolerances.BF16_LINEAR


def test_under_autocast_and_in_wide_dtypes_it_is_the_plain_linear():
    torch.manual_seed(0)
    layer, plain = LogitsLinear(6, 5), torch.nn.Linear(6, 5)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).dtype == torch.bfloat16
        actual = layer(x)
    assert torch.equal(actual, plain(x))
    assert torch.equal(layer.double()(x.double()), plain.double()(x.double()))
