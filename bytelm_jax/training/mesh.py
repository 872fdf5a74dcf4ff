"""Devices: mesh and shardings. The only file that names a mesh axis.

Models and losses run on one device unchanged. The rows of a batch are spread over all devices;
parameters and optimizer state are partitioned over the `fsdp` devices of a group and replicated
across groups (Rajbhandari et al. 2020, stage 3; Zhao et al. 2023, "hybrid sharding").
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array

from bytelm.config import TrainConfig
from bytelm.leaves import is_ngram_table
from bytelm_jax.kernels.lookup import vary_like
from bytelm_jax.kernels.partitioned import Find, by_rows, partitioned
from bytelm_jax.kernels.rows import split_rows
from bytelm_jax.models import Params
from bytelm_jax.training import topology
from bytelm_jax.training.tensor import tensor_axis

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


_MIN_COLUMN_ROWS = 1 << 16
"""Tables of n-grams with fewer rows are gathered, as other parameters are: a step reads most."""


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
    axes = (*ROWS, TENSOR)
    if tensor == 1:  # the axis exists where it is asked for: other programs stay as they are
        placed, axes = placed[:, :, 0], ROWS
    mesh = Mesh(placed, axes, axis_types=(AxisType.Auto,) * len(axes))
    _feeding(mesh)  # refused before anything depends on it
    return mesh


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


def row_places(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut: devices that share layers share rows."""
    return mesh.size // tensor_parts(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of values that every device holds whole: scalars and metrics."""
    return NamedSharding(mesh, jax.P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: rows over the devices."""
    return NamedSharding(mesh, jax.P(ROWS))


def partition_axis(mesh: Mesh, shape: tuple[int, ...]) -> int | None:
    """The axis along which `fsdp` cuts an array of the state: its longest divisible one."""
    parts = mesh.shape[FSDP]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes or math.prod(shape) < _MIN_SHARDED_SIZE:
        return None
    return max(axes, key=lambda axis: shape[axis])


def _scattered_axis(mesh: Mesh, shape: tuple[int, ...]) -> int | None:
    """The axis along which the gradient of a gathered parameter arrives cut; None if whole."""
    return partition_axis(mesh, shape) if math.prod(shape) >= _MIN_SCATTERED_SIZE else None


def stays_cut(mesh: Mesh, shape: tuple[int, ...], name: str) -> bool:
    """Whether a parameter is never gathered over `fsdp`, but read by columns: large n-gram tables.

    Gathered, that of `blt_1b` is 6.1 GB in bfloat16 on each device, and its gradient 12.3 while it
    is summed; a step of 2,048 bytes a device reads 12,288 of its 3 million rows.
    """
    parts = mesh.shape[FSDP]
    return is_ngram_table(name) and _fits_columns(shape, parts)


def _fits_columns(shape: tuple[int, ...], parts: int) -> bool:
    large = len(shape) == 2 and shape[0] >= _MIN_COLUMN_ROWS
    return large and parts > 1 and shape[1] % parts == 0


def gathered_axes(mesh: Mesh, params: Any) -> dict[str, int | None]:
    """Parameter → the axis along which `gather_parts` makes it whole."""
    return {
        name: None if stays_cut(mesh, leaf.shape, name) else partition_axis(mesh, leaf.shape)
        for name, leaf in params.items()
    }


def tensor_parts(mesh: Mesh) -> int:
    """Into how many parts layers are cut."""
    return mesh.shape.get(TENSOR, 1)


def partition(mesh: Mesh, shape: tuple[int, ...], name: str = "") -> jax.P:
    """How an array of the state lies on the mesh; `name` is that of its parameter, if it has one.

    Layers are cut as `tensor.CUTS` says of the parameter, and the parts by `fsdp`.
    """
    layer = _tensor_partition(mesh, shape, name)
    cut = [axis for axis, by in enumerate(layer) if by == TENSOR]
    each = [size // tensor_parts(mesh) if axis in cut else size for axis, size in enumerate(shape)]
    axis = 1 if stays_cut(mesh, shape, name) else partition_axis(mesh, tuple(each))
    if axis is None:
        return layer
    entries = [*layer, *(None,) * (axis + 1 - len(layer))]
    # Of an axis cut by both, gathering over `fsdp` must give the device's own part of the layer.
    entries[axis] = (TENSOR, FSDP) if axis in cut else FSDP
    return jax.P(*entries)


def _layer_partition(mesh: Mesh, shape: tuple[int, ...], name: str) -> jax.P:
    """How a parameter lies on the mesh while it is computed with."""
    if stays_cut(mesh, shape, name):
        return partition(mesh, shape, name)
    return _tensor_partition(mesh, shape, name)


def _tensor_partition(mesh: Mesh, shape: tuple[int, ...], name: str) -> jax.P:
    """The same without `FSDP`, over which nearly all are whole then."""
    parts = tensor_parts(mesh)
    axis = tensor_axis(name, shape, parts) if parts > 1 and name else None
    return jax.P() if axis is None else jax.P(*(None,) * axis, TENSOR)


def _shardings(mesh: Mesh, tree: Any, partition: Callable[[Mesh, Any, str], jax.P]) -> Any:
    """The sharding of each leaf of parameters or of a state that holds arrays for each of them."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        name = keys[-1] if keys and isinstance(keys[-1], str) and "." in keys[-1] else ""
        return NamedSharding(mesh, partition(mesh, leaf.shape, name if leaf.ndim else ""))

    return jax.tree.map_with_path(of, tree)


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """The shardings of parameters and optimizer state, whose arrays are cut like their parameter.

    They follow from each leaf's shape and from the parameter's name, by which it is found.
    """
    return _shardings(mesh, tree, partition)


def layer_shardings(mesh: Mesh, params: Any) -> Any:
    """The shardings of parameters while layers are computed: most are whole or cut over `TENSOR`.

    Those that `stays_cut` names are those of the state.
    """
    return _shardings(mesh, params, _layer_partition)


def layer_shapes(mesh: Mesh, params: Any, traced: bool = False) -> Any:
    """Shapes and dtypes of the parts of `params` that one device computes with.

    If `traced`, of those that a model can be traced with on one device: all columns of tables.
    """
    lie = _shardings(mesh, params, _tensor_partition) if traced else layer_shardings(mesh, params)
    return jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(lies.shard_shape(leaf.shape), leaf.dtype),
        params,
        lie,
    )


def place(mesh: Mesh, tree: Any) -> Any:
    """Places arrays that are the same in every process as part of the state."""
    return jax.device_put(tree, state_shardings(mesh, tree))


def fetch(mesh: Mesh, tree: Any) -> Any:
    """Arrays of the state, gathered, as numpy arrays in every process."""
    return jax.device_get(jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree))


def gather(mesh: Mesh, params: Any) -> Any:
    """A tree of parameters gathered over `fsdp` on every device, inside a jitted function.

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
        return constrain(constrain(tree, state_shardings(mesh, tree)), layer_shardings(mesh, tree))

    def cut(gradients: Any) -> Any:
        # The gradient of a constraint is the same constraint: whole gradients on every device, of
        # which each needs only its own part. Small ones are summed whole all the same: otherwise
        # the compiler would rather gather everything that an embedding's product reads.
        parts, layers = state_shardings(mesh, gradients), layer_shardings(mesh, gradients)
        first = jax.tree.map(
            lambda leaf, layer, part: layer if leaf.size < _MIN_SCATTERED_SIZE else part,
            gradients,
            layers,
            parts,
        )
        return constrain(constrain(gradients, first), parts)

    whole.defvjp(lambda tree: (whole(tree), None), lambda _, gradients: (cut(gradients),))
    return whole(params)


def _in_own_rows(
    find: Callable[[Array, Array], Array], fill: float, part: Array, ids: Array
) -> Array:
    """`find` on a device's rows of a table, summed over `TENSOR`, inside `shard_map`."""
    local = ids - jax.lax.axis_index(TENSOR) * len(part)
    here, part = (local >= 0) & (local < len(part)), vary_like(part, local)
    if not fill:  # a row outside a table adds nothing
        return jax.lax.psum(find(part, jnp.where(here, local, len(part))), TENSOR)
    found = find(part, jnp.where(here, local, 0))
    return jax.lax.psum(jnp.where(here[..., None], found, 0), TENSOR)


def _by_columns(find: Find, part: Array, ids: Array) -> Array:
    """`find` on the columns of a table that this device has, for the ids of all devices of a group.

    Inside `shard_map`. What each finds for the others goes to them: bytes of results, not of rows.
    """
    everyone = jax.lax.all_gather(ids, FSDP, tiled=True)
    found = find(vary_like(part, everyone), everyone)
    return jax.lax.all_to_all(found, FSDP, 0, found.ndim - 1, tiled=True)


class _Columns:
    """The `Columns` of a mesh, under `jit` or inside `shard_map`."""

    def __init__(self, mesh: Mesh, inside: bool) -> None:
        self._mesh, self._inside = mesh, inside

    def __call__(self, find: Find, table: Array, ids: Array, width: int) -> Array:
        rows, parts = len(table), tensor_parts(self._mesh)
        if self._inside:
            return _by_columns(find, table, ids) if table.shape[1] < width else find(table, ids)
        if not _fits_columns(table.shape, self._mesh.shape[FSDP]):
            return by_rows(find, table, ids, 0.0)
        cut = rows % parts == 0 and parts > 1
        on_device = functools.partial(_in_own_rows, find, 0.0) if cut else find
        return jax.shard_map(
            functools.partial(_by_columns, on_device),
            mesh=self._mesh,
            in_specs=(jax.P(TENSOR if cut else None, FSDP), jax.P(ROWS)),
            out_specs=jax.P(ROWS),
        )(table, ids)


class _Cut:
    """The `Partition` of a mesh with a `TENSOR` axis. Rows lead all arrays but tables.

    The rows' axes are explicit as well: left to the compiler, the gradient of a look-up gathers the
    updates of all rows on every device.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh, self._parts = mesh, tensor_parts(mesh)

    def by_rows(
        self, find: Callable[[Array, Array], Array], table: Array, ids: Array, fill: float
    ) -> Array:
        rows = table.shape[0]
        if rows % self._parts:
            return find(table, ids)
        ids = jnp.where(ids < 0, ids + rows, ids)  # counted from the end, as by an index
        masked = functools.partial(_in_own_rows, find, fill)
        found = self._map(masked, (jax.P(TENSOR), jax.P(ROWS)), jax.P(ROWS))(table, ids)
        inside = ((ids >= 0) & (ids < rows))[..., None]
        return jnp.where(inside, found, fill) if fill else found

    def by_heads(self, attend: Callable[..., Array], shared: Any, *arrays: Array) -> Array:
        def by_head(rank: int) -> jax.P:
            return jax.P(ROWS, *(None,) * (rank - 3), TENSOR)

        cut = tuple(by_head(array.ndim) for array in arrays)
        result = by_head(jax.eval_shape(attend, shared, *arrays).ndim)
        return self._map(attend, (jax.P(ROWS), *cut), result)(shared, *arrays)

    def _map(self, function: Callable[..., Array], inputs: Any, result: jax.P) -> Any:
        return jax.shard_map(function, mesh=self._mesh, in_specs=inputs, out_specs=result)


@contextmanager
def layers_on(mesh: Mesh) -> Iterator[None]:
    """Within this context layers are traced as they, and the rows of a batch, are cut over `mesh`.

    It is meant for `jit`; inside `shard_map` a device sees its own rows anyway.
    """
    cut = _Cut(mesh) if tensor_parts(mesh) > 1 else None
    gathered = mesh.shape[FSDP] > 1 and cut is None
    split = split_rows(mesh, ROWS, gathered, functools.partial(_scattered_axis, mesh))
    with partitioned(cut, _Columns(mesh, inside=False)), split:
        yield


@contextmanager
def parts_on(mesh: Mesh) -> Iterator[None]:
    """Version of `layers_on` inside `shard_map`."""
    with partitioned(None, _Columns(mesh, inside=True)):
        yield


def put_batch(mesh: Mesh, rows: np.ndarray) -> Array:
    """This process's rows of the global batch, or a value of each → the global array."""
    shape = (len(rows) * _feeding(mesh).parts, *rows.shape[1:])
    # Blocks of `rows` go to this process's positions in increasing order, gaps or not.
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows, shape)


def check_batch(mesh: Mesh, train: TrainConfig) -> None:
    """Raises `ValueError` unless the batch divides evenly over devices and micro-batches."""
    places = row_places(mesh)
    parts = places * train.accumulation_steps
    if train.batch_size % parts:
        many = f"{places} devices" if places == mesh.size else f"{places} groups of tensor devices"
        raise ValueError(
            f"batch_size={train.batch_size}: must be a multiple of {parts} ({many} "
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
