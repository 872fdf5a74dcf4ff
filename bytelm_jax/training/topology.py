"""Which device stands where in a mesh, and which rows of a batch each process feeds.

Pure functions of the devices' coordinates, slices and processes, so that every process finds the
same. Axes have no names here: a mesh is an array of devices [groups, cut, tensor], of which the
last communicates most.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Sizes = tuple[int, int, int]
"""Of a mesh: groups of devices, parts that a group cuts the state into, and parts of a layer."""


class Feeding(NamedTuple):
    """Who feeds which rows of a batch, whose rows are cut into `parts` equal, contiguous parts."""

    parts: int
    part_of: dict[int, int]
    """The part of each process, by the process's number."""
    blocks: tuple[int, ...]
    """For each position along the rows' axes of the mesh: which block of the batch it holds."""


def arrange(devices: Sequence[Any], sizes: Sizes) -> np.ndarray:
    """The devices as an array of `sizes`, a function of what they say about themselves alone.

    Devices of a TPU slice are arranged by their coordinates: those that share a layer form a box of
    neighbouring chips, within a host where that is possible, and so do those that share a copy of
    the state, which takes whole axes of the torus where there are any of its size. Slices follow
    one another along the first axis, unless one copy of the state needs several of them. Other
    devices stand in the order of their processes.
    """
    ordered = sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))
    slices = [list(found) for _, found in itertools.groupby(ordered, _slice)]
    each, group = len(slices[0]), sizes[1] * sizes[2]
    if any(len(found) != each for found in slices):
        return _in_order(ordered, sizes)
    if each % group == 0:
        inner = (each // group, *sizes[1:])
        return np.concatenate([_of_slice(found, inner) for found in slices])
    if group % each == 0 and each % sizes[2] == 0:
        inner = (1, each // sizes[2], sizes[2])
        return np.concatenate([_of_slice(found, inner) for found in slices]).reshape(sizes)
    return _in_order(ordered, sizes)


def feeding(mesh: np.ndarray) -> Feeding:
    """Who feeds which rows to the devices of `mesh`: every row is fed once to each that needs it.

    Processes whose devices hold the same rows, since they share their layers, feed the same part.
    Raises `ValueError` where a mesh gives processes rows in unequal or overlapping parts.
    """
    rows = mesh.reshape(-1, mesh.shape[2])
    devices = Counter(device.process_index for device in mesh.flat)
    if len(set(devices.values())) > 1:
        (many, most), *_, (few, least) = devices.most_common()
        raise ValueError(
            f"devices: process {many} has {most} and process {few} has {least}; give each as many"
        )
    held: dict[int, set[int]] = {}
    for position, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(position)
    parts = sorted({tuple(sorted(positions)) for positions in held.values()})
    owner = {part: min(p for p, at in held.items() if at == set(part)) for part in parts}
    parts.sort(key=owner.__getitem__)
    positions = [position for part in parts for position in part]
    if len({len(part) for part in parts}) > 1 or sorted(positions) != list(range(len(rows))):
        raise ValueError(
            f"tensor={mesh.shape[2]}: its groups reach across processes unevenly; choose a divisor "
            "or a multiple of the number of devices of a process"
        )
    blocks = np.argsort(positions)
    part_of = {process: parts.index(tuple(sorted(at))) for process, at in held.items()}
    return Feeding(len(parts), part_of, tuple(int(block) for block in blocks))


def _slice(device: Any) -> int:
    """The slice of a TPU, or the part of a cluster of GPUs, that a device belongs to."""
    return getattr(device, "slice_index", None) or 0


def _in_order(devices: Sequence[Any], sizes: Sizes) -> np.ndarray:
    array = np.empty(len(devices), object)
    array[:] = devices
    return array.reshape(sizes)


def _of_slice(devices: Sequence[Any], sizes: Sizes) -> np.ndarray:
    """The devices of one slice, in the order of their processes where they form no box."""
    if devices[0].platform != "tpu":
        return _in_order(devices, sizes)
    places = {(*d.coords, d.core_on_chip): d for d in devices}
    axes = list(zip(*places, strict=True))
    low = [min(axis) for axis in axes]
    shape = tuple(max(axis) - least + 1 for axis, least in zip(axes, low, strict=True))
    if not len(devices) == len(places) == math.prod(shape):
        return _in_order(devices, sizes)
    box = np.empty(shape, object)
    for place, device in places.items():
        box[tuple(np.subtract(place, low))] = device
    first = devices[0].process_index
    at_host = [place for place, device in places.items() if device.process_index == first]
    host = tuple(len(set(axis)) for axis in zip(*at_host, strict=True))
    return _split(box, host, sizes)


def _split(box: np.ndarray, host: tuple[int, ...], sizes: Sizes) -> np.ndarray:
    """A box of devices [x, y, z, core] as an array of `sizes`; `host` is the box of a process."""
    left, factors = box.shape, []
    for count in reversed(sizes):  # what communicates most first
        room = host if not factors else box.shape
        best = max(_factors(count, left), key=lambda each: _merit(each, box.shape, left, room))
        factors.insert(0, best)
        left = tuple(size // part for size, part in zip(left, best, strict=True))
    # Along each axis of the box, those that communicate most stand next to each other.
    fine = box.reshape([size for axis in zip(*factors, strict=True) for size in axis])
    order = [len(sizes) * axis + which for which in range(len(sizes)) for axis in range(box.ndim)]
    return fine.transpose(order).reshape(sizes)


def _factors(count: int, left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """All ways to take `count` devices out of a box of `left`: as many of each axis."""
    if not left:
        yield from [()] if count == 1 else []
        return
    for size in range(1, left[0] + 1):
        if left[0] % size == 0 and count % size == 0:
            yield from ((size, *rest) for rest in _factors(count // size, left[1:]))


def _merit(
    taken: tuple[int, ...], box: tuple[int, ...], left: tuple[int, ...], room: tuple[int, ...]
) -> tuple[Any, ...]:
    """How well the devices of a group are linked that takes `taken` of each axis; more is better.

    Within a host, then along whole axes of the torus, which are rings, as `jax.make_mesh` does it;
    then along axes that no other group uses, and as compact as possible.
    """
    whole = [size for size, full in zip(taken, box, strict=True) if size == full > 1]
    shared = [
        size for size, full, rest in zip(taken, box, left, strict=True) if rest < full
    ]  # of axes whose links other groups use, too
    within = all(fits % size == 0 for size, fits in zip(taken, room, strict=True))
    return within, math.prod(whole), len(whole), -math.prod(shared), -sum(taken), taken[::-1]
