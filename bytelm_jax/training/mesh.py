"""Devices: mesh and shardings. The only file that names a mesh axis.

Models and losses run on one device unchanged. The rows of a batch are spread over all devices;
parameters and optimizer state are partitioned over the `fsdp` devices of a group and replicated
across groups (Rajbhandari et al. 2020, stage 3; Zhao et al. 2023, "hybrid sharding").
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array

from bytelm.config import TrainConfig
from bytelm_jax.models import Params
from bytelm_jax.training import topology

DATA = "data"
"""The mesh axis along which parameters are replicated."""


FSDP = "fsdp"
"""The mesh axis along which one copy of the parameters is partitioned."""


ROWS = (DATA, FSDP)
"""The rows of a batch are spread along both."""


TENSOR = "tensor"
"""The mesh axis along which the layers of one copy are cut; absent where they are whole."""


_MIN_SHARDED_SIZE = 1024
"""Parameters with fewer elements, mostly norms and biases, are not worth a collective each."""


_MIN_SCATTERED_SIZE = 1 << 20
"""Gradients with fewer elements may be transferred whole."""


def make_mesh(
    count: int = 0, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over `count` devices (0: all, of all processes), in groups of `fsdp` x `tensor`.

    A function of what the devices say about themselves, hence the same in every process:
    `topology.arrange` says how they are placed. `devices` are those to choose from, by default all
    that JAX has. Raises `ValueError` for numbers that do not fit together.
    """
    known = jax.devices() if devices is None else list(devices)
    processes = len({device.process_index for device in known})
    if count > len(known):
        raise ValueError(f"devices={count}: there are {len(known)}; ask for at most that")
    if processes > 1 and count not in (0, len(known)):
        raise ValueError(
            f"devices={count}: {processes} processes use all their {len(known)}; leave it out"
        )
    count = count or len(known)
    if count % tensor:
        raise ValueError(f"tensor={tensor}: must divide the number of devices, {count}")
    if count % (fsdp * tensor):
        what = f", {count}" if tensor == 1 else f" over tensor, {count // tensor}"
        raise ValueError(f"fsdp={fsdp}: must divide the number of devices{what}")
    placed = topology.arrange(known[:count], (count // (fsdp * tensor), fsdp, tensor))
    topology.feeding(placed)  # refused before anything depends on it
    if tensor == 1:  # the axis exists where it is asked for: other programs stay as they are
        return Mesh(placed[:, :, 0], ROWS, axis_types=(AxisType.Auto,) * 2)
    return Mesh(placed, (*ROWS, TENSOR), axis_types=(AxisType.Auto,) * 3)


def describe(mesh: Mesh) -> list[Any]:
    """The sizes of the axes, the devices in order, and who feeds which rows to them.

    JSON values, equal where two processes' meshes are.
    """
    ids = [device.id for device in mesh.devices.flat]
    feeding = _feeding(mesh)
    return [list(mesh.shape.items()), ids, sorted(feeding.part_of.items()), feeding.blocks]


def in_words(mesh: Mesh) -> str:
    """The devices and how they share the work, for people."""
    shape = " × ".join(f"{size} {name}" for name, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return f"1 {kind} device" if mesh.size == 1 else f"{mesh.size} {kind} devices ({shape})"


@functools.lru_cache(maxsize=64)
def _feeding(mesh: Mesh) -> topology.Feeding:
    return topology.feeding(mesh.devices.reshape(*mesh.devices.shape[:2], -1))


def process_slice(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(i, n): a process, by default this one, feeds the i-th of the n equal parts of each batch."""
    feeding = _feeding(mesh)
    return feeding.part_of[jax.process_index() if process is None else process], feeding.parts


def row_shifts(mesh: Mesh, rows: int) -> np.ndarray | None:
    """How far each row of a batch of `rows` stands from its number: int32, one per position.

    A position along `ROWS` holds an equal block of rows of the array from `put_batch`. None if all
    stand where their number says. Otherwise the wires ask for another order of devices than that
    in which processes read, and the rows of the array follow the devices.
    """
    blocks = np.asarray(_feeding(mesh).blocks, np.int32)
    shifts = (blocks - np.arange(len(blocks), dtype=np.int32)) * (rows // len(blocks))
    return shifts if shifts.any() else None


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
    shape = (len(rows) * _feeding(mesh).parts, *rows.shape[1:])
    # Blocks of `rows` go to this process's positions in increasing order, gaps or not.
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows, shape)


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
