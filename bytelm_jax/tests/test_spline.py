"""Splines against scipy, and the folded form of guided attention against the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import BSpline

from bytelm.config.blt import SPLINE_BASES
from bytelm.config.blt import SPLINE_EDGE as EDGE
from bytelm.config.blt import SPLINE_INTERVALS as INTERVALS
from bytelm.tolerances import LOGITS
from bytelm_jax.kernels.block_sums import blocks, sum_blocks
from bytelm_jax.kernels.spline import spline_activation
from bytelm_jax.layers.grouped_attention import grouped_attention, guide

CHANNELS = 3
STEP = 2 * EDGE / INTERVALS
KNOTS = -EDGE + STEP * np.arange(-3, INTERVALS + 4)


def reference(coefficients: np.ndarray) -> BSpline:
    """A spline for each row of coefficients, NaN outside the extended knots.

    scipy evaluates between the fourth knot from either end, so three more stand behind each, whose
    basis functions have no weight.
    """
    knots = -EDGE + STEP * np.arange(-6, INTERVALS + 7)
    return BSpline(knots, np.pad(coefficients, ((0, 0), (3, 3))).T, 3, extrapolate=False)


def places() -> np.ndarray:
    """Inside the grid, at every knot, between the grid and the last knot, and beyond."""
    source = np.random.default_rng(0)
    inside = source.uniform(-EDGE, EDGE, 200)
    return np.concatenate([inside, KNOTS, source.uniform(-7, 7, 200), [-30.0, 30.0]])


@pytest.fixture(scope="module")
def spline():
    source = np.random.default_rng(1)
    return source.standard_normal(CHANNELS), source.standard_normal((CHANNELS, SPLINE_BASES))


@pytest.fixture(params=["cpu", "gpu"])
def machine(request, monkeypatch):
    """The machine whose form is computed."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)


def test_values_and_derivatives_are_scipy_s(spline, machine, x64):
    gain, coefficients = spline
    x = np.repeat(places()[:, None], CHANNELS, axis=1)
    exact = reference(coefficients)
    columns = np.arange(CHANNELS)
    value, slope = (np.nan_to_num(f(x))[:, columns, columns] for f in (exact, exact.derivative()))
    zero = jnp.zeros(CHANNELS)
    run = lambda x: spline_activation(x, zero, jnp.asarray(coefficients))  # noqa: E731
    actual, pull = jax.vjp(run, jnp.asarray(x))
    (tangent,) = pull(jnp.ones_like(actual))
    np.testing.assert_allclose(actual, value, rtol=0, atol=LOGITS["float64"])
    np.testing.assert_allclose(tangent, slope, rtol=0, atol=LOGITS["float64"])
    whole = spline_activation(jnp.asarray(x), jnp.asarray(gain), jnp.asarray(coefficients))
    silu = x / (1 + np.exp(-x))
    np.testing.assert_allclose(whole, gain * silu + value, rtol=0, atol=LOGITS["float64"])


def test_gradients_of_gain_and_coefficients(spline, machine, x64):
    gain, coefficients = map(jnp.asarray, spline)
    x = jnp.asarray(np.repeat(places()[:, None], CHANNELS, axis=1))
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(x.shape))
    loss = lambda g, c: (weight * spline_activation(x, g, c)).sum()  # noqa: E731
    by_gain, by_coefficient = jax.grad(loss, argnums=(0, 1))(gain, coefficients)
    # The derivative by coefficient i is the basis function itself.
    values = np.nan_to_num(reference(np.eye(SPLINE_BASES))(np.asarray(x)))
    exact = np.einsum("nf,nfi->fi", weight, values)
    np.testing.assert_allclose(
        by_coefficient, exact, rtol=LOGITS["float64"], atol=LOGITS["float64"]
    )
    np.testing.assert_allclose(
        by_gain, (weight * jax.nn.silu(x)).sum(axis=0), rtol=LOGITS["float64"]
    )


@pytest.mark.parametrize("length", [1, 7, 13, 64, 72, 520])
def test_sums_of_blocks(length, machine, x64):
    terms = np.random.default_rng(5).standard_normal((3, 2, length, CHANNELS))
    sums = sum_blocks([blocks(jnp.asarray(term)) for term in terms])
    np.testing.assert_allclose(sums, terms.sum(axis=(1, 2)), rtol=0, atol=LOGITS["float64"])


def attention_inputs():
    source = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(source.standard_normal(shape))  # noqa: E731
    return draw(2, 9, 4, 6), draw(2, 9, 2, 6), draw(2, 9, 2, 6), draw(4), draw(4)


def test_folded_attention_is_the_literal_formula(x64):
    q, k, v, gamma, beta = attention_inputs()
    patch_entropy = jnp.asarray(np.random.default_rng(4).uniform(0, 1, (2, 9)))
    mask = np.tri(9, dtype=bool)

    @jax.jit
    def folded(q, k, v, gamma, beta):
        return grouped_attention(*guide(q, k, patch_entropy, gamma, beta), v, mask)

    @jax.jit
    def literal(q, keys, values, gamma, beta):
        scores = jnp.einsum("btk,bsk->bts", q, keys) / 6**0.5
        scores = scores * (1 + gamma * patch_entropy[:, :, None]) + beta * patch_entropy[:, None, :]
        weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("bts,bsk->btk", weights, values)

    # One program for all heads: NumPy cuts them out.
    actual, (q, k, v, gamma, beta) = (
        jax.tree.map(np.asarray, x) for x in (folded(q, k, v, gamma, beta), (q, k, v, gamma, beta))
    )
    for head in range(4):
        keys, values = k[:, :, head // 2], v[:, :, head // 2]
        expected = np.asarray(literal(q[:, :, head], keys, values, gamma[head], beta[head]))
        difference = np.linalg.norm(actual[:, :, head] - expected) / np.linalg.norm(expected)
        assert difference <= LOGITS["float64"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_without_guidance_it_is_plain_attention_exactly(dtype, x64):
    q, k, v, _, _ = (x.astype(dtype) for x in attention_inputs())
    patch_entropy, zero = jnp.full((2, 9), 0.7, dtype), jnp.zeros(4, dtype)
    mask = np.tri(9, dtype=bool)
    guided = guide(q, k, patch_entropy, zero, zero)
    # Padded to the width of those: sums of another length may be taken in another order.
    more = ((0, 0),) * 3 + ((0, guided[0].shape[-1] - q.shape[-1]),)
    plain = grouped_attention(jnp.pad(q, more), jnp.pad(k, more), v, mask)
    np.testing.assert_array_equal(grouped_attention(*guided, v, mask), plain)
