"""MEGABYTE: JAX against torch by the tolerance table; sizes; exact causality; independent rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from bytelm import tolerances
from bytelm.config import MegabyteConfig, ModelConfig, model_from_dict, to_dict
from bytelm_jax.layers.attention import multi_query_attention
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.report import compare_twins, relative_error
from bytelm_torch.models import build_model as build_torch
from parity_tests.cases import quick
from parity_tests.twins import MEGABYTES, random_ids, twins

_TINY: dict[str, Any] = {
    "patch_size": 4,
    "global_dim": 4,
    "local_dim": 8,
    "max_length": 32,
    "global_layers": 1,
    "global_heads": 2,
    "local_layers": 1,
    "local_heads": 2,
    "init_std": 0.5,
}
TINY_MODELS: dict[str, ModelConfig] = {
    "megabyte": MegabyteConfig(**_TINY),
    "in_action": MegabyteConfig(variant="in_action", **_TINY),
}
VARIANTS = ["paper", "in_action"]
PATCH = 4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", quick(["float64", "float32"], "float64"))
def test_layers_logits_loss_gradients_and_generation(variant, dtype):
    config, params, twin = twins(variant, dtype)
    ids = random_ids(config, 3, 2 * PATCH + 3)
    ids[1, 7:] = config.vocab.pad_id  # a ragged row
    twin(torch.from_numpy(ids)).sum().backward()  # gradients of the caller's are not compared
    report = compare_twins(config, params, twin, ids, dtype)
    assert report.passed, report.text
    # One line per layer call, logits, loss, one line per parameter: nothing was left out.
    gradients = [line for line in report.lines if "gradient of" in line]
    assert len(gradients) == len(params)
    layers = [line for line in report.lines if "transformer.layers." in line]
    layers = [line for line in layers if line not in gradients]
    functions = [line for line in layers if line.endswith(": multi_query_attention")]
    assert (len(functions), len(layers) - len(functions)) == (4, 4 * 10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_at_every_length(variant, x64):
    config, params, twin = twins(variant, "float64")
    bind, _ = define_model(config)
    logits = jax.jit(lambda p, ids: bind(p)(ids))
    for length in (0, 1, PATCH - 1, PATCH, PATCH + 1, 2 * PATCH + 3):
        rows = 1 + length % 2
        ids = random_ids(config, rows, length, seed=length)
        ours = np.asarray(logits(params, ids))
        theirs = twin(torch.from_numpy(ids)).detach().numpy()
        assert ours.shape == theirs.shape == (rows, length, config.vocab.size)
        if length:
            assert relative_error(ours, theirs) <= tolerances.LOGITS["float64"]


@pytest.mark.parametrize("layer", ["attention", "feedforward", "attention.norm"])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 30.0])
def test_layers_at_every_input_scale(layer, scale, x64):
    config, params, twin = twins("in_action", "float64")
    bind, _ = define_model(config)
    assert isinstance(config, MegabyteConfig)
    x = scale * np.random.default_rng(1).standard_normal((2, 7, config.global_width))
    ours = bind(params).global_transformer.layers[1]
    theirs = twin.global_transformer.layers[1]
    for part in layer.split("."):
        ours, theirs = getattr(ours, part), getattr(theirs, part)
    error = relative_error(
        np.asarray(ours(jnp.asarray(x))), theirs(torch.from_numpy(x)).detach().numpy()
    )
    assert error <= tolerances.LOGITS["float64"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_logit_sees_its_own_byte_or_a_later_one(variant, dtype):
    config, params, _ = twins(variant, "float64" if dtype == "float64" else "float32")
    with jax.enable_x64(dtype == "float64"):
        bind, _ = define_model(config)
        logits = jax.jit(lambda p, ids: bind(p)(ids))
        cast = {name: value.astype(dtype) for name, value in params.items()}
        length = 2 * PATCH + 3
        ids = random_ids(config, 2, length)
        before = np.asarray(logits(cast, ids), np.float64)
        for position in range(length):
            changed = ids.copy()
            changed[:, position:] = random_ids(config, 2, length, seed=position + 1)[:, position:]
            after = np.asarray(logits(cast, changed), np.float64)
            np.testing.assert_array_equal(after[:, : position + 1], before[:, : position + 1])
            if position + 1 < length:  # and the change does reach what follows
                assert (after[:, position + 1 :] != before[:, position + 1 :]).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_independent(variant, x64):
    config, params, _ = twins(variant, "float64")
    bind, _ = define_model(config)
    logits = jax.jit(lambda p, ids: bind(p)(ids))
    ids = random_ids(config, 4, 2 * PATCH + 3)
    before = np.asarray(logits(params, ids))
    neighbours = ids.copy()
    neighbours[1:] = config.vocab.pad_id
    np.testing.assert_array_equal(np.asarray(logits(params, neighbours))[0], before[0])
    order = np.array([2, 0, 3, 1])
    permuted = np.asarray(logits(params, ids[order]))
    assert relative_error(permuted, before[order]) <= tolerances.OTHER_PLACE["float64"]
    alone = np.asarray(logits(params, ids[:1]))
    assert relative_error(alone[0], before[0]) <= tolerances.OTHER_PLACE["float64"]
    shorter = np.asarray(logits(params, ids[:, : PATCH + 1]))
    assert relative_error(shorter, before[:, : PATCH + 1]) <= tolerances.OTHER_PLACE["float64"]


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (MegabyteConfig(), 132_278_528),
        (MegabyteConfig(variant="in_action"), 131_918_336),
        (MegabyteConfig(local_heads=6), 132_198_656),
        *((config, None) for config in MEGABYTES.values()),
    ],
)
def test_parameter_counts_from_formula_shapes_and_torch(config, count):
    with torch.device("meta"):
        theirs = sum(p.numel() for p in build_torch(model_from_dict(to_dict(config))).parameters())
    ours = sum(int(np.prod(leaf.shape)) for leaf in abstract_params(config).values())
    assert config.parameter_count() == ours == theirs
    assert count is None or ours == count


def test_flops_formula_counts_the_matrix_products():
    config = MEGABYTES["in_action"]
    length = 32
    bind, init = define_model(config)
    counted = 0

    def count(q, k, v, mask, bias=None):
        nonlocal counted
        queries, heads, width = q.shape[-3:]
        counted += 2 * int(np.prod(q.shape[:-3])) * queries * k.shape[-2] * heads * width * 2 // 2
        return multi_query_attention(q, k, v, mask, bias)

    linear = nnx.Linear.__call__

    def count_linear(self, x, *rest):
        nonlocal counted
        counted += 2 * int(np.prod(x.shape[:-1])) * int(np.prod(self.kernel.shape))
        return linear(self, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytelm_jax.layers.attention.multi_query_attention", count)
        patch.setattr(nnx.Linear, "__call__", count_linear)
        jax.eval_shape(lambda: bind(init(0))(jnp.zeros((1, length), jnp.int32)))
    assert counted == config.flops_per_byte(length) * length


def test_ids_and_lengths_that_do_not_fit_raise_one_line():
    config, params, twin = twins("paper", "float32")
    bind, _ = define_model(config)
    for bad in (-1, config.vocab.size):
        ids = np.full((1, 3), bad, np.int32)
        with pytest.raises(ValueError, match=f"ids: {bad} is outside the vocabulary"):
            bind(params)(jnp.asarray(ids))
        with pytest.raises(ValueError, match=f"ids: {bad} is outside the vocabulary"):
            twin(torch.from_numpy(ids))
    assert config.longest_input is not None
    long = random_ids(config, 1, config.longest_input + 1)
    with pytest.raises(ValueError, match="length=33: this model has max_length=32"):
        bind(params)(jnp.asarray(long))
    with pytest.raises(ValueError, match="length=33: this model has max_length=32"):
        twin(torch.from_numpy(long))
    # Where values are unknown, under jit, an id outside the table poisons the logits.
    poisoned = jax.jit(lambda p, i: bind(p)(i))(params, np.full((1, 5), 1000, np.int32))
    assert np.isnan(np.asarray(poisoned)).any()
