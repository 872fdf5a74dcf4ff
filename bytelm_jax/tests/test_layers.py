"""Layers against literal formulas: exact lookups, masks written out, dropout drawn by row."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm import tolerances
from bytelm.positions import alibi_bias
from bytelm_jax.kernels.gelu import gelu
from bytelm_jax.kernels.low_precision import folded, linear_of_rows, normalized, normalized_linears
from bytelm_jax.layers.attention import multi_query_attention
from bytelm_jax.layers.dropout import dropout
from bytelm_jax.layers.embedding import ByteEmbedding
from bytelm_jax.layers.logits import LogitsLinear
from bytelm_jax.layers.norm import LayerNorm, RMSNorm
from bytelm_jax.models import build_model, define_model, split_model
from bytelm_jax.models.megabyte import Megabyte
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training.loss import cross_entropy, token_nats
from parity_tests.twins import MEGABYTES


def test_embedding_looks_up_exactly_and_its_gradient_is_the_scatter(x64):
    layer = ByteEmbedding(300, 7, 0.5, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    ids = jnp.array([[3, 3, 257], [0, 299, 3]])
    weight = jax.random.normal(jax.random.key(1), (2, 3, 7))
    out, gradient = jax.value_and_grad(lambda s: (nnx.merge(graph, s)(ids) * weight).sum())(state)
    table = np.asarray(layer.embedding[...])
    np.testing.assert_array_equal(np.asarray(layer(ids)), table[np.asarray(ids)])
    expected = np.zeros((300, 7))
    np.add.at(expected, np.asarray(ids), np.asarray(weight))
    actual = np.asarray(jax.tree.leaves(gradient)[0])
    assert relative_error(actual, expected) <= tolerances.GRADIENTS["float32"]
    assert np.isfinite(out)


def test_alibi_is_the_paper_s_slopes_rounded_to_float32():
    bias = alibi_bias(4, 3)
    assert bias.dtype == np.float32
    expected = [[0, 0.25, 0.5], [0, 0.0625, 0.125], [0, 2**-6, 2**-5], [0, 2**-8, 2**-7]]
    np.testing.assert_array_equal(bias, np.array(expected, np.float32))


@pytest.mark.parametrize("with_bias", [False, True])
def test_attention_equals_the_literal_formula(with_bias, x64):
    source = np.random.default_rng(0)
    q, k, v = (source.standard_normal(s) for s in ((2, 3, 4, 5), (2, 3, 5), (2, 3, 5)))
    mask = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]], bool)
    bias = source.standard_normal((4, 3)) if with_bias else None
    actual = multi_query_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask, bias)
    for b in range(2):
        for t in range(3):
            for h in range(4):
                seen = [s for s in range(3) if mask[t, s]]
                scores = np.array([q[b, t, h] @ k[b, s] / np.sqrt(5) for s in seen])
                if bias is not None:
                    scores += bias[h, seen]
                weights = np.exp(scores - scores.max())
                expected = (weights / weights.sum()) @ v[b, seen]
                error = relative_error(np.asarray(actual[b, t, h]), expected)
                assert error <= tolerances.LOGITS["float64"]


def test_norm_survives_a_large_mean():
    # The one-pass variance E[x²] − E[x]² loses every digit here.
    x = jnp.array([[4096.0, 4096.25, 4096.5, 4096.75]])
    actual = np.asarray(LayerNorm(4)(x))[0]
    centred = np.array([-0.375, -0.125, 0.125, 0.375])
    expected = centred / np.sqrt((centred**2).mean() + 1e-5)
    assert relative_error(actual, expected) <= tolerances.LOGITS["float32"]


NORMS = pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])


def _norm_and_linears(kind, dtype):
    """A norm whose scale and bias matter, a linear with and one without bias."""
    source = np.random.default_rng(0)
    norm, rngs = kind(6), nnx.Rngs(0)
    linears = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(6, 4, use_bias=False, rngs=rngs)
    graph, state = nnx.split((norm, linears))
    state = jax.tree.map(lambda p: jnp.asarray(source.standard_normal(p.shape), dtype), state)
    x = jnp.asarray(3 + source.standard_normal((5, 8, 6)), dtype)
    weights = [jnp.asarray(source.standard_normal((5, 8, n)), dtype) for n in (5, 4)]
    return graph, state, x, weights


def _weighed(outputs, weights):
    return sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))


@NORMS
def test_folded_norm_is_the_norm_before_the_linear(kind, x64):
    graph, state, x, weights = _norm_and_linears(kind, "float64")

    def plain(state, x):
        norm, linears = nnx.merge(graph, state)
        return _weighed([linear(norm(x)) for linear in linears], weights)

    def fold(state, x):
        norm, linears = nnx.merge(graph, state)
        rows = normalized(x.reshape(-1, 6), kind is LayerNorm)
        outputs = [folded(norm, linear, rows).reshape(5, 8, -1) for linear in linears]
        return _weighed(outputs, weights)

    actual, wanted = (jax.value_and_grad(f, (0, 1))(state, x) for f in (fold, plain))
    for f, w in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True):
        assert relative_error(np.asarray(f), np.asarray(w)) <= tolerances.GRADIENTS["float64"]


@NORMS
def test_16_bits_fold_where_rows_are_many(kind):
    graph, state, x, _ = _norm_and_linears(kind, "bfloat16")
    norm, linears = nnx.merge(graph, state)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: p.astype("float64"), state)
        their_norm, theirs = nnx.merge(graph, wide)
        hidden = their_norm(x.astype("float64"))
        expected = [np.asarray(linear(hidden)) for linear in theirs]
        back = np.asarray(theirs[0](x.astype("float64")))
    actual = normalized_linears(norm, x, *linears)
    few = normalized_linears(norm, x[:1], *linears)
    for out, first, want in zip(actual, few, expected, strict=True):
        assert out.dtype == x.dtype and out.shape == want.shape
        assert relative_error(np.asarray(out, "float64"), want) <= tolerances.BF16_LINEAR
        error = relative_error(np.asarray(first, "float64"), want[:1])
        assert error <= tolerances.BF16_LINEAR
    kernel = folded(norm, linears[1], normalized(x.reshape(-1, 6), kind is LayerNorm))
    np.testing.assert_array_equal(np.asarray(actual[1]), np.asarray(kernel).reshape(5, 8, 4))
    np.testing.assert_array_equal(np.asarray(few[0]), np.asarray(linears[0](norm(x[:1]))))
    error = relative_error(np.asarray(linear_of_rows(linears[0], x), "float64"), back)
    assert error <= tolerances.BF16_LINEAR


@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_of_16_bits_are_not_rounded(with_bias):
    source = np.random.default_rng(0)
    layer = LogitsLinear(6, 5, use_bias=with_bias, rngs=nnx.Rngs(0))
    plain = nnx.Linear(6, 5, use_bias=with_bias, rngs=nnx.Rngs(0))
    wide = jnp.asarray(source.standard_normal((2, 8, 6)), jnp.float32)
    np.testing.assert_array_equal(np.asarray(layer(wide)), np.asarray(plain(wide)))

    graph, state = nnx.split(layer)
    plain_graph, _ = nnx.split(plain)
    state = jax.tree.map(lambda p: (p + 0.3).astype("bfloat16"), state)
    x, gradient = wide.astype("bfloat16"), source.standard_normal((2, 8, 5))
    out, pull = jax.vjp(lambda s, x: nnx.merge(graph, s)(x), state, x)
    leaves = {k[0].key: np.asarray(p, "float64") for k, p in jax.tree.leaves_with_path(state)}
    expected = np.asarray(x, "float64") @ leaves["kernel"] + leaves.get("bias", 0)
    assert out.dtype == jnp.float32
    assert relative_error(np.asarray(out), expected) <= tolerances.LOGITS["float32"]
    # Gradients are those of the plain layer, whose results are rounded.
    rounded, pull_plain = jax.vjp(lambda s, x: nnx.merge(plain_graph, s)(x), state, x)
    actual = pull(jnp.asarray(gradient, out.dtype))
    wanted = pull_plain(jnp.asarray(gradient, rounded.dtype))
    for f, w in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True):
        error = relative_error(np.asarray(f, "float64"), np.asarray(w, "float64"))
        assert f.dtype == w.dtype and error <= tolerances.BF16_LINEAR


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gelu_of_every_16_bit_number_errs_by_its_rounding(dtype):
    try:
        jnp.zeros(8, dtype).astype("float32")
    except jax.errors.JaxRuntimeError as error:  # float16 below F16C, as --xla_cpu_max_isa=SSE4_2
        assert "Failed to materialize symbols" in str(error)
        pytest.skip(f"XLA cannot compile {dtype} for this processor")
    kind = jnp.finfo(dtype)
    x = np.arange(1 << 16, dtype=np.uint16).view(jnp.dtype(dtype))
    x = x[np.isfinite(x.astype("float32"))]
    wide = x.astype("float64")
    share = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in wide])
    slope = share + wide * np.exp(-0.5 * np.square(wide)) / math.sqrt(2 * math.pi)
    out, pull = jax.vjp(gelu, jnp.asarray(x))
    # Numbers below the normal ones may be flushed to zero, also before x multiplies them.
    half, least = float(kind.eps) / 2, 16 * float(kind.tiny)
    error = np.abs(np.asarray(out, "float64") - wide * share)
    assert (error <= (half + tolerances.GELU_SHARE) * np.abs(wide * share) + least).all()
    error = np.abs(np.asarray(pull(jnp.ones_like(out))[0], "float64") - slope)
    assert (error <= half * np.abs(slope) + tolerances.GELU_SHARE * share + least).all()
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pull)] == [(x.shape, x.dtype)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wider_gelu_is_that_of_erf(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = np.linspace(-6, 6, 101).astype(dtype)
        wide = x.astype("float64")
        share = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in wide])
        slope = share + wide * np.exp(-0.5 * np.square(wide)) / math.sqrt(2 * math.pi)
        out, pull = jax.vjp(gelu, jnp.asarray(x))
        assert relative_error(np.asarray(out), wide * share) <= tolerances.LOGITS[dtype]
        gradient = np.asarray(pull(jnp.ones_like(out))[0])
        assert relative_error(gradient, slope) <= tolerances.GRADIENTS[dtype]


def test_dropout_depends_on_the_row_alone():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 50, 3))
    whole = np.asarray(dropout(x, 0.25, keys))
    assert set(np.unique(whole)) == {0.0, np.float32(1 / 0.75)}
    assert abs((whole == 0).mean() - 0.25) < 0.1
    np.testing.assert_array_equal(np.asarray(dropout(x[2:3], 0.25, keys[2:3])), whole[2:3])
    assert not (whole[0] == whole[1]).all()
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, keys) is x


def test_loss_leaves_pads_out_and_sums_nats():
    logits = jnp.zeros((2, 3, 8)).at[0, 0, 5].set(np.log(9.0))
    ids = jnp.array([[5, 2, 7], [1, 7, 7]])
    nats, count = cross_entropy(logits, ids, pad_id=7)
    expected = [-np.log(9 / 16), np.log(8), np.log(8)]
    assert int(count) == 3
    assert float(nats) == pytest.approx(sum(expected), rel=tolerances.LOGITS["float32"])
    rows = np.asarray(token_nats(logits, ids))
    assert rows.shape == (2, 3) and rows[0, 0] == pytest.approx(expected[0])


def test_bfloat16_logits_keep_float32_norms_and_softmax():
    model = Megabyte(MEGABYTES["paper"], rngs=nnx.Rngs(0))
    rough = LayerNorm(8)(jnp.full((1, 8), 3.0, jnp.bfloat16))
    assert rough.dtype == jnp.bfloat16
    nats = token_nats(jnp.zeros((1, 8), jnp.bfloat16), jnp.array([3]))
    assert nats.dtype == jnp.float32
    scale = model.global_transformer.layers[0].attention.norm.scale[...]
    assert scale.dtype == jnp.float32


def test_patches_shift_as_written_out():
    """Two patches of four: what the global and the local transformer see, as literal ids."""
    model = Megabyte(MEGABYTES["paper"], rngs=nnx.Rngs(0))
    pad = model.config.vocab.pad_id
    patches = jnp.array([[[1, 2, 3, 4], [5, 6, 7, 8]]])
    np.testing.assert_array_equal(
        np.asarray(model.shift(patches, axis=1)), [[[pad] * 4, [1, 2, 3, 4]]]
    )
    np.testing.assert_array_equal(
        np.asarray(model.shift(patches, axis=2)), [[[pad, 1, 2, 3], [pad, 5, 6, 7]]]
    )
    np.testing.assert_array_equal(
        np.asarray(model.shift(patches.reshape(1, 8), axis=1)), [[pad, 1, 2, 3, 4, 5, 6, 7]]
    )


def test_traced_init_draws_what_nnx_rngs_would():
    config = MEGABYTES["paper"]
    _, built = split_model(build_model(config, nnx.Rngs(3)))
    for name, value in define_model(config)[1](3).items():
        np.testing.assert_array_equal(value, built.pop(name))
    assert not built
