"""Forms of decoding one position: XLA's sums, and Pallas' kernels in its interpreter and lowered.

They must give what the layers give, whatever else is in the batch. What a GPU's compiler makes of
them, and their speed, is for `scripts/bench/bench_decode.py`.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm import tolerances
from bytelm.config import BLTConfig, ByteVocab, MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.compiled import split_cached
from bytelm_jax.inference.generate import generate
from bytelm_jax.inference.sampling import candidate_columns, choose_ids, split_settings
from bytelm_jax.inference.stored import stored_by_module, weights_to_store
from bytelm_jax.kernels import decode_draw, decode_linear, decode_small
from bytelm_jax.kernels.decode_choice import DecodeForm, choose_form, stored_weights
from bytelm_jax.kernels.decode_weights import Normalization, Product, packed_columns, padded
from bytelm_jax.layers.attention import KeyValueCache
from bytelm_jax.layers.cross_attention import CrossAttention
from bytelm_jax.layers.rotary import rotation
from bytelm_jax.layers.transformer import TransformerLayer, positions_at
from bytelm_jax.models import define_model
from bytelm_jax.models.megabyte import Block
from bytelm_jax.parity.report import relative_error
from bytelm_jax.tests.test_extend import random_params
from parity_tests.blocks import TEXT

SOURCE = np.random.default_rng(0)
BOUND = tolerances.LOGITS["float32"]
FORMS = [DecodeForm("five", True, 1), DecodeForm("three", True, 1), DecodeForm("sums", False, 1)]
FIVE, THREE, SUMS = FORMS
INDEX = jnp.array([5, 0, 11], jnp.int32)
SIZE = 12


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The programs here run for milliseconds and compile for seconds."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def draw(*shape):
    return jnp.asarray(SOURCE.normal(size=shape), jnp.float32)


def plainly(call, *arguments):
    """`call(*arguments)`, in one program."""
    return jax.jit(call)(*arguments)


def by_kernels(module, form, call, *arguments):
    """`call(*arguments)` with the weights of `module` stored, in the interpreter."""

    def run(*arguments):
        weights = {id(module): module.decode_weights()}
        with choose_form(form, interpret=True), stored_weights(weights):
            return call(*arguments)

    return plainly(run, *arguments)


def assert_equal_but_for_rounding(actual, expected):
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for ours, theirs in leaves:
        assert ours.shape == theirs.shape
        assert relative_error(np.asarray(ours), np.asarray(theirs)) <= BOUND


def block():
    return Block(64, 2, 0.2, 0.0, False, rngs=nnx.Rngs(0))


def layer(window=0, kv_heads=1):
    return TransformerLayer(96, 2, kv_heads, 160, window, 0.0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.layers)
def test_a_layer_of_megabyte_and_every_row_by_itself(form):
    module, x = block(), draw(3, 1, 64)
    cache = KeyValueCache(draw(3, SIZE, 32), draw(3, SIZE, 32))
    found = by_kernels(module, form, module.extend, x, cache, INDEX)
    assert_equal_but_for_rounding(found, plainly(module.extend, x, cache, INDEX))
    alone = jax.tree.map(lambda part: part[:1], (x, cache, INDEX))
    one = by_kernels(module, form, module.extend, *alone)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])


@pytest.mark.parametrize("form", [FIVE, SUMS], ids=lambda form: form.layers)
@pytest.mark.parametrize(("window", "kv_heads", "write"), [(3, 2, True), (0, 1, False)])
def test_a_layer_of_the_byte_latent_transformer(window, kv_heads, write, form):
    """Heads of 48, which is no power of two; rotated; with a window, and from one packed array."""
    module, x = layer(window, kv_heads), draw(3, 1, 96)
    packed = draw(3, 2 * kv_heads, SIZE, 48)
    cache = template = KeyValueCache(*jnp.split(packed, 2, axis=1))

    def run(x, cache, packed):
        rope = rotation(positions_at(INDEX, 1, None), 48, 10_000.0, x.dtype)
        if write:
            return module.extend(x, rope, cache, INDEX)
        return module.extend_rows(x, rope, packed, INDEX)

    found = by_kernels(module, form, lambda x: run(x, cache, packed_columns(packed, template)), x)
    assert_equal_but_for_rounding(found, plainly(lambda x: run(x, cache, cache), x))


@pytest.mark.parametrize("form", [FIVE, SUMS], ids=lambda form: form.layers)
def test_bytes_read_the_vectors_of_their_patch(form):
    module, x = CrossAttention(64, 4, 2, rngs=nnx.Rngs(0)), draw(3, 1, 64)
    cache = KeyValueCache(*(draw(3, 1, 2, 2, 16) for _ in range(2)))
    found = by_kernels(module, form, module.read_each, x, cache)
    assert_equal_but_for_rounding(found, plainly(module.read_each, x, cache))
    found = by_kernels(module, form, module.keys_values, x)
    assert_equal_but_for_rounding(found, plainly(module.keys_values, x))


def test_a_row_of_a_product_is_the_same_among_any_rows():
    x, kernel = draw(7, 96), draw(96, 40)
    product = Product(padded(kernel.T), None)
    norm = Normalization(draw(96), draw(96))

    @jax.jit
    def run(x):
        with choose_form(FIVE, interpret=True):
            return decode_linear.linear(x, product, norm, "gelu", outputs=40)

    found = run(x)
    np.testing.assert_array_equal(run(x[:2]), found[:2])
    for row in range(7):
        np.testing.assert_array_equal(run(x[row : row + 1])[0], found[row])


@pytest.mark.parametrize("sampler", [SamplerConfig(sampler="greedy"), SamplerConfig()])
def test_one_kernel_draws_what_the_sampler_draws(sampler):
    vocab, (mode, numbers) = ByteVocab(), split_settings(sampler, False)
    logits = 3 * draw(16, vocab.size)
    logits = logits.at[0, 7].set(jnp.nan).at[1, 9].set(jnp.inf).at[2].set(0.0)
    allowed = SOURCE.random((16, candidate_columns(vocab).size)) < 0.3
    allowed[:2] = True
    uniform = jnp.asarray(SOURCE.random(16), jnp.float32)

    def choose(logits, uniform):
        return choose_ids(logits, uniform, mode, numbers, vocab, jnp.asarray(allowed))

    def by_kernel(*arguments):
        with choose_form(FIVE, interpret=True), stored_weights({0: None}):
            return choose(*arguments)

    expected, found = plainly(choose, logits, uniform), plainly(by_kernel, logits, uniform)
    np.testing.assert_array_equal(found[2:], expected[2:])
    assert list(found[:2]) == [vocab.pad_id] * 2


MEGABYTE = MegabyteConfig(
    patch_size=2,
    global_dim=32,
    local_dim=64,
    max_length=32,
    global_layers=1,
    global_heads=2,
    local_layers=1,
    local_heads=2,
    init_std=0.3,
)
BLT = BLTConfig(
    patcher="space",
    ngram_sizes=(),
    local_dim=64,
    local_window=8,
    encoder_heads=2,
    encoder_hidden_dim=96,
    decoder_layers=1,
    decoder_heads=2,
    decoder_hidden_dim=96,
    global_dim=96,
    global_layers=1,
    global_heads=2,
    global_hidden_dim=96,
)


def model_of(config):
    params = {name: x.astype(jnp.float32) for name, x in random_params(config).items()}
    return define_model(config)[0](params)


def test_megabyte_writes_the_same_bytes(monkeypatch):
    model, used, call = model_of(MEGABYTE), set(), decode_linear.kernel_call

    def watched(*arguments, name, **rest):
        used.add(name)
        return call(*arguments, name=name, **rest)

    for module in (decode_linear, decode_small, decode_draw):
        monkeypatch.setattr(module, "kernel_call", watched)
    request = ([TEXT[:9]], 7, SamplerConfig(temperature=0.9), 3, False)
    expected = generate(model, *request)
    with choose_form(THREE, interpret=True):
        assert generate(model, *request) == expected
    assert used == {"decode_linear", "decode_project_attend", "decode_out_up", "decode_draw"}


def test_sums_write_the_same_bytes():
    model, request = model_of(MEGABYTE), ([TEXT[:9]], 7, SamplerConfig(temperature=0.9), 3, False)
    expected = generate(model, *request)
    with choose_form(SUMS):
        assert generate(model, *request) == expected


@pytest.mark.parametrize("form", [FIVE, SUMS], ids=lambda form: form.layers)
def test_the_byte_latent_transformer_ends_a_patch_with_the_same_logits(form):
    structure, params = split_cached(model_of(BLT))
    source = np.random.default_rng(1)

    def step(params, weights, before, cache):
        model = structure.model(params)
        with (
            choose_form(form, interpret=True),
            stored_weights(stored_by_module(model, weights)),
        ):
            return model.extend(before, cache, jnp.array([9]))

    def empty(params):
        return structure.model(params).init_cache(1, 16)

    def filled(leaf):
        is_float = leaf.dtype == jnp.float32
        values = source.normal(size=leaf.shape) if is_float else np.zeros(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    cache = jax.tree.map(filled, jax.eval_shape(empty, params))
    cache = cache._replace(ids=jnp.full_like(cache.ids, ord("e") + BLT.vocab.offset))
    before = jnp.full((1, 1), ord(" ") + BLT.vocab.offset)
    weights = weights_to_store(structure, form, 1)(params)
    assert len(weights) == 6  # three layers, what pools and what reads patches, the logits
    found = jax.jit(step)(params, weights, before, cache)
    expected = jax.jit(step)(params, [], before, cache)
    assert int(found[1].global_calls) == 1
    assert_equal_but_for_rounding(found, expected)


def abstract_gpu():
    """Of what a kernel's lowering asks of the device, where there is none."""
    if not hasattr(jax.sharding, "AbstractDevice"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize(
    ("module", "form", "write", "kernels"),
    [
        (lambda: Block(256, 4, 0.02, 0.0, False, rngs=nnx.Rngs(0)), THREE, True, 3),
        (lambda: Block(1024, 16, 0.02, 0.0, False, rngs=nnx.Rngs(0)), THREE, True, 5),
        (lambda: TransformerLayer(1536, 16, 0, 4096, 0, 0.0, rngs=nnx.Rngs(0)), FIVE, False, 5),
    ],
    ids=["local", "global", "blt"],
)
def test_a_gpu_takes_the_layers_of_the_large_recipes(module, form, write, kernels):
    graph, state = nnx.split(nnx.eval_shape(module))

    def struct(*shape) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    width = state["attention"]["to_out"]["kernel"].shape[1]
    shape = (2, 64, 64) if write else (2, 16, 64, 96)
    cache = KeyValueCache(struct(*shape), struct(*shape))

    def step(state, x, cache, index):
        layer = nnx.merge(graph, state)
        with choose_form(form), stored_weights({id(layer): layer.decode_weights()}):
            if write:
                return layer.extend(x, cache, index)
            rope = rotation(positions_at(index, 1, None), 96, 10_000.0, x.dtype)
            return layer.extend_rows(x, rope, cache, index)

    at = jax.ShapeDtypeStruct((2,), jnp.int32)
    with abstract_gpu():
        traced = jax.jit(step).trace(state, struct(2, 1, width), cache, at)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton") == kernels
