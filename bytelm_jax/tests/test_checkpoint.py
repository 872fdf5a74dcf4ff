"""Fingerprints by their definition, the making of run folders, and damaged ones."""

import json
import os
import resource
import shutil
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from bytelm import runs
from bytelm.config import MegabyteConfig, Recipe, TrainConfig
from bytelm.runs import RunLock
from bytelm_jax.models import abstract_params
from bytelm_jax.training import checkpoint, fingerprints, loop
from bytelm_jax.training.manager import stored

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
    bad = [int(mark.non_finite) > 0 for mark in marks]
    assert bad == [True, True, True, False, False, False, False, True]


def test_a_mark_holds_no_copy_of_what_it_sums():
    leaf = jax.ShapeDtypeStruct((3, 500, 300), "float32")
    used: Any = fingerprints._mark.lower(leaf).compile().memory_analysis()
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
        restored = checkpoint.restore(manager, 0, params).params
    for name, value in params.items():
        np.testing.assert_array_equal(restored[name], value)


def test_a_run_of_parameters_that_would_not_be_restored_is_not_made(tmp_path):
    params = {"norm.scale": jax.numpy.ones(8, jax.numpy.bfloat16)}
    with pytest.raises(ValueError, match=r"^norm\.scale: dtype bfloat16; a run holds float32$"):
        checkpoint.create_run(tmp_path / "run", Recipe(name="made", model=MODEL), params)
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_written_is_one_line_about_its_folder(tmp_path):
    params = {"norm.scale": jax.numpy.arange(2.0**14)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(ValueError) as caught:
            checkpoint.create_run(tmp_path / "run", Recipe(name="made", model=MODEL), params)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    why = "cannot be written (File too large); choose another place or free space"
    assert str(caught.value) == f"{tmp_path / 'run'}: {why}"
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with checkpoints 0 and 1."""
    run = tmp_path_factory.mktemp("saved") / "run"
    random = np.random.default_rng(0)
    params = {
        name: jax.numpy.asarray(random.normal(size=leaf.shape), "float32")
        for name, leaf in abstract_params(MODEL).items()
    }
    recipe = Recipe(name="saved", model=MODEL)
    run.mkdir()
    runs.save_recipe(run, recipe)
    with checkpoint.open_checkpoints(run, TrainConfig(keep_last=2)) as manager:
        for step in (0, 1):
            checkpoint.save(manager, step, params, {"mean": params}, recipe, "", None)
        checkpoint.finish(manager)
    return run


def sparse(file):
    with open(file, "wb") as sink:
        sink.truncate(6 * 2**30)


def pipe(file):
    file.unlink()
    os.mkfifo(file)


def field(name, value):
    def change(file):
        tree = json.loads(file.read_text())
        (tree if name in tree else tree["model"])[name] = value
        file.write_text(json.dumps(tree).replace('"1e4000"', "9" * 4000))

    return change


@pytest.mark.parametrize(
    ("file", "damage", "why"),
    [
        ("config.json", sparse, "a JSON file of at most 16777216 was expected"),
        ("config.json", pipe, "not a plain file"),
        ("config.json", lambda file: file.write_text("[" * 10**5), "nested too"),
        ("config.json", field("max_length", "1e4000"), "max_length=9999"),
        ("config.json", field("global_layers", 10**6), "global_layers=1000000: must be at most"),
        ("config.json", field("global_layers", 4000), "different models"),
        ("_CHECKPOINT_METADATA", pipe, "not a plain file"),
        ("_CHECKPOINT_METADATA", sparse, "16777216 at most expected"),
        ("metadata", lambda file: file.write_text("{}"), "checkpoint 1 .*: step is missing"),
        ("metadata", lambda file: file.write_text("[]"), "checkpoint 1 .*: .* no object"),
        ("metadata", lambda file: file.write_text("[" * 10**5), "recursion|nested too"),
        ("metadata", field("fingerprints", {"params": 3}), "checkpoint 1 .*damaged"),
        ("metadata", field("metrics", [1]), "checkpoint 1 .*: metrics is missing or damaged"),
        ("metadata", sparse, "checkpoint 1 .*at most expected"),
        ("metadata", pipe, "checkpoint 1 .*not a plain file"),
    ],
)  # fmt: skip
def test_a_damaged_run_folder_is_refused_in_one_line(saved, file, damage, why, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    places = {"config.json": run, "metadata": run / "checkpoints" / "1" / "metadata"}
    damage(places.get(file, run / "checkpoints" / "1") / file)
    with pytest.raises(ValueError, match=why) as caught:
        checkpoint.load_run(run)
    assert "\n" not in str(caught.value)
    if file == "metadata":  # training sets it aside and continues from the one before
        params = abstract_params(MODEL)
        recovered = checkpoint.recover(run, params, {"mean": params})
        assert recovered and recovered.step == 0
        assert [path.name for path in (run / "damaged").iterdir()] == ["1"]


def test_a_checkpoint_that_is_removed_while_it_is_read(saved, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    read = checkpoint.read_metadata

    def removed_meanwhile(manager, step):
        if step == 1:
            shutil.rmtree(run / "checkpoints" / "1")
        return read(manager, step)

    monkeypatch.setattr(checkpoint, "read_metadata", removed_meanwhile)
    with pytest.raises(ValueError, match=r"^checkpoint=1: was removed while .* one of \[0\]$"):
        checkpoint.load_run(run, "1")
    shutil.copytree(saved / "checkpoints" / "1", run / "checkpoints" / "1")
    assert checkpoint.load_run(run)[2] == 0


def test_a_save_that_fails_meanwhile_hides_no_error(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "close", lambda _: 1 // 0)
        hidden = pytest.raises(ValueError, match=r"^was moved$")
        with hidden, loop.checkpoints_of(RunLock(tmp_path), TrainConfig()):
            raise ValueError("was moved")


def test_saving_leaves_alone_the_counter_by_which_processes_agree_on_an_end(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: bool(asked.append(step))
    )
    params = {"norm.scale": jax.numpy.ones(8)}
    with checkpoint.open_checkpoints(tmp_path, TrainConfig()) as manager:
        recipe = Recipe(name="saved", model=MODEL)
        checkpoint.save(manager, 5, params, {"mean": params}, recipe, "", None)
    assert asked == []


def test_late_reads_of_a_damaged_checkpoint_print_nothing(saved, monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    with checkpoint.open_checkpoints(saved):
        # What tensorstore's threads raise after Orbax has given up reading.
        for text in ("Event loop is closed", "another"):
            unraisable: Any = SimpleNamespace(exc_value=RuntimeError(text))
            sys.unraisablehook(unraisable)
        assert [str(each.exc_value) for each in printed] == ["another"]


class Older(NamedTuple):
    table: Any
    count: Any


class Newer(NamedTuple):
    table: Any
    count: Any
    later: Any = None


def test_a_state_that_has_gained_a_field_is_read_from_an_older_run(tmp_path):
    """Fields that are None by default are not stored while they are None."""
    state = {"agent": Older(jnp.arange(3.0), jnp.int32(7)), "rest": (jnp.ones(2), None)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "older", stored(state))
        checkpointer.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, state | {"agent": Newer(*state["agent"])})
        found = checkpointer.restore(tmp_path / "older", stored(like))
    for value, expected in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(value, expected)
    assert stored(like["agent"]._replace(later=3)).later == 3
