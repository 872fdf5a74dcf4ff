"""The TPU's grouped product, by Pallas' interpreter on a CPU, against one product per group."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm import tolerances
from bytelm_jax.kernels import grouped_matmul
from bytelm_jax.kernels.backend import compiling_for
from bytelm_jax.kernels.megablox import tile_rows, tiled_matmul
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import mesh as meshes


class _Device(NamedTuple):
    platform: str


@pytest.mark.parametrize("split", [False, True], ids=["alone", "shard_map"])
@pytest.mark.parametrize("sizes", [[100, 0, 29, 127], [0, 0, 256, 0], [1, 255, 0, 0]])
def test_it_is_one_product_per_group_with_its_gradients(sizes, split):
    source = np.random.default_rng(0)
    x, kernels, weights = (
        source.normal(size=shape).astype(np.float32) for shape in ((256, 24), (4, 24, 8), (256, 8))
    )
    product = partial(tiled_matmul, interpret=True)

    def run(x, kernels, sizes, weights):
        out, pull = jax.vjp(lambda x, kernels: product(x, kernels, sizes), x, kernels)
        return (out, *pull(weights))

    counts = jnp.asarray(sizes, jnp.int32)
    if split:  # each of two devices has all rows, so that the kernels' gradients add up to twice
        mesh, rows = meshes.make_mesh(2), jax.P(meshes.ROWS)
        both = jax.shard_map(
            run, mesh=mesh, in_specs=(rows, jax.P(), jax.P(), rows), out_specs=(rows, rows, jax.P())
        )
        twice = (np.concatenate([each, each]) for each in (x, weights))
        x2, w2 = twice
        out, to_x, to_kernels = jax.device_get(jax.jit(both)(x2, kernels, counts, w2))
        np.testing.assert_array_equal(out[:256], out[256:])
        ours = out[:256], to_x[:256], to_kernels / 2
    else:
        ours = jax.device_get(jax.jit(run)(x, kernels, counts, weights))
    group = np.repeat(np.arange(4), sizes)
    hot = np.eye(4, dtype=np.float64)[group]
    theirs = (
        np.einsum("mi,mio->mo", x, kernels[group].astype(np.float64)),
        np.einsum("mo,mio->mi", weights, kernels[group].astype(np.float64)),
        np.einsum("mg,mi,mo->gio", hot, x, weights),
    )
    bounds = [tolerances.LOGITS["float32"], *[tolerances.GRADIENTS["float32"]] * 2]
    for mine, other, bound in zip(ours, theirs, bounds, strict=True):
        assert np.isfinite(mine).all() and relative_error(mine, other) <= bound


@pytest.mark.parametrize(
    ("platform", "rows", "dtype", "tiled"),
    [("tpu", 256, "bfloat16", True), ("tpu", 200, "bfloat16", False),
     ("tpu", 256, "float32", False), ("cpu", 256, "bfloat16", False)],
)  # fmt: skip
def test_where_it_is_chosen(platform, rows, dtype, tiled, monkeypatch):
    asked, real = [], jax.lax.ragged_dot
    monkeypatch.setattr(grouped_matmul, "tiled_matmul", lambda *a: [asked.append(1), real(*a)][1])

    def run(x, kernels, group):
        groups = grouped_matmul.make_groups(group, 4)
        return grouped_matmul.grouped_matmul(x, kernels, groups)

    shapes = (rows, 8), (4, 8, 16)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    with compiling_for(_Device(platform)):
        out = jax.eval_shape(run, *arrays, jax.ShapeDtypeStruct((rows,), jnp.int32))
    assert out.shape == (rows, 16) and bool(asked) == tiled


@pytest.mark.parametrize(
    ("rows", "groups", "tile"), [(128, 4, 128), (65536, 8, 512), (65536, 48, 128), (640, 1, 128)]
)
def test_tiles_divide_the_rows_and_are_small_beside_a_group(rows, groups, tile):
    assert tile_rows(rows, groups) == tile and rows % tile == 0
