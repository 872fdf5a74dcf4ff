"""Programs for a GPU, lowered on a CPU: no kernel is asked for what it refuses.

A GPU's compiler is not there, so what it refuses is found by `scripts/check/gpu` alone.
"""

import contextlib
from dataclasses import fields, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bytelm import recipes, tolerances
from bytelm.config.blt import EntropyConfig
from bytelm.positions import alibi_bias, alibi_slopes
from bytelm.trainable import trainable
from bytelm_jax.kernels import backend
from bytelm_jax.kernels.attention import fused_attention, has_fused_attention, with_alibi
from bytelm_jax.layers.attention import multi_query_attention
from bytelm_jax.layers.grouped_attention import grouped_attention
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from parity_tests.cases import quick

WRITTEN_OUT = {"transformer_tiny"}
"""Its attention is not fused: heads of a width that it does not take."""


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of which only JAX's own checks are asked: its kind and its version of cuDNN."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # The mesh is one of CPUs: what it is asked for is answered as a mesh of GPUs would.
    monkeypatch.setattr(steps, "compiling_for", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(steps, "platform_of", lambda mesh: "gpu")
    hopper = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [hopper])


def shallow(config):
    """The configuration with one layer in each stack: kernels depend on all its other sizes."""
    stacks = [f.name for f in fields(config) if f.name.endswith("layers")]
    changes = {name: min(1, getattr(config, name)) for name in stacks}
    if isinstance(getattr(config, "entropy", None), EntropyConfig):
        changes["entropy"] = shallow(config.entropy)
    return replace(config, **changes)


def lower_step(recipe, devices=1, fsdp=1):
    """The text of the recipe's train step, lowered for a GPU, with SGD and no micro-batches."""
    model, run = shallow(recipe.model), replace(recipe.train, fsdp=fsdp, accumulation_steps=1)
    mesh, (bind, init) = meshes.make_mesh(devices, fsdp), define_model(model)
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    parts = trainable(replace(recipe, model=model), abstract_params(model))
    step = steps.make_train_step(bind, optimizer, run, model.vocab.pad_id, mesh, parts)
    state = steps.abstract_init(mesh, optimizer, jax.eval_shape(lambda: init(0)))
    shape = run.batch_size, recipe.data.sequence_length
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=meshes.batch_sharding(mesh))
    traced = step.trace(state, ids)  # pyright: ignore[reportFunctionMemberAccess]
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def calls(text):
    """How often cuDNN's attention is called, forward and backward."""
    return [text.count(f"@__cudnn${name}(") for name in ("fmhaSoftmax", "fmhaSoftmaxBackward")]


SIBLINGS = [n for n in recipes.names() if n.endswith(("_tiny", "_400m", "_400m_p4", "_1b"))]
"""Of another width and depth than recipes that are here too."""


@pytest.mark.parametrize(
    "name", quick(recipes.names(), *(n for n in recipes.names() if n not in SIBLINGS))
)
def test_a_gpu_takes_the_train_step_of_every_recipe_as_shipped(name, gpu):
    recipe = recipes.get(name)
    forward, backward = calls(lower_step(recipe))
    hint = f"{name}: add it to WRITTEN_OUT if its attention is not fused, take it out if it is"
    attends = any("attention" in leaf for leaf in abstract_params(recipe.model))
    assert (backward > 0) == (attends and name not in WRITTEN_OUT), hint
    # A frozen entropy model has no backward pass.
    assert forward - backward == (getattr(recipe.model, "patcher", "") == "entropy")


@pytest.mark.parametrize(
    ("name", "length"),
    [("megabyte_in_action_132m", 2040), ("transformer_132m", 2047), ("entropy_100m", 2047)],
)
def test_a_gpu_takes_odd_lengths_in_shard_map(name, length, gpu):
    recipe = recipes.get(name)
    data = replace(recipe.data, sequence_length=length)
    run = replace(recipe.train, batch_size=4, parallel="shard_map")
    forward, backward = calls(lower_step(replace(recipe, data=data, train=run), 4, 2))
    assert forward == backward > 0


@pytest.mark.parametrize(
    ("length", "window", "kind"),
    [(65, 0, "plain"), (67, 3, "plain"), (301, 0, "alibi"), (64, 0, "guided")],
)
def test_fused_attention_is_the_written_out_one(length, window, kind, gpu, monkeypatch):
    """JAX's own formula stands for cuDNN, which a CPU does not have."""
    real, lengths = jax.nn.dot_product_attention, []

    def without_cudnn(q, k, v, *, implementation, **options):
        assert implementation == "cudnn"
        lengths.append(q.shape[1])
        return real(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    source = np.random.default_rng(length)
    wide = 16 if kind == "guided" else 8
    shapes = (2, length, 4, wide), (2, length, 1, wide), (2, length, 1, 8), (2, length, 4, 8)
    *inputs, weights = (jnp.asarray(source.normal(size=s), jnp.bfloat16) for s in shapes)
    ahead = np.arange(length)[:, None] - np.arange(length)[None, :]
    mask = (ahead >= 0) & (ahead < (window or length))
    results, slopes, bias = [], None, None
    if kind == "alibi":
        slopes, bias = alibi_slopes(4), alibi_bias(4, length)

    def written_out(q, k, v):
        if kind == "guided":
            return grouped_attention(q, k, v, mask)
        return multi_query_attention(q, k[:, :, 0], v[:, :, 0], mask, bias)

    for form in (lambda q, k, v: fused_attention(q, k, v, window, slopes), written_out):
        out, pull = jax.vjp(jax.jit(form), *inputs)
        results.append([np.asarray(x, np.float32) for x in (out, *pull(weights))])
    assert lengths == [length + length % 2]
    for ours, theirs in zip(*results, strict=True):
        assert relative_error(ours, theirs) <= tolerances.BF16_LINEAR


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_alibi_in_sixteen_bits_is_that_of_float32(dtype):
    count, heads, width = 9_000, 12, 8  # neither the slopes nor √8 are powers of two
    q, k = (jnp.zeros((1, count, h, width), dtype) for h in (heads, 1))
    q, k = (np.asarray(x, np.float64) for x in with_alibi(q, k, alibi_slopes(heads)))
    scores = np.einsum("hj,sj->hs", q[0, 1], k[0, :, 0]) * width**-0.5
    assert relative_error(scores, alibi_bias(heads, count)) <= np.finfo(np.float32).eps


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("gpu", "7.5", False),
        ("gpu", "8.0", True),
        ("gpu", "10.3", True),
        ("gpu", "gfx942", False),
        ("tpu", None, False),
        ("cpu", None, False),
    ],
)
def test_which_machines_have_fused_attention(platform, capability, expected, monkeypatch):
    device = SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert has_fused_attention() == expected
    with backend.pretend_platform("gpu"):
        assert has_fused_attention()
