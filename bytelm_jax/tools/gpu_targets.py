"""GPUs that this machine does not have, described for XLA, which then compiles for them.

JAX's CUDA plugin is a library that compiles without a GPU, if it is told what it would ask one for.
Kernels are then chosen by rules and not by measuring; memory depends on that little.
"""

import importlib.util
from typing import Any, NamedTuple

from bytelm_jax.tools.targets import Target

_PLUGINS = ("xla_cuda13", "xla_cuda12")
_HOST = 8
"""GPUs of one host."""


class _Facts(NamedTuple):
    """What XLA asks a GPU, by NVIDIA's data sheets and the CUDA programming guide."""

    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    units: int
    """Float32 units of each."""
    shared: int
    """Kibibytes of shared memory of each, of which a block may have all but one."""
    cache: int
    """Mebibytes of the second-level cache."""
    gigabytes_per_second: int
    gigahertz: float


_FACTS = {
    "A100": _Facts((8, 0), 108, 64, 164, 40, 2039, 1.41),
    "H100": _Facts((9, 0), 132, 128, 228, 50, 3352, 1.98),
    "H200": _Facts((9, 0), 132, 128, 228, 50, 4800, 1.98),
    "B200": _Facts((10, 0), 148, 128, 228, 126, 8000, 1.965),
}


def has_cuda_plugin() -> bool:
    """Whether JAX's CUDA plugin is installed (the extra `cuda`)."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.{name}") for name in _PLUGINS)


def gpu_devices(target: Target) -> list[Any]:
    """The GPUs of `target`, to compile for, eight to a host."""
    from jax.experimental import topologies

    hosts, rest = divmod(target.devices, _HOST)
    shape = f"1x1x{target.devices}" if rest or not hosts else f"1x{hosts}x{_HOST}"
    found = topologies.get_topology_desc(
        platform="cuda", topology=shape, target_config=_description(target)
    )
    return list(found.devices)


def _description(target: Target) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    facts = _FACTS[target.chip.name]
    major, minor = facts.capability
    return f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      core_count: {facts.cores}
      fpus_per_core: {facts.units}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: {2**16 - 1}
      block_dim_limit_z: {2**16 - 1}
      registers_per_core_limit: {2**16}
      registers_per_block_limit: {2**16}
      shared_memory_per_block: {48 * 2**10}
      shared_memory_per_block_optin: {(facts.shared - 1) * 2**10}
      shared_memory_per_core: {facts.shared * 2**10}
      l2_cache_size: {facts.cache * 2**20}
      memory_bandwidth: {facts.gigabytes_per_second * 10**9}
      clock_rate_ghz: {facts.gigahertz}
      device_memory_size: {target.chip.memory}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 12 minor: 8 }}
    device_description_str: "{target.chip.reported}"
    """
