"""Steps with one layer in each stack, compiled by the TPU's own compiler.

Slow, and skipped without libtpu. libtpu is no part of the extra `test`: its wheel has 203 MB, 693
unpacked, and every job of CI would fetch it for these tests, whose processor time (a minute and a
half for the first, five for the second) is above what default tests may take. CI's nightly job
installs the extra `aot` beside `test` and runs them.
"""

import json
import os
import subprocess
import sys

import pytest

from bytelm import recipes
from bytelm_jax.tools.compiled import ENVIRONMENT

PROGRAM = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("tpu_compile", "scripts/check/tpu_compile.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
depth = dict.fromkeys(script.stacks(script.recipes.get(sys.argv[1]).model), 1)
cell = {"name": sys.argv[1], "form": sys.argv[2], "fsdp": 1, "rows": 1, "target": "v5e:16x16"}
print(json.dumps(script.one_depth(cell | {"effort": -1.0}, depth)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "form"),
    [("megabyte_132m", "jit"), ("transformer_132m", "shard_map"), ("lfbyte_130m", "jit"),
     ("blt_132m", "jit"), ("entropy_100m", "shard_map")],
)  # fmt: skip
def test_a_layer_compiles_for_a_pod_and_does_no_more_than_the_models_work(recipe, form):
    pytest.importorskip("libtpu")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, recipe, form],
        env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["arguments"] + found["temporaries"] < 16 * 2**30
    # LFByte did 3.7 to 11.9 times its own work before its rows were routed within each device.
    work = found["products"] + found["kernels"] + found["elementwise"]
    assert 0.5 < work / found["executed_flops"] < 1.4
    assert found["all-reduce"] > 0 and not found["all-to-all"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v7:2x2x1"])
def test_small_recipes_compile_for_every_generation(target, tmp_path):
    """Memory, work and collectives are looked at for v5e above; here it is that they compile."""
    pytest.importorskip("libtpu")
    names = [name for name in recipes.names() if name.endswith("_tiny")]
    options = ["--shallow", "--forms", "jit", "--fsdp", "4", "--rows", "1", "--effort", "-1"]
    options += ["--target", target, "--lines", str(tmp_path / "lines")]
    command = [sys.executable, "scripts/check/tpu_compile.py", *names, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    lines = (tmp_path / "lines").read_text().splitlines()
    found = {line["cell"]["name"]: line for line in map(json.loads, lines)}
    assert found.keys() == set(names), done.stdout[-2000:]
    assert all(line["products"] and line["all-gather"] for line in found.values())
