"""The TPU's fused attention, by Pallas' interpreter on a CPU, against the written-out one."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm import tolerances
from bytelm_jax.kernels import attention
from bytelm_jax.kernels.backend import compiling_for
from bytelm_jax.kernels.rows import split_rows
from bytelm_jax.kernels.splash_attention import splash_attention
from bytelm_jax.layers.grouped_attention import causal_attention, grouped_attention
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import mesh as meshes


class _Device(NamedTuple):
    platform: str


def pulled(function):
    """`function` of q, k, v, and its gradients by a given one of its output."""

    def run(q, k, v, gradient):
        out, pull = jax.vjp(function, q, k, v)
        return (out, *pull(gradient))

    return run


def inputs(length, heads, groups, wide, width):
    source = np.random.default_rng(length + heads)
    shapes = ((heads, wide), (groups, wide), (groups, width), (heads, width))
    return [jnp.asarray(source.normal(size=(2, length, *s)), jnp.float32) for s in shapes]


@pytest.mark.parametrize(
    ("form", "length", "heads", "groups", "wide", "width", "window"),
    [
        ("alone", 129, 2, 1, 8, 8, 0),  # multi-query; the last block is filled up
        ("alone", 256, 2, 2, 8, 8, 500),  # a window longer than the text
        ("jit", 200, 4, 2, 24, 16, 70),  # grouped, with the features of `guide`, in a window
        ("shard_map", 129, 2, 1, 8, 8, 0),
        ("remat", 129, 2, 1, 8, 8, 0),
        ("tensor", 129, 4, 1, 8, 8, 0),  # the one key and value head is every device's
        ("tensor", 200, 4, 2, 24, 16, 70),
    ],
)
def test_it_is_the_written_out_attention_with_its_gradients(
    form, length, heads, groups, wide, width, window
):
    *arrays, weights = inputs(length, heads, groups, wide, width)
    mesh = meshes.make_mesh(4, 1, 2) if form == "tensor" else meshes.make_mesh(2)
    fused = pulled(partial(splash_attention, window=window, interpret=True))
    if form == "remat":
        fused = pulled(jax.checkpoint(partial(splash_attention, window=window, interpret=True)))
    if form == "shard_map":
        rows = jax.P(meshes.ROWS)
        fused = jax.shard_map(fused, mesh=mesh, in_specs=rows, out_specs=rows)

    def run(*arrays):
        if form == "tensor":
            with meshes.layers_on(mesh):
                return fused(*arrays)
        if form != "jit":
            return fused(*arrays)
        with split_rows(mesh, meshes.ROWS):
            return fused(*arrays)

    ahead = np.arange(length)[:, None] - np.arange(length)[None, :]
    mask = (ahead >= 0) & (ahead < (window or length))
    plain = pulled(lambda q, k, v: grouped_attention(q, k, v, mask))
    arrays.append(weights)
    ours, theirs = jax.device_get((jax.jit(run)(*arrays), plain(*arrays)))
    bounds = [tolerances.LOGITS["float32"], *[tolerances.GRADIENTS["float32"]] * 3]
    for mine, other, bound in zip(ours, theirs, bounds, strict=True):
        assert relative_error(mine, other) <= bound


def test_it_never_sees_the_future():
    q, k, v, _ = inputs(256, 2, 1, 16, 16)
    run = jax.jit(partial(splash_attention, window=0, interpret=True))
    before, after = run(q, k, v), run(q, k.at[:, 200:].add(1), v.at[:, 200:].add(1e6))
    np.testing.assert_array_equal(before[:, :200], after[:, :200])
    assert not np.array_equal(before[:, 200:], after[:, 200:])


@pytest.mark.parametrize(
    ("platform", "length", "dtype", "fused"),
    [("tpu", 256, "bfloat16", True), ("tpu", 255, "bfloat16", False),
     ("tpu", 256, "float32", False), ("cpu", 256, "bfloat16", False)],
)  # fmt: skip
def test_where_it_is_chosen(platform, length, dtype, fused, monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "splash_attention", lambda q, *_: [asked.append(1), q][1])
    q, k, v = (jax.ShapeDtypeStruct((1, length, 2, 16), dtype) for _ in range(3))
    with compiling_for(_Device(platform)):
        out = jax.eval_shape(lambda q, k, v: causal_attention(q, k, v, 0), q, k, v)
    assert out.shape == q.shape and bool(asked) == fused
