"""The long convolution: equal to the plain sum, exactly causal, wide sums, the same by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bytelm import tolerances
from bytelm_jax.kernels.convolution import long_convolution, toeplitz
from bytelm_jax.kernels.rows import split_rows
from bytelm_jax.layers.long_convolution import LongConvolution
from bytelm_jax.parity.report import relative_error
from bytelm_jax.tools.collectives import read_collectives
from bytelm_jax.training import mesh as meshes

CHUNK = 64
MACHINES = ["cpu", "gpu"]  # by transforms, and where the filter is short directly


@pytest.fixture
def convolve(request, monkeypatch):
    """`long_convolution` in the form of the machine named by the parameter."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return jax.jit(lambda *arguments: long_convolution(*arguments), static_argnums=2)


def plain_sum(x, taps):
    """y[t] = Σ_j taps[j] x[t − j], term by term in float64."""
    x, taps = np.asarray(x, np.float64), np.asarray(taps, np.float64)
    total, length = np.zeros_like(x), x.shape[1]
    for j in range(min(len(taps), length)):
        total[:, j:] += taps[j] * x[:, : length - j]
    return total


def random(rows, length, taps, dim=2):
    source = np.random.default_rng(length + taps)
    return source.standard_normal((rows, length, dim)), source.standard_normal((taps, dim))


@pytest.mark.parametrize(
    ("convolve", "length", "taps"),
    [
        *(("cpu", length, length) for length in (1, 7, 65, 1000, 8191, 8192)),
        *(("cpu", 300, taps) for taps in (65, 66, 500)),
        *(("gpu", length, length) for length in (1, 7, 65)),
        *(("gpu", 301, taps) for taps in (1, 64, 65, 66, 500)),
        *((machine, 8000, 257) for machine in MACHINES),
    ],
    indirect=["convolve"],
)
def test_equals_the_plain_sum(convolve, length, taps, x64):
    x, filters = random(1, length, taps)
    error = relative_error(np.asarray(convolve(x, filters, CHUNK)), plain_sum(x, filters))
    assert error <= tolerances.LOGITS["float64"]


@pytest.mark.parametrize(
    ("convolve", "transforms"), [("cpu", 1), ("gpu", 0)], indirect=["convolve"]
)
def test_long_filters_take_transforms_on_every_machine(convolve, transforms):
    x, longest = jnp.ones((1, 200, 2)), 8 * 16 + 1  # chunks that a direct product reaches back
    for taps, expected in ((longest, bool(transforms)), (longest + 1, True)):
        jaxpr = jax.make_jaxpr(convolve, static_argnums=2)(x, jnp.ones((taps, 2)), 16)
        assert ("fft" in str(jaxpr)) == expected


@pytest.mark.parametrize("convolve", MACHINES, indirect=True)
def test_gradients_equal_those_of_the_plain_sum(convolve, x64):
    x, taps = random(2, 150, 100)
    weights = np.random.default_rng(1).standard_normal(x.shape)

    def weighed(x, taps):
        return (weights * convolve(x, taps, 16)).sum()

    to_x, to_taps = jax.jit(jax.grad(weighed, (0, 1)))(x, taps)
    # Both gradients are correlations: with the filter turned round, and with the input.
    reversed_sum = plain_sum(weights[:, ::-1], taps)[:, ::-1]
    lags = [(weights[:, j:] * x[:, : x.shape[1] - j]).sum((0, 1)) for j in range(len(taps))]
    assert relative_error(np.asarray(to_x), reversed_sum) <= tolerances.GRADIENTS["float64"]
    assert relative_error(np.asarray(to_taps), np.stack(lags)) <= tolerances.GRADIENTS["float64"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("convolve", MACHINES, indirect=True)
def test_exactly_causal_and_by_row(convolve, dtype):
    with jax.enable_x64(dtype == "float64"):
        x, taps = (values.astype(jnp.dtype(dtype)) for values in random(3, 150, 100))

        def run(x):
            return np.asarray(convolve(x, taps, 16), np.float64)

        before = run(x)
        for position in (0, 1, 15, 16, 17, 32, 77, 128, 149):
            changed = x.copy()
            changed[:, position:] = 1000 * x[:, ::-1][:, position:]
            after = run(changed)
            np.testing.assert_array_equal(after[:, :position], before[:, :position])
            assert (after[:, position] != before[:, position]).all()
        neighbours = x.copy()
        neighbours[1:] = 1000 * x[:-1]
        np.testing.assert_array_equal(run(neighbours)[0], before[0])
        if dtype != "bfloat16":
            assert relative_error(run(x[::-1])[::-1], before) <= tolerances.OTHER_PLACE[dtype]


@pytest.mark.parametrize("convolve", MACHINES, indirect=True)
def test_bfloat16_sums_in_float32(convolve):
    # Sums of ones: bfloat16 holds no odd number past 256, so a narrow sum would stall there.
    length = 3000
    ones = jnp.ones((1, length, 1), jnp.bfloat16)
    exact = np.arange(1, length + 1)
    actual = np.asarray(convolve(ones, ones[0], 512).astype("float32"))[0, :, 0]
    assert (np.abs(actual - exact) <= float(jnp.finfo(jnp.bfloat16).eps) / 2 * exact).all()

    layer = LongConvolution(1, length, CHUNK, rngs=nnx.Rngs(0))
    layer.taps = nnx.Param(ones[0])
    past = np.ones_like(layer.empty_past(1, length, ones.dtype))
    last, _ = jax.jit(layer.extend)(ones[:, :1], past, jnp.zeros(1, jnp.int32))
    assert abs(float(last[0, 0, 0]) - length) <= float(jnp.finfo(jnp.bfloat16).eps) / 2 * length


@pytest.mark.parametrize("taps", [5, 40])
def test_position_by_position(taps, x64):
    length, prefilled, true = 23, 16, 9
    layer = LongConvolution(3, taps, 4, rngs=nnx.Rngs(1))
    layer.taps = nnx.Param(layer.taps[...].astype("float64"))
    x = np.random.default_rng(2).standard_normal((2, length, 3))
    whole = plain_sum(x, layer.taps[...])
    past = layer.empty_past(2, length, x.dtype)
    assert past.shape == (2, length + min(length, taps) - 1, 3)
    # The prefill runs past the true prompt; what it leaves there must not count.
    prompt = x[:, :prefilled].copy()
    prompt[:, true:] = 1e3
    extend = jax.jit(layer.extend)
    prefix, past = extend(prompt, past, None)
    steps = [np.asarray(prefix)[:, :true]]
    for t in range(true, length):
        y, past = extend(x[:, t : t + 1], past, jnp.full(2, t, jnp.int32))
        steps.append(np.asarray(y))
    error = relative_error(np.concatenate(steps, axis=1), whole)
    assert error <= tolerances.LOGITS["float64"]


@pytest.mark.parametrize("machine", MACHINES)
def test_devices_exchange_a_gradient_a_tap(machine, monkeypatch):
    """And not one of every place at which a tap stands in the matrices that products take."""
    monkeypatch.setattr(jax, "default_backend", lambda: machine)
    mesh = meshes.make_mesh(4)
    x, taps = random(4, 100, 40)

    def total(taps, x):
        with split_rows(mesh, meshes.ROWS):
            return jnp.sum(long_convolution(x, taps, 16) ** 2)

    step = jax.jit(jax.grad(total), in_shardings=(None, meshes.batch_sharding(mesh)))
    text = step.lower(jnp.float32(taps), jnp.float32(x)).compile().as_text()
    (reduced,) = read_collectives(text or "", mesh.size)
    assert (reduced.kind, reduced.bytes) == ("all-reduce", 4 * taps.size)


def test_toeplitz_matrix():
    actual = toeplitz(jnp.array([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 0]]), 4)
    np.testing.assert_array_equal(
        actual[0], [[1, 2, 3, 4], [0, 1, 2, 3], [0, 0, 1, 2], [0, 0, 0, 1]]
    )
    short = toeplitz(jnp.array([[1.0, 2]]), 3)
    np.testing.assert_array_equal(short[0], [[1, 2, 0], [0, 1, 2], [0, 0, 1]])
    reaching = toeplitz(jnp.array([[1.0, 2, 3, 4]]), 2, 4)
    np.testing.assert_array_equal(reaching[0], [[0, 0], [4, 0], [3, 4], [2, 3], [1, 2], [0, 1]])
