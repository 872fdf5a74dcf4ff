"""LFByte: JAX against torch by the tolerance table; sizes; exact causality; independent rows."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm import tolerances
from bytelm.config import LFByteConfig, ModelConfig, from_dict, model_from_dict, to_dict
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.generate import generate, generate_uncached
from bytelm_jax.models import abstract_params, build_model, define_model, split_model
from bytelm_jax.parity.report import relative_error
from bytelm_torch.models import build_model as build_torch

SMALL: Any = {
    "embed_dim": 12,
    "num_layers": 1,
    "adapt_dim": 6,
    "kernel_length": 100,
    "rank": 3,
}
WHOLE: dict[str, Any] = {"context": "sequence", "causal": False}
FORMS = {
    "default": LFByteConfig(**SMALL | {"num_layers": 2}),
    "dense": LFByteConfig(**SMALL, top_k=0, token_mixing="none"),
    "full": LFByteConfig(**SMALL, adaptation="full", hidden_mult=1),
    "full dense": LFByteConfig(**SMALL, adaptation="full", hidden_mult=0, top_k=0),
    "whole": LFByteConfig(**SMALL, **WHOLE, hidden_mult=0),
    "original": LFByteConfig.original(embed_dim=12, num_layers=2, adapt_dim=6, num_experts=3),
}
TINY_MODELS: dict[str, ModelConfig] = {
    "lfbyte": LFByteConfig(
        embed_dim=8, num_layers=1, adapt_dim=4, rank=2, kernel_length=8, init_std=0.5
    ),
}
FAST = {"xla_backend_optimization_level": 0}  # compiling takes the time, running none
LENGTH = 140  # past the convolution's chunk and its double: both kinds of transform take part


def random_params(config, dtype):
    """Random values for every parameter, so that none of them can hide behind a zero."""
    source = np.random.default_rng(0)
    shapes = sorted((name, leaf.shape) for name, leaf in abstract_params(config).items())
    return {
        name: jnp.asarray(0.3 * source.standard_normal(shape) + name.endswith("scale"), dtype)
        for name, shape in shapes
    }


def random_ids(rows, length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, length)).astype(np.int32)


def to_torch(params):
    """The layout contract: dense kernels turn, tables and norms change names, all else stays."""
    renamed = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
    tensors = {}
    for name, value in params.items():
        module, _, leaf = name.rpartition(".")
        value = np.asarray(value).T if leaf == "kernel" else np.asarray(value)
        tensors[f"{module}.{renamed.get(leaf, leaf)}"] = torch.from_numpy(np.array(value))
    return tensors


@functools.cache
def twins(form, dtype):
    """(bind, params, compiled forward pass, torch twin) of the tiny model called `form`."""
    config = FORMS[form]
    with jax.enable_x64(dtype == "float64"):
        params = random_params(config, dtype)
        bind, _ = define_model(config)
        twin = build_torch(model_from_dict(to_dict(config))).eval()
        if dtype != "bfloat16":
            tensors = to_torch(params)
            twin.to(next(iter(tensors.values())).dtype).load_state_dict(tensors)
        return bind, params, jax.jit(lambda params, ids: bind(params)(ids)), twin


@pytest.mark.parametrize(
    ("form", "dtype"),
    [*((form, "float64") for form in FORMS), ("dense", "float32")],
)
def test_logits_extra_loss_metrics_and_gradients(form, dtype):
    bind, params, _, twin = twins(form, dtype)
    weights = np.random.default_rng(1).standard_normal((2, LENGTH, 259)).astype(dtype)
    ids = random_ids(2, LENGTH)

    def weighed(params):
        output = bind(params).outputs(jnp.asarray(ids))
        return (weights * output.logits).mean() + output.extra_loss.mean(), output

    with jax.enable_x64(dtype == "float64"):
        run = jax.jit(jax.value_and_grad(weighed, has_aux=True), compiler_options=FAST)
        (_, ours), gradients = jax.device_get(run(params))
    theirs = twin.outputs(torch.from_numpy(ids))
    twin.zero_grad()
    ((torch.from_numpy(weights) * theirs.logits).mean() + theirs.extra_loss.mean()).backward()

    assert ours.metrics.keys() == theirs.metrics.keys()
    assert bool(ours.metrics) == FORMS[form].sparse
    pairs = [(ours.logits, theirs.logits), (ours.extra_loss, theirs.extra_loss)]
    pairs += [(ours.metrics[name], theirs.metrics[name]) for name in ours.metrics]
    for one, other in pairs:
        assert relative_error(one, other.detach().numpy()) <= tolerances.LOGITS[dtype]
    for name, gradient in to_torch(gradients).items():
        wanted = twin.get_parameter(name).grad
        assert wanted is not None, name
        error = relative_error(gradient.numpy(), wanted.numpy())
        assert error <= tolerances.GRADIENTS[dtype], name


def test_nothing_and_one_byte(x64):
    _, params, forward, twin = twins("default", "float64")
    for length in (0, 1):
        ids = random_ids(1, length)
        ours = np.asarray(forward(params, ids))
        theirs = twin(torch.from_numpy(ids)).detach().numpy()
        assert ours.shape == theirs.shape == (1, length, 259)
        assert relative_error(ours, theirs) <= tolerances.LOGITS["float64"]


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("default", "float32"), ("default", "bfloat16"), ("full", "float64")],
)
def test_no_logit_sees_its_own_byte_or_a_later_one_nor_another_row(form, dtype):
    with jax.enable_x64(dtype == "float64"):
        _, params, forward, twin = twins(form, dtype)

        def run(ids):
            return np.asarray(forward(params, ids), np.float64)

        def run_twin(ids):
            return twin(torch.from_numpy(ids)).detach().numpy()

        ids = random_ids(3, LENGTH)
        for logits in [run] if dtype == "bfloat16" else [run, run_twin]:
            before = logits(ids)
            for position in (0, 1, 40, 63, 64, 65, 127, 128, 139):
                changed = ids.copy()
                changed[:, position:] = random_ids(3, LENGTH, seed=position + 1)[:, position:]
                after = logits(changed)
                np.testing.assert_array_equal(after[:, : position + 1], before[:, : position + 1])
                if position + 1 < LENGTH:  # and the change does reach what follows
                    assert (after[:, position + 1] != before[:, position + 1]).any(axis=-1).all()
            neighbours = ids.copy()
            neighbours[1:] = 257
            np.testing.assert_array_equal(logits(neighbours)[0], before[0])
            if dtype != "bfloat16":
                order = np.array([2, 0, 1])
                error = relative_error(logits(ids[order]), before[order])
                assert error <= tolerances.OTHER_PLACE[dtype]


def test_context_over_the_sequence_sees_later_bytes():
    # What the refusal below is for: without it every logit would know the bytes it predicts.
    _, _, _, twin = twins("whole", "float32")
    ids = torch.from_numpy(random_ids(1, 9))
    changed = ids.clone()
    changed[:, -1] = 0
    assert (twin(ids)[:, 0] != twin(changed)[:, 0]).any()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"context": "sequence"}, 'context="sequence": with causal=True'),
        ({"rank": 0}, "rank=0"),
        ({"kernel_length": 0}, "kernel_length=0"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"init_std": 0.0}, "init_std=0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        build_model(LFByteConfig(**fields))


def test_config_survives_json_and_an_encoder_does_not_generate():
    for config in FORMS.values():
        assert from_dict(LFByteConfig, to_dict(config)) == config
    bind, params, _, twin = twins("whole", "float32")
    for model in (bind(params), twin):
        with pytest.raises(ValueError, match="causal=False"):
            model.init_cache(1, 4)
        with pytest.raises(ValueError, match="259 is outside the vocabulary"):
            model(torch.tensor([[259]]) if model is twin else jnp.array([[259]]))


@pytest.mark.parametrize("form", FORMS)
def test_parameter_counts_from_formula_shapes_and_torch(form):
    config = FORMS[form]
    with torch.device("meta"):
        theirs = sum(p.numel() for p in build_torch(model_from_dict(to_dict(config))).parameters())
    ours = sum(int(np.prod(leaf.shape)) for leaf in abstract_params(config).values())
    assert config.parameter_count() == ours == theirs


def count_products(jaxpr, chunk):
    """Floating-point operations of the matrix products in a jaxpr; triangular ones count half."""
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [v for v in equation.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        calls = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for sub in inner:
            total += calls * count_products(getattr(sub, "jaxpr", sub), chunk)
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            left, right = (v.aval.shape for v in equation.invars[:2])
            kind = equation.params["dimension_numbers"] if len(equation.invars) == 2 else None
            contracted = kind[0][0] if kind else (1,)
            width = np.prod([left[axis] for axis in contracted])
            flops = 2 * np.prod(equation.outvars[0].aval.shape) * width
            total += flops / 2 if right[1:] == (chunk, chunk) else flops
    return total


@pytest.mark.parametrize("form", FORMS)
def test_flops_formula_counts_the_matrix_products(form):
    config, length = FORMS[form], 128  # whole chunks: none of the counted work is padding
    params = abstract_params(config)
    bind, _ = define_model(config)
    ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params, ids: bind(params)(ids))(params, ids).jaxpr
    counted = count_products(jaxpr, config.convolution_chunk)
    assert round(config.flops_per_byte(length) * 2 * length) == round(counted)


@pytest.mark.parametrize("form", ["default", "dense"])
def test_cache_size_formula(form):
    config = FORMS[form]
    bind, params, _, twin = twins(form, "float32")
    for length in (16, 300):
        cache = jax.eval_shape(lambda length=length: bind(params).init_cache(3, length))
        ours = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        cache: Any = twin.init_cache(3, length)
        theirs = sum(t.nbytes for layer in cache.layers for t in layer if t is not None)
        assert 3 * config.cache_bytes(length, 4) == ours == theirs


def torch_greedy(twin, prompt, count):
    """Cached greedy decoding in torch, straight on the decoder's interface."""
    ids = torch.tensor([[twin.config.vocab.pad_id, *prompt]])
    with torch.no_grad():
        cache = twin.init_cache(1, len(prompt) + count)
        cache = twin.prefill(ids[:, 1:], cache)
        for index in range(len(prompt), len(prompt) + count):
            cache, byte = twin.decode_round(
                cache, ids[:, -1:], index, lambda logits, i: logits[:, :256].argmax(-1)
            )
            ids = torch.cat([ids, byte], dim=1)
    return bytes(ids[0, 1 + len(prompt) :].tolist())


def test_cached_generation_is_uncached_generation():
    # The filter is shorter than the text; the shorter prompt is cut out of a prefill past its end.
    greedy, prompts = SamplerConfig(sampler="greedy"), [b"to be, or not", b"bytes"]
    config = LFByteConfig(**SMALL | {"kernel_length": 7})
    params = random_params(config, "float32")
    model = define_model(config)[0](params)
    cached = generate(model, prompts, 17, greedy, stop_at_eos=False)
    assert cached == generate_uncached(model, prompts, 17, greedy, stop_at_eos=False)
    assert all(len(text) == 17 for text in cached) and len(set(cached[0])) > 1
    twin = build_torch(model_from_dict(to_dict(config))).eval()
    twin.load_state_dict(to_torch(params))
    assert [torch_greedy(twin, prompt, 17) for prompt in prompts] == cached


def test_dropout_is_by_row_and_remat_and_devices_change_nothing():
    config = LFByteConfig(**SMALL | {"dropout": 0.5})
    bind, _ = define_model(config)
    params, ids = random_params(config, "float32"), random_ids(4, 10)
    keys = jax.random.split(jax.random.key(0), 4)

    def loss(params, ids, keys, remat=False, axis=None):
        output = bind(params).outputs(ids, keys, remat)
        rows = jnp.square(output.logits).mean(axis=(1, 2)) + output.extra_loss
        return rows.sum() if axis is None else jax.lax.psum(rows.sum(), axis)

    plain = jax.jit(jax.value_and_grad(loss), compiler_options=FAST)
    wanted, gradients = plain(params, ids, keys)
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.P("rows")
    spread = jax.shard_map(
        jax.value_and_grad(functools.partial(loss, remat=True, axis="rows")),
        mesh=mesh,
        in_specs=(jax.P(), split, split),
        out_specs=jax.P(),
    )
    actual, again = jax.jit(spread, compiler_options=FAST)(params, ids, keys)
    assert relative_error(np.asarray(actual), np.asarray(wanted)) <= tolerances.LOGITS["float32"]
    for name, gradient in gradients.items():
        error = relative_error(np.asarray(again[name]), np.asarray(gradient))
        assert error <= tolerances.GRADIENTS["float32"], name
    assert plain(params, ids, keys[::-1])[0] != wanted  # dropout was on
    flipped, _ = plain(params, ids[::-1], keys[::-1])
    assert relative_error(np.asarray(flipped), np.asarray(wanted)) <= tolerances.LOGITS["float32"]


def test_starts_with_the_declared_scales():
    config = LFByteConfig(
        embed_dim=64, num_layers=1, adapt_dim=64, kernel_length=64, rank=64, hidden_mult=1
    )
    _, params = split_model(build_model(config))
    twin = build_torch(model_from_dict(to_dict(config)))
    tensors = to_torch(params)
    for name, parameter in twin.named_parameters():
        ours, theirs = tensors[name].double(), parameter.detach().double()
        if ours.std() == 0 or theirs.std() == 0:  # constants: zeros and ones
            assert torch.equal(ours, theirs), name
        else:  # the same scale, to five standard errors
            error = 5 / np.sqrt(ours.numel())
            assert abs(float(ours.std() / theirs.std()) - 1) <= error, name
