"""Meshes of pods that are not there: placed alike by every process, every row fed once."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from bytelm_jax.tests.topologies import TOPOLOGIES
from bytelm_jax.training import topology
from bytelm_jax.training.mesh import make_mesh


def sizes_of(count):
    """The sizes of meshes over `count` devices that users may ask for."""
    groups = [(fsdp, tensor) for fsdp in (1, 2, 4, 8, 16) for tensor in (1, 2, 4)]
    return [(count // (f * t), f, t) for f, t in groups if count % (f * t) == 0]


def box_of(devices):
    """How many devices the smallest box around some holds, in how many slices."""
    places = np.array([(*d.coords, d.core_on_chip) for d in devices])
    slices = {getattr(device, "slice_index", 0) for device in devices}
    return int(np.prod(places.max(0) - places.min(0) + 1)), len(slices)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_mesh_is_the_same_in_every_process_and_its_groups_are_boxes_of_neighbours(name):
    devices = TOPOLOGIES[name].devices()
    shuffled = devices[:]
    random.Random(0).shuffle(shuffled)
    for sizes in sizes_of(len(devices)):
        mesh = topology.arrange(devices, sizes)
        assert mesh.shape == sizes
        assert {d.id for d in mesh.flat} == {d.id for d in devices}
        assert (topology.arrange(shuffled, sizes) == mesh).all()
        slices = TOPOLOGIES[name].slices
        for size in (sizes[2], sizes[1] * sizes[2]):
            for group in mesh.reshape(-1, size):
                held, reach = box_of(group)
                if size <= len(devices) // slices:
                    assert (held, reach) == (size, 1), (sizes, size)
        if sizes[2] <= sum(d.process_index == 0 for d in devices):
            for group in mesh.reshape(-1, sizes[2]):
                assert len({d.process_index for d in group}) == 1, sizes


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_row_is_fed_once_and_carries_its_number(name):
    """By following each row: from a process's part to its positions in increasing order."""
    devices = TOPOLOGIES[name].devices()
    for sizes in sizes_of(len(devices)):
        mesh = topology.arrange(devices, sizes)
        fed = topology.feeding(mesh)
        positions = mesh.reshape(-1, sizes[2])
        rows = np.arange(2 * len(positions))
        held = np.full(len(rows), -1)
        for process in {d.process_index for d in devices}:
            part = fed.part_of[process]
            own = rows.reshape(fed.parts, -1)[part].reshape(-1, 2)
            at = [i for i, on in enumerate(positions) if process in {d.process_index for d in on}]
            for block, position in zip(own, at, strict=True):
                there = held[2 * position : 2 * position + 2]
                assert (there == -1).all() or (there == block).all()  # shared layers, shared rows
                held[2 * position : 2 * position + 2] = block
        assert sorted(held) == list(rows), sizes
        assert list(held[::2] // 2) == list(fed.blocks), sizes


def plain_devices(processes, each, platform="gpu", slices=1):
    return [
        SimpleNamespace(
            id=i, process_index=i // each, platform=platform, slice_index=i // each * slices
        )
        for i in range(processes * each)
    ]


def test_gpus_stand_in_the_order_of_their_processes():
    """Hosts count as slices, and a group may need several of them."""
    devices = plain_devices(4, 8)
    for sizes in ((8, 4, 1), (4, 8, 1), (2, 16, 1), (1, 32, 1), (2, 8, 2)):
        mesh = topology.arrange(devices[::-1], sizes)
        assert [d.id for d in mesh.flat] == list(range(32))
        fed = topology.feeding(mesh)
        assert fed.parts == 4 and fed.blocks == tuple(range(32 // sizes[2]))
        assert fed.part_of == {0: 0, 1: 1, 2: 2, 3: 3}


def test_slices_lie_along_the_first_axis():
    devices = TOPOLOGIES["v5e:4x4 x 2 slices"].devices()
    mesh = topology.arrange(devices, (4, 8, 1))
    assert [[d.slice_index for d in group] for group in mesh[:, :, 0]] == [
        [index] * 8 for index in (0, 0, 1, 1)
    ]


def test_a_slice_with_holes_and_uneven_processes():
    devices = TOPOLOGIES["v5e:4x4"].devices()
    mesh = topology.arrange(devices[:12], (12, 1, 1))  # three hosts of four are an L
    assert list(mesh.flat) == devices[:12]
    assert topology.feeding(mesh).parts == 3
    with pytest.raises(ValueError, match="devices: process 0 has 4 and process 1 has 2; give each"):
        topology.feeding(topology.arrange(devices[:6], (6, 1, 1)))
    with pytest.raises(ValueError, match=r"tensor=3: its groups reach across processes unevenly"):
        topology.feeding(topology.arrange(plain_devices(3, 4), (4, 1, 3)))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((8, 1, 3), "tensor=3: must divide the number of devices, 8"),
        ((8, 4, 4), "fsdp=4: must divide the number of devices over tensor, 2"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, says):
    with pytest.raises(ValueError, match=says):
        make_mesh(*sizes)
    assert make_mesh(8, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert make_mesh(8, 2).shape == {"data": 4, "fsdp": 2}
