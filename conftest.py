"""Strict numerics for every test: set before JAX makes its first array."""

import gc
import os
import platform
from importlib.metadata import version
from pathlib import Path

# Eight devices, and compilation as cheap as it comes: the tests spend their time compiling tiny
# models. XLA's own passes are those of every run; the code of a loop comes from the older of its
# two emitters, and LLVM does not optimise it. Of a flag given twice XLA takes the last, so the
# caller's flags win. Processes that tests start inherit all of it.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    f"--xla_cpu_parallel_codegen_split_count=1 {os.environ.get('XLA_FLAGS', '')}"
)
# XLA ends a process that names a flag it does not have; from 0.11 on there is but one emitter. It
# also ends one whose eight devices do not meet in time, as they may not on two busy cores.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_use_fusion_emitters=false "
        f"--xla_cpu_collective_call_terminate_timeout_seconds=600 {os.environ['XLA_FLAGS']}"
    )
os.environ["OMP_NUM_THREADS"] = os.environ.get("BYTELM_TEST_THREADS", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or torch would take a GPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # commands would fill the user's cache folder

import jax
import pytest
import torch
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

from parity_tests import shapes

# Shapes in annotations are enforced here and nowhere else, by beartype. Modules imported before the
# hook would escape it, so it comes before any test imports bytelm.
shapes.install()
CHECKED = ["bytelm.data", "bytelm.inspection", "bytelm_jax", "bytelm_torch"]
install_import_hook(CHECKED, f"{shapes.__name__}.checked")

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Traces are millions of small objects that live on: looking through them as often as Python usually
# does takes a twentieth of the time.
gc.set_threshold(200_000, 20, 50)


def processor() -> str:
    """The processor's name and, of x86, its widest vectors."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    vectors = [x for x in ("avx512f", "avx2", "avx", "sse4_2") if x in fields.get("flags", "")]
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({vectors[0]})" if vectors else name


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session):
    """Shows what figures depend on, under -q as well, which silences `pytest_report_header`."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:  # a worker of pytest-xdist has none
        reporter.write_line(f"processor: {processor()}")
        reporter.write_line(f"threads of torch: {torch.get_num_threads()}")
        reporter.write_line(f"XLA_FLAGS: {os.environ['XLA_FLAGS']}")


@pytest.fixture
def x64():
    """float64 in JAX, for the tests whose verdict is in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compilation():
    """For files whose programs run for milliseconds and compile for seconds."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """For files whose runs are of few programs, whose compilation would be most of the time."""
    options = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for values in (options, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is options:
            yield
