"""LFByte's layers in torch, and the original layers of lfm-torch 0.0.2 against both packages."""

from typing import Any

import jax
import numpy as np
import pytest
import torch

from bytelm import tolerances
from bytelm.config import LFByteConfig, model_from_dict, to_dict
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.report import relative_error
from bytelm_torch.layers.adaptive import running_mean
from bytelm_torch.layers.experts import AdaptiveExperts
from bytelm_torch.layers.long_convolution import LongConvolution, long_convolution
from bytelm_torch.models import build_model as build_torch


@pytest.mark.parametrize("chunk", [16, 64])
def test_torch_convolution_equals_the_plain_sum(chunk):
    source = np.random.default_rng(0)
    for length in (
        1,
        2,
        3,
        15,
        16,
        17,
        63,
        64,
        65,
        100,
        127,
        128,
        129,
        255,
        1000,
        4097,
        8191,
        8192,
    ):
        for count in {1, 2, 17, 65, 66, length} if length < 5000 else {300, length}:
            x, taps = source.standard_normal((1, length, 2)), source.standard_normal((count, 2))
            expected = np.zeros_like(x)
            for j in range(min(count, length)):
                expected[:, j:] += taps[j] * x[:, : length - j]
            actual = long_convolution(torch.from_numpy(x), torch.from_numpy(taps), chunk).numpy()
            assert relative_error(actual, expected) <= tolerances.LOGITS["float64"], (length, count)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_convolution_is_exactly_causal_and_by_row(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 150, 2, generator=generator).to(dtype)
    taps = torch.randn(100, 2, generator=generator).to(dtype)
    before = long_convolution(x, taps, 16)
    for position in range(150):
        changed = x.clone()
        changed[:, position:] = 1000 * x.flip(1)[:, position:]
        after = long_convolution(changed, taps, 16)
        assert torch.equal(after[:, :position], before[:, :position])
        assert (after[:, position] != before[:, position]).all()
    neighbours = x.clone()
    neighbours[1:] = 1000 * x[:-1]
    assert torch.equal(long_convolution(neighbours, taps, 16)[0], before[0])
    if dtype != torch.bfloat16:
        permuted = long_convolution(x.flip(0), taps, 16).flip(0)
        bound = tolerances.OTHER_PLACE[str(dtype).removeprefix("torch.")]
        assert relative_error(permuted.numpy(), before.numpy()) <= bound


def test_torch_sums_bfloat16_in_float32():
    # bfloat16 holds no odd number past 256: a narrow sum of ones would stall there.
    length, eps = 3000, torch.finfo(torch.bfloat16).eps / 2
    ones = torch.ones(1, length, 1, dtype=torch.bfloat16)
    exact = torch.arange(1.0, length + 1)
    actual = long_convolution(ones, ones[0], 64)[0, :, 0].float()
    assert ((actual - exact).abs() <= eps * exact).all()
    layer = LongConvolution(1, length, 64)
    layer.requires_grad_(False).taps.data = ones[0]
    past = torch.ones_like(layer.empty_past(1, length, torch.bfloat16))
    last, _ = layer.extend(ones[:, :1], past, 0)
    assert abs(float(last) - length) <= eps * length
    assert torch.equal(running_mean(ones), ones)


@pytest.mark.parametrize("rank", [0, 3])
def test_torch_sparse_dispatch_is_the_dense_sum_and_keeps_positions_apart(rank):
    torch.manual_seed(0)
    experts = AdaptiveExperts(4, 6, 5, rank, 0.3)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, a, gates = torch.randn(70, 6), torch.randn(70, 5), torch.rand(70, 2)
    spread = torch.stack([torch.randperm(4)[:2] for _ in range(70)])
    spread[7] = torch.tensor([3, 1])
    one_pair = spread[7].expand(70, 2)
    seventh = []
    for chosen in (spread, one_pair, spread.flip(0).index_copy(0, torch.tensor(7), spread[7:8])):
        actual = experts.sparse(x, a, chosen, gates)
        full = torch.zeros(70, 4).scatter(1, chosen, gates)
        dense = experts.dense(x[None], a[None], full[None])[0]
        error = relative_error(actual.detach().numpy(), dense.detach().numpy())
        assert error <= tolerances.LOGITS["float32"]
        parameters = list(experts.parameters())
        wanted = torch.autograd.grad(dense.square().sum(), parameters)
        for one, other in zip(
            torch.autograd.grad(actual.square().sum(), parameters), wanted, strict=True
        ):
            assert relative_error(one.numpy(), other.numpy()) <= tolerances.GRADIENTS["float32"]
        seventh.append(actual[7].detach().numpy())
    for other in seventh[1:]:  # it stands in groups of other sizes
        assert relative_error(other, seventh[0]) <= tolerances.OTHER_PLACE["float32"]


@pytest.fixture
def lfm():
    module = pytest.importorskip(
        "lfm_torch",
        reason="lfm-torch is not installed: pip install --no-deps lfm-torch==0.0.2 loguru",
    )
    from loguru import logger

    logger.disable("lfm_torch")
    return module


def original_names(layer: int, experts: int) -> dict[str, str]:
    """A name of lfm-torch → ours; an expert's is followed by its number."""
    ours = f"layers.{layer}."
    names = {"featurizer": "featurizer", "moe.gating": "mixture.gate", "output_layer": "output"}
    names |= {f"moe.experts.{e}.adapt": f"mixture.experts.adapt.{e}" for e in range(experts)}
    names |= {f"moe.experts.{e}": f"mixture.experts.base.{e}" for e in range(experts)}
    for part in ("token", "channel"):
        names[f"{part}_mixer.{part}_mixing"] = f"{part}_mixing.linear.base"
        names[f"{part}_mixer.{part}_mixing.adapt"] = f"{part}_mixing.linear.adapt"
    return {theirs: ours + name for theirs, name in names.items()}


def test_original_layers_equal_lfm_torch(lfm):
    config = LFByteConfig.original(embed_dim=16, num_layers=2, adapt_dim=8, num_experts=3)
    torch.manual_seed(0)
    theirs = [lfm.LFModel(16, 16, 16, 8, 3) for _ in range(2)]
    count = sum(p.numel() for p in theirs[0].parameters())
    assert config.layer_parameters() == count

    twin: Any = build_torch(model_from_dict(to_dict(config))).requires_grad_(False)
    for i, model in enumerate(theirs):
        for parameter in model.requires_grad_(False).parameters():
            parameter *= 0.2  # theirs are unit normal: outputs would be in the thousands
        for name, module in original_names(i, 3).items():
            source, (stem, _, number) = model.get_submodule(name), module.rpartition(".")
            if number.isdigit():
                stack = twin.get_submodule(stem)
                stack.kernels[int(number)], stack.bias[int(number)] = source.weight.T, source.bias
            else:
                twin.get_submodule(module).load_state_dict(
                    {leaf: getattr(source, leaf) for leaf in ("weight", "bias")}
                )
    params = {}
    for name in abstract_params(config):
        weight = name.replace(".embedding", ".weight")
        if name.endswith(".kernel"):
            params[name] = twin.get_parameter(name.removesuffix("kernel") + "weight").T.numpy()
        else:
            params[name] = twin.get_parameter(weight).numpy()

    x = np.random.default_rng(1).standard_normal((1, 11, 16)).astype("float32")
    expected = torch.nn.Sequential(*theirs)(torch.from_numpy(x)).numpy()
    bind, _ = define_model(config)

    @jax.jit
    def through_layers(params, x):
        for layer in bind(params).layers:
            x, _ = layer(x)
        return x

    ours = np.asarray(through_layers(params, x))
    assert relative_error(ours, expected) <= tolerances.LOGITS["float32"]
    y = torch.from_numpy(x)
    for layer in twin.layers:
        y, _ = layer(y)
    assert relative_error(y.numpy(), expected) <= tolerances.LOGITS["float32"]


def test_size_of_the_original_layer():
    config = LFByteConfig.original(embed_dim=512, adapt_dim=256, num_experts=4)
    assert config.layer_parameters() == 406_196_996
