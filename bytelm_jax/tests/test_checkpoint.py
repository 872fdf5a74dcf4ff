"""Fingerprints by their definition, and how much memory a run folder takes to make."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bytelm.config import MegabyteConfig, Recipe
from bytelm_jax.training import checkpoint

MODEL = MegabyteConfig(patch_size=2, global_dim=4, local_dim=4, global_heads=1, local_heads=1)


def defined(array):
    """Σ bits_i · (2 i + 1) mod 2³², of two words an element where it has 64 bits."""
    size = array.dtype.itemsize
    bits = array.reshape(-1).view(f"u{size}").astype(np.uint64)
    odd = 2 * np.arange(bits.size, dtype=np.uint64) + 1
    words = [bits & 0xFFFFFFFF, bits >> 32] if size == 8 else [bits]
    total = 0
    for word in words:
        total = (total * 31 + int((word * odd % 2**32).sum())) % 2**32
    return total


@pytest.mark.parametrize("spec", [(), ("a", "b"), (None, ("a", "b"))])
def test_marks_are_those_defined_under_any_sharding(x64, spec):
    random = np.random.default_rng(0).normal(size=(8, 16, 3))
    dtypes = ("float32", "bfloat16", "float64", "int8", "bool")
    leaves = [random.astype(jax.numpy.dtype(dtype)) for dtype in dtypes]
    placed = NamedSharding(jax.make_mesh((4, 2), ("a", "b")), PartitionSpec(*spec))
    for leaf, bad in zip(leaves, ("nan", "inf", "-inf"), strict=False):
        leaf[7, 15, 2] = float(bad)
    small = [random[:0], np.float32(random[0, 0, 0]), np.float32("nan")]
    (marks,) = checkpoint.examine({"x": [*jax.device_put(leaves, placed), *small]}).values()
    assert [int(mark.fingerprint) for mark in marks] == [defined(leaf) for leaf in leaves + small]
    bad = [mark.non_finite > 0 for mark in marks]
    assert bad == [True, True, True, False, False, False, False, True]


def test_a_mark_holds_no_copy_of_what_it_sums():
    leaf = jax.ShapeDtypeStruct((3, 500, 300), "float32")
    used: Any = checkpoint._mark.lower(leaf).compile().memory_analysis()
    assert used.temp_size_in_bytes < used.argument_size_in_bytes / 50


def test_a_made_run_is_written_in_small_files_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FILE_BYTES", 2**18)
    random = np.random.default_rng(0)
    params = {
        "table.embedding": jax.device_put(random.normal(size=(2**12, 2**8)).astype("float32")),
        "norm.scale": jax.device_put(random.normal(size=8).astype("float32")),
    }
    checkpoint.create_run(tmp_path / "run", Recipe(name="made", model=MODEL), params)
    sizes = [f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file()]
    # Orbax closes a file once it has grown past the bound, by one piece of an array at most.
    assert sum(sizes) > 2**21 and max(sizes) <= 2 * 2**18
    with checkpoint.open_checkpoints(tmp_path / "run") as manager:
        restored, _, _ = checkpoint.restore(manager, 0, params)
    for name, value in params.items():
        np.testing.assert_array_equal(restored[name], value)


def test_a_run_of_parameters_that_would_not_be_restored_is_not_made(tmp_path):
    params = {"norm.scale": jax.numpy.ones(8, jax.numpy.bfloat16)}
    with pytest.raises(ValueError, match=r"^norm\.scale: dtype bfloat16; a run holds float32$"):
        checkpoint.create_run(tmp_path / "run", Recipe(name="made", model=MODEL), params)
    assert not (tmp_path / "run").exists()
