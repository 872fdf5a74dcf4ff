"""A train step compiled for TPUs or GPUs by their own compilers, on a machine that has none.

`libtpu` and JAX's CUDA plugin are libraries. The figures are of one device: the memory that the
program needs, its operations, its collectives and the bytes that the layouts of its arrays add.
"""

import importlib.util
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from bytelm_jax.tools.collectives import (
    Collective,
    computations,
    read_collectives,
    run_counts,
)
from bytelm_jax.tools.gpu_targets import gpu_devices, has_cuda_plugin
from bytelm_jax.tools.targets import Target
from bytelm_jax.tools.work import Work, read_work
from bytelm_jax.training import mesh as meshes

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""What libtpu needs where there is no TPU: it asks no metadata server, and no lock keeps it out."""


class Compiled(NamedTuple):
    """A compiled step, by its compiler's own figures. Bytes and operations are of one device."""

    arguments: int
    """Bytes of the state and the batch."""
    temporaries: int
    program: int
    work: Work
    written: int
    """Bytes that the program's operations write, as their shapes say."""
    padding: int
    """Bytes that layouts add to them: whole tiles of 8 × 128 numbers, say."""
    collectives: list[Collective]
    in_use: int
    """Bytes of `peak` that are ever in use at once; the rest are holes between temporaries."""

    @property
    def peak(self) -> int:
        """Bytes that the step needs; its results take the place of its arguments."""
        return self.arguments + self.temporaries + self.program


def has_libtpu() -> bool:
    """Whether the TPU's compiler is installed (the extra `aot`)."""
    return importlib.util.find_spec("libtpu") is not None


def has_compiler(platform: str) -> bool:
    """Whether the compiler of this platform, "tpu" or "gpu", is installed."""
    return {"tpu": has_libtpu, "gpu": has_cuda_plugin}[platform]()


def slice_devices(chip: str, shape: str, slices: int = 1) -> list[Any]:
    """The devices of slices that this machine does not have: `chip` as in `TOPOLOGIES`, 4x4, say.

    This process needs libtpu and its `ENVIRONMENT`.
    """
    from jax.experimental import topologies

    name = {"v7": "tpu7x"}.get(chip, chip)
    # The two cores of a v4 chip work as one device.
    more: dict[str, Any] = {"chip_config_name": "megacore"} if chip == "v4" else {}
    more |= {"num_slices": slices} if slices > 1 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{shape}", **more)
    return list(found.devices)


def topology_mesh(target: Target, fsdp: int, tensor: int = 1) -> Mesh:
    """A mesh over devices that this machine does not have."""
    described = {"tpu": lambda to: slice_devices(to.chip.name, to.shape), "gpu": gpu_devices}
    devices = described[target.chip.platform](target)
    return meshes.make_mesh(0, fsdp, tensor, devices=devices)


def compile_lowered(lowered: Any, devices: int, options: Any = None) -> Compiled | None:
    """Compiles a lowered step; None if the compiler says that the device has too little memory."""
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return None
        raise
    memory, text = compiled.memory_analysis(), compiled.as_text()
    written, padding = padded_bytes(text)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(
        arguments=memory.argument_size_in_bytes + max(outputs, 0),
        temporaries=memory.temp_size_in_bytes,
        program=memory.generated_code_size_in_bytes,
        work=read_work(text, (compiled.cost_analysis() or {}).get("flops", 0.0)),
        written=written,
        padding=padding,
        collectives=read_collectives(text, devices),
        in_use=memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
    )


_RESULT = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\(")
_TILED = re.compile(r"\b(pred|bf16|[a-z]+\d+)\[([\d,]*)\]\{([\d,]*)(?::T\((\d+(?:,\d+)?)\))?")
_NO_WRITE = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant"}
_FUSED = re.compile(r"\b(?:calls|to_apply)=%?([\w.-]+)")


def padded_bytes(text: str) -> tuple[int, int]:
    """(bytes that a program's operations write by their shapes, bytes that tiles add to them).

    What happens within a fusion is not written.
    """
    bodies, entry = computations(text)
    times = run_counts(bodies, entry)
    fused = {name for lines in bodies.values() for line in lines for name in _FUSED.findall(line)}
    plain = whole = 0
    for name, lines in bodies.items():
        if name in fused or not times[name]:
            continue
        for match in map(_RESULT.match, lines):
            if match is None or match[2] in _NO_WRITE:
                continue
            for dtype, shape, order, tile in _TILED.findall(match[1]):
                sizes = _array_sizes(dtype, shape, order, tile)
                plain, whole = plain + times[name] * sizes[0], whole + times[name] * sizes[1]
    return plain, whole - plain


def _array_sizes(dtype: str, shape: str, order: str, tile: str) -> tuple[int, int]:
    """Bytes of an array, and with its last axes in memory filled up to whole tiles."""
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    sizes = [int(n) for n in shape.split(",") if n]
    rounded = list(sizes)
    along = [int(axis) for axis in order.split(",") if axis]
    tiles = [int(n) for n in tile.split(",") if n]
    for axis, size in zip(along, reversed(tiles), strict=False):
        rounded[axis] = -(-rounded[axis] // size) * size
    return int(np.prod(sizes)) * bits // 8, int(np.prod(rounded)) * bits // 8
