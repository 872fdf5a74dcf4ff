"""The suite has teeth: each planted bug makes a test of the suite fail, run through pytest.

A copy of the packages and tests gets a line or a few changed; pytest runs there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

from parity_tests.cases import quick

ROOT = Path(__file__).parent.parent
MEGABYTE, TRAINING = "parity_tests/test_megabyte.py", "parity_tests/test_training.py"
LAYERS = f"{MEGABYTE}::test_layers_logits_loss_gradients_and_generation[float64-paper]"
CAUSAL = f"{MEGABYTE}::test_no_logit_sees_its_own_byte_or_a_later_one"

BUGS = {
    "gelu is the tanh form": (
        "bytelm_jax/kernels/gelu.py",
        {"approximate=False": "approximate=True"},
        LAYERS,
    ),
    "wrong eps": (
        "bytelm_jax/kernels/normalization.py",
        {"variance + EPSILON": "variance + 1e-6"},
        LAYERS,
    ),
    "square kernels are not transposed": (
        "bytelm_jax/interop/convert.py",
        {
            "if leaf_kind(name).transposed else array": "if leaf_kind(name).transposed "
            "and array.shape[0] != array.shape[1] else array"
        },
        LAYERS,
    ),
    "patch shift off by one byte": (
        "bytelm_jax/models/megabyte.py",
        {
            "self.global_input(self.shift(patches, axis=1), 0), fold_rows": "self.global_input("
            "self.shift(padded, axis=1).reshape(patches.shape), 0), fold_rows"
        },
        f"{CAUSAL}[paper-float64]",
    ),
    # Under shard_map the gradient of a replicated parameter arrives summed over the devices;
    # averaging it afterwards leaves it as many times too large as there are devices.
    "gradients averaged instead of the loss": (
        "bytelm_jax/training/step.py",
        {
            "by_source = form.over_devices(": "by_source = tuple(",
            "jnp.maximum(form.over_devices(jnp.sum(counted)), 1)": "jnp.sum(counted)",
            "report = {k: v / form.total_rows for k, v in metrics.items()} | "
            '{"loss": nats / count}': (
                'report = {"loss": form.over_devices(loss) * batch.ids.shape[0] / form.total_rows}'
            ),
            "return (loss, report), gradients": 'return (report["loss"], report), jax.tree.map('
            "lambda x: form.over_devices(x) * batch.ids.shape[0] / form.total_rows, gradients)",
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
        "bytelm_jax/models/patching.py",
        {"PatchPlan(patch_of, capped[:, 1:] - 1,": "PatchPlan(patch_of, capped[:, :-1],"},
        "parity_tests/test_blt.py::test_a_changed_future_changes_nothing[fixed]",
    ),
    "one future byte leaks": (
        "bytelm_jax/models/megabyte.py",
        {
            "self.shift(patches, axis=2)\n        hidden": "patches\n        hidden",
        },
        f"{CAUSAL}[paper-float64]",
    ),
}


# Importing takes longer than a test: one process imports what is not ours, and each bug gets a fork
# of it, before JAX has started any thread.
SERVER = """
import os, signal, sys
import flax.nnx, jax, optax, orbax.checkpoint, pytest, torch
for node in sys.stdin:
    child = os.fork()
    if not child:
        signal.alarm(300)
        sys.stdout = sys.stderr = open("output", "w")
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        status = pytest.main(["-x", "-p", "no:cacheprovider", node.strip()])
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# Shapes in annotations are no matter here; checking them doubles what importing takes.
HOOK = 'install_import_hook(CHECKED, f"{shapes.__name__}.checked")\n'


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    for name in ("bytelm", "bytelm_jax", "bytelm_torch", "parity_tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    conftest = (ROOT / "conftest.py").read_text()
    assert HOOK in conftest
    (folder / "conftest.py").write_text(conftest.replace(HOOK, ""))
    return folder


@pytest.fixture(scope="module")
def run_suite(copy):
    """A function that runs one test in the copy: its exit status, and what pytest printed."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    with subprocess.Popen(
        command, cwd=copy, env=environment, stdin=PIPE, stdout=PIPE, text=True
    ) as server:
        assert server.stdin and server.stdout
        requests, replies = server.stdin, server.stdout

        def run(node):
            requests.write(node + "\n")
            requests.flush()
            return int(replies.readline()), (copy / "output").read_text()

        yield run


@pytest.mark.parametrize(
    "bug",
    quick(
        BUGS,
        "square kernels are not transposed",
        "gradients averaged instead of the loss",
        "the decoder reads the patch that is still open",
        "one future byte leaks",
    ),
)
def test_a_planted_bug_makes_a_test_fail(bug, copy, run_suite):
    path, changes, node = BUGS[bug]
    source = changed = (copy / path).read_text()
    for right, wrong in changes.items():
        assert changed.count(right) == 1, f"{path} no longer has what {bug!r} changes: {right}"
        changed = changed.replace(right, wrong)
    (copy / path).write_text(changed)
    try:
        status, output = run_suite(node)
    finally:
        (copy / path).write_text(source)
    assert status == 1, output
    assert "1 failed" in output
    # The numbers differ: the bug was not refused on the way, say as a type error.
    assert "AssertionError" in output or "E       assert" in output, output


def test_without_a_bug_the_same_tests_pass(run_suite):
    # What shows that the failures above come from the bugs and not from the copy.
    status, output = run_suite(f"{CAUSAL}[paper-float64]")
    assert status == 0, output
