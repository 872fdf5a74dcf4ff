"""What keeps the last bits of a compiled program's results the same in another process."""

import hashlib
import os
from importlib.metadata import version
from typing import Any

import jax

import bytelm
from bytelm.compression.container import short
from bytelm.compression.machine import instruction_set, processors
from bytelm_jax.kernels.backend import backend

_PRECISION = "jax_default_matmul_precision"  # unknown to type checkers, as all of JAX' options


def pinned_options() -> dict[str, Any]:
    """Options for `jax.jit(compiler_options=…)`: no choice is left to timing.

    On a GPU, XLA would measure which of several kernels is fastest, and another process could
    choose another.
    """
    if backend() != "gpu":
        return {}
    return {"xla_gpu_autotune_level": 0, "xla_gpu_deterministic_ops": True}


def describe_machine() -> dict[str, str]:
    """All that the arithmetic of a compiled program depends on beside the program itself."""
    device = jax.local_devices()[0]
    machine = {
        "backend": f"jax {jax.__version__}",
        "jaxlib": version("jaxlib"),
        "bytelm": bytelm.__version__,
        "device": short(device.device_kind),
    }
    if backend() == "cpu":
        machine |= {"cpu": instruction_set(), "threads": str(processors())}
    else:
        machine["platform"] = short(device.client.platform_version)
    return machine | {"settings": _settings()}


def _settings() -> str:
    precision = getattr(jax.config, _PRECISION) or "default"
    flags = os.environ.get("XLA_FLAGS", "").strip()
    digest = hashlib.blake2b(flags.encode(), digest_size=4).hexdigest() if flags else "none"
    return f"{precision}, XLA_FLAGS {digest}"
