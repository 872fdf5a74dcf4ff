"""Decoding one position by sums gives what the layers give, whatever else is in the batch.

What a GPU's compiler makes of it, and its speed, is for `scripts/bench/bench_decode.py`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm import tolerances
from bytelm.config import BLTConfig, MegabyteConfig
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.compiled import split_cached
from bytelm_jax.inference.generate import generate
from bytelm_jax.inference.stored import stored_by_module, weights_to_store
from bytelm_jax.kernels.decode_choice import choose_form, stored_weights
from bytelm_jax.kernels.decode_weights import packed_columns
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
SUMS = "sums"
INDEX = jnp.array([5, 0, 11], jnp.int32)
SIZE = 12


pytestmark = pytest.mark.usefixtures("quick_compilation")


def draw(*shape):
    return jnp.asarray(SOURCE.normal(size=shape), jnp.float32)


def plainly(call, *arguments):
    """`call(*arguments)`, in one program."""
    return jax.jit(call)(*arguments)


def by_sums(module, call, *arguments):
    """`call(*arguments)` with the weights of `module` stored."""

    def run(*arguments):
        weights = {id(module): module.decode_weights()}
        with choose_form(SUMS), stored_weights(weights):
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


def test_a_layer_of_megabyte_and_every_row_by_itself():
    module, x = block(), draw(3, 1, 64)
    cache = KeyValueCache(draw(3, SIZE, 32), draw(3, SIZE, 32))
    found = by_sums(module, module.extend, x, cache, INDEX)
    assert_equal_but_for_rounding(found, plainly(module.extend, x, cache, INDEX))
    alone = jax.tree.map(lambda part: part[:1], (x, cache, INDEX))
    one = by_sums(module, module.extend, *alone)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])


@pytest.mark.parametrize(("window", "kv_heads", "write"), [(3, 2, True), (0, 1, False)])
def test_a_layer_of_the_byte_latent_transformer(window, kv_heads, write):
    """Heads of 48, which is no power of two; rotated; with a window, and from one packed array."""
    module, x = layer(window, kv_heads), draw(3, 1, 96)
    packed = draw(3, 2 * kv_heads, SIZE, 48)
    cache = template = KeyValueCache(*jnp.split(packed, 2, axis=1))

    def run(x, cache, packed):
        rope = rotation(positions_at(INDEX, 1, None), 48, 10_000.0, x.dtype)
        if write:
            return module.extend(x, rope, cache, INDEX)
        return module.extend_rows(x, rope, packed, INDEX)

    found = by_sums(module, lambda x: run(x, cache, packed_columns(packed, template)), x)
    assert_equal_but_for_rounding(found, plainly(lambda x: run(x, cache, cache), x))


def test_bytes_read_the_vectors_of_their_patch():
    module, x = CrossAttention(64, 4, 2, rngs=nnx.Rngs(0)), draw(3, 1, 64)
    cache = KeyValueCache(*(draw(3, 1, 2, 2, 16) for _ in range(2)))
    found = by_sums(module, module.read_each, x, cache)
    assert_equal_but_for_rounding(found, plainly(module.read_each, x, cache))
    found = by_sums(module, module.keys_values, x)
    assert_equal_but_for_rounding(found, plainly(module.keys_values, x))


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


def test_sums_write_the_same_bytes():
    model, request = model_of(MEGABYTE), ([TEXT[:9]], 7, SamplerConfig(temperature=0.9), 3, False)
    expected = generate(model, *request)
    with choose_form(SUMS):
        assert generate(model, *request) == expected
        assert generate(model, *request, speculate="ngram") == expected


@pytest.mark.parametrize(
    "config", [replace(MEGABYTE, variant="in_action"), replace(BLT, feedforward="spline")]
)
def test_models_with_other_layers_store_nothing(config):
    model = model_of(config)
    structure, params = split_cached(model)
    with choose_form(SUMS):
        assert weights_to_store(structure, params, 1) == []


def test_the_byte_latent_transformer_ends_a_patch_with_the_same_logits():
    structure, params = split_cached(model_of(BLT))
    source = np.random.default_rng(1)

    def step(params, weights, before, cache):
        model = structure.model(params)
        with choose_form(SUMS), stored_weights(stored_by_module(model, weights)):
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
    with choose_form(SUMS):
        weights = weights_to_store(structure, params, 1)
    assert len(weights) == 6  # three layers, what pools and what reads patches, the logits
    found = jax.jit(step)(params, weights, before, cache)
    expected = jax.jit(step)(params, [], before, cache)
    assert int(found[1].global_calls) == 1
    assert_equal_but_for_rounding(found, expected)
