"""The suite has teeth: each planted bug makes a test of the suite fail, run through pytest.

A copy of the packages and tests gets a line or a few changed; pytest runs there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEGABYTE, TRAINING = "parity_tests/test_megabyte.py", "parity_tests/test_training.py"
LAYERS = f"{MEGABYTE}::test_layers_logits_loss_gradients_and_generation[float64-paper]"
CAUSAL = f"{MEGABYTE}::test_no_logit_sees_its_own_byte_or_a_later_one"

BUGS = {
    "gelu is the tanh form": (
        "bytelm_jax/layers/feedforward.py",
        {"approximate=False": "approximate=True"},
        LAYERS,
    ),
    "wrong eps": ("bytelm_jax/layers/norm.py", {"variance + 1e-5": "variance + 1e-6"}, LAYERS),
    "square kernels are not transposed": (
        "bytelm_jax/convert.py",
        {
            "if _kind(name)[1] else array": "if _kind(name)[1] "
            "and array.shape[0] != array.shape[1] else array"
        },
        LAYERS,
    ),
    "patch shift off by one byte": (
        "bytelm_jax/models/megabyte.py",
        {
            "self._global_input(self._shift(patches, axis=1), 0), fold_rows": "self._global_input("
            "self._shift(padded, axis=1).reshape(patches.shape), 0), fold_rows"
        },
        f"{CAUSAL}[paper-float64]",
    ),
    # Under shard_map the gradient of a replicated parameter arrives summed over the devices;
    # averaging it afterwards leaves it as many times too large as there are devices.
    "gradients averaged instead of the loss": (
        "bytelm_jax/parallel.py",
        {
            "nats, extra, metrics = over_devices(": "nats, extra, metrics = tuple(",
            "jnp.maximum(over_devices(jnp.sum(ids != pad_id)), 1)": "jnp.sum(ids != pad_id)",
            "gradients = total": "gradients = jax.tree.map("
            "lambda x: over_devices(x) / mesh.size, total)",
            '{"loss": nats / count,': '{"loss": loss,',
        },
        f"{TRAINING}::test_devices_step_forms_accumulation_and_remat_change_nothing"
        "[devices=8 parallel=shard_map]",
    ),
    "a 64-bit hash loses the carry between its halves": (
        "bytelm_jax/layers/ngram.py",
        {"more_high + (low < more_low).astype(jnp.uint32)": "more_high"},
        "parity_tests/test_ngram.py::test_order_of_tables",
    ),
    "the decoder reads the patch that is still open": (
        "bytelm_jax/patching.py",
        {"PatchPlan(patch_of, capped[:, 1:] - 1,": "PatchPlan(patch_of, capped[:, :-1],"},
        "parity_tests/test_blt.py::test_a_changed_future_changes_nothing[fixed]",
    ),
    "one future byte leaks": (
        "bytelm_jax/models/megabyte.py",
        {
            "self._shift(patches, axis=2)\n        hidden": "patches\n        hidden",
        },
        f"{CAUSAL}[paper-float64]",
    ),
}


def run_suite(folder: Path, node: str) -> subprocess.CompletedProcess[str]:
    """One test in a copy of the project; killed when it hangs."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", node]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    for name in ("bytelm_jax", "bytelm_torch", "parity_tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_makes_a_test_fail(bug, copy):
    path, changes, node = BUGS[bug]
    source = changed = (copy / path).read_text()
    for right, wrong in changes.items():
        assert changed.count(right) == 1, f"{path} no longer has what {bug!r} changes: {right}"
        changed = changed.replace(right, wrong)
    (copy / path).write_text(changed)
    try:
        done = run_suite(copy, node)
    finally:
        (copy / path).write_text(source)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    # The numbers differ: the bug was not refused on the way, say as a type error.
    assert "AssertionError" in done.stdout or "E       assert" in done.stdout, done.stdout


def test_without_a_bug_the_same_tests_pass(copy):
    # What shows that the failures above come from the bugs and not from the copy.
    done = run_suite(copy, f"{CAUSAL}[paper-float64]")
    assert done.returncode == 0, done.stdout + done.stderr
