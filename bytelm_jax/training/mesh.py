"""Devices: mesh and shardings. The only file that names a mesh axis.

Models and losses run on one device unchanged. The rows of a batch are spread over all devices;
parameters and optimizer state are partitioned over the `fsdp` devices of a group and replicated
across groups (Rajbhandari et al. 2020, stage 3; Zhao et al. 2023, "hybrid sharding").
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array

from bytelm.config import TrainConfig
from bytelm_jax.models import Params

DATA = "data"
"""The mesh axis along which parameters are replicated."""


FSDP = "fsdp"
"""The mesh axis along which one copy of the parameters is partitioned."""


ROWS = (DATA, FSDP)
"""The rows of a batch are spread along both."""


_MIN_SHARDED_SIZE = 1024
"""Parameters with fewer elements, mostly norms and biases, are not worth a collective each."""


_MIN_SCATTERED_SIZE = 1 << 20
"""Gradients with fewer elements may be transferred whole."""


def make_mesh(devices: int = 0, fsdp: int = 1) -> Mesh:
    """A mesh over the first `devices` devices (0: all, of all processes), in groups of `fsdp`."""
    known, processes = jax.devices(), jax.process_count()
    if devices > len(known):
        raise ValueError(f"devices={devices}: there are {len(known)}; ask for at most that")
    if processes > 1 and devices not in (0, len(known)):
        raise ValueError(
            f"devices={devices}: {processes} processes use all their {len(known)}; leave it out"
        )
    count = devices or len(known)
    if count % fsdp:
        raise ValueError(f"fsdp={fsdp}: must divide the number of devices, {count}")
    shape, kinds = (count // fsdp, fsdp), (AxisType.Auto,) * len(ROWS)
    mesh = jax.make_mesh(shape, ROWS, axis_types=kinds, devices=known[:count])
    if _process_rows(mesh) is None:  # an order that would suit the links better, but not our files
        mesh = Mesh(np.asarray(known[:count]).reshape(shape), ROWS, axis_types=kinds)
    return mesh


def describe(mesh: Mesh) -> list[list[int]]:
    """The sizes of the axes, and the devices in order: equal where two processes' meshes are."""
    return [list(mesh.devices.shape), [device.id for device in mesh.devices.flat]]


def in_words(mesh: Mesh) -> str:
    """The devices and how they share the work, for people."""
    shape = " × ".join(f"{size} {name}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return f"1 {kind} device" if mesh.size == 1 else f"{mesh.size} {kind} devices ({shape})"


def _process_rows(mesh: Mesh) -> int | None:
    """Which of the processes' equal, contiguous parts of every batch is this one's, if any."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((mesh.size,)).values()
    rows = sorted(index[0].indices(mesh.size)[0] for index in slices if index)
    contiguous = bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
    even = contiguous and mesh.size % len(rows) == 0 and rows[0] % len(rows) == 0
    return rows[0] // len(rows) if even else None


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of the n equal parts of each batch."""
    index = _process_rows(mesh)
    assert index is not None  # guaranteed by `make_mesh`
    return index, mesh.size // len(mesh.local_devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole: scalars and metrics."""
    return NamedSharding(mesh, jax.P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: rows over the devices."""
    return NamedSharding(mesh, jax.P(ROWS))


def partition_axis(mesh: Mesh, shape: tuple[int, ...]) -> int | None:
    """The axis along which an array of the state is partitioned: its longest divisible one."""
    parts = mesh.shape[FSDP]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes or math.prod(shape) < _MIN_SHARDED_SIZE:
        return None
    return max(axes, key=lambda axis: shape[axis])


def partition(mesh: Mesh, shape: tuple[int, ...]) -> jax.P:
    axis = partition_axis(mesh, shape)
    return jax.P() if axis is None else jax.P(*(None,) * axis, FSDP)


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """The shardings of parameters and optimizer state, determined by each leaf's shape."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, partition(mesh, leaf.shape)), tree)


def place(mesh: Mesh, tree: Any) -> Any:
    """Places arrays that are the same in every process as part of the state."""
    return jax.device_put(tree, state_shardings(mesh, tree))


def fetch(mesh: Mesh, tree: Any) -> Any:
    """Arrays of the state, gathered, as numpy arrays in every process."""
    return jax.device_get(jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree))


def gather(mesh: Mesh, params: Any) -> Any:
    """A tree of parameters gathered on every device, inside a jitted function.

    Gradients come back partitioned.
    """
    if mesh.shape[FSDP] == 1:
        return params

    def constrain(tree: Any, shardings: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, shardings)

    @jax.custom_vjp
    def whole(tree: Any) -> Any:
        # Partitioned once more first: otherwise the compiler may move the gathering before the
        # preceding cast, and twice the bytes would be transferred.
        return constrain(constrain(tree, state_shardings(mesh, tree)), replicated(mesh))

    def cut(gradients: Any) -> Any:
        # The gradient of a constraint is the same constraint: whole gradients on every device, of
        # which each needs only its own part. Small ones are summed whole all the same: otherwise
        # the compiler would rather gather everything that an embedding's product reads.
        parts = state_shardings(mesh, gradients)
        first = jax.tree.map(
            lambda leaf, part: replicated(mesh) if leaf.size < _MIN_SCATTERED_SIZE else part,
            gradients,
            parts,
        )
        return constrain(constrain(gradients, first), parts)

    whole.defvjp(lambda tree: (whole(tree), None), lambda _, gradients: (cut(gradients),))
    return whole(params)


def put_batch(mesh: Mesh, rows: np.ndarray) -> Array:
    """This process's rows of the global batch, or a value of each → the global array."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows)


def check_batch(mesh: Mesh, train: TrainConfig) -> None:
    """Raises `ValueError` unless the batch divides evenly over devices and micro-batches."""
    parts = mesh.size * train.accumulation_steps
    if train.batch_size % parts:
        raise ValueError(
            f"batch_size={train.batch_size}: must be a multiple of {parts} ({mesh.size} devices "
            f"x {train.accumulation_steps} accumulation_steps); or ask for fewer devices"
        )


def gather_parts(params: Params, axes: dict[str, int | None]) -> Params:
    """Version of `gather` inside `shard_map`, where each device sees its own parts."""

    def whole(part: Array, axis: int) -> Array:
        # Marked as varying over the groups before the gathering, not after: the gradient is then
        # summed within the group first, and only a device's part is summed across groups.
        varying = jax.lax.pcast(part, DATA, to="varying")
        return jax.lax.all_gather(varying, FSDP, axis=axis, tiled=True)

    cut = ((name, part, axes[name]) for name, part in params.items())
    return {name: part if axis is None else whole(part, axis) for name, part, axis in cut}
