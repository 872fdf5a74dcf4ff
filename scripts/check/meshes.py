"""The meshes of TPU pods that are not there: alike in every process, every row fed once.

    python scripts/check/meshes.py [--json]

libtpu describes each topology (`pip install libtpu`; no TPU is needed). For each of them and every
`--fsdp` of 1, 2, 4, 8, 16 and `--tensor` of 1, 2 that divides it, and for every mesh that a command
in the README, in `docs/` and in `scripts/launch/` asks for, the mesh is made as each process of the
topology makes it, and every row of a batch is followed from the process that reads it to the
devices that hold it, by JAX's own sharding of the batch. Prints a line for each topology and the
total; exit code 1 if a mesh differs between processes, a row is fed twice or never, the devices of
a group are not neighbours, or libtpu describes a topology otherwise than the tests' table does.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from bytelm_jax.tests.topologies import TOPOLOGIES
from bytelm_jax.tools.compiled import ENVIRONMENT, slice_devices
from bytelm_jax.training import mesh as meshes

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(fsdp, tensor) for tensor in (1, 2) for fsdp in (1, 2, 4, 8, 16)]
ROWS = 3
"""Rows on each device."""


def devices_of(name: str) -> list[Any]:
    """The devices of a topology of the table, as libtpu describes them."""
    chip, _, shape = name.split()[0].partition(":")
    return slice_devices(chip, shape, TOPOLOGIES[name].slices)


def same_as_table(name: str, devices: list[Any]) -> bool:
    """Whether the tests' table says of each device what libtpu says."""

    def facts(device: Any) -> tuple[Any, ...]:
        where = (getattr(device, "slice_index", 0), *device.coords, device.core_on_chip)
        return device.id, device.device_kind, device.platform, device.process_index, where

    return [facts(d) for d in devices] == [facts(d) for d in TOPOLOGIES[name].devices()]


def documented() -> set[tuple[int, int]]:
    """(fsdp, tensor) of every command that the documentation shows."""
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/launch/*")]
    found = set()
    for line in "\n".join(file.read_text() for file in files).splitlines():
        asked = dict(re.findall(r"--(fsdp|tensor) (\d+)", line))
        if asked:
            found.add((int(asked.get("fsdp", 1)), int(asked.get("tensor", 1))))
    return found


def look(devices: list[Any], fsdp: int, tensor: int) -> list[str]:
    """What is wrong with a mesh of these devices, as every process makes it."""
    processes = sorted({device.process_index for device in devices})
    seen, problems = [], []
    for process in processes:
        own = [d for d in devices if d.process_index == process]
        order = own + [d for d in devices if d.process_index != process]
        with mock.patch.object(jax, "process_index", lambda process=process: process):
            mesh = meshes.make_mesh(0, fsdp, tensor, devices=order)
            seen.append((meshes.describe(mesh), meshes.process_slice(mesh)))
    if any(each[0] != seen[0][0] for each in seen):
        problems.append("processes make different meshes")
    mesh = meshes.make_mesh(0, fsdp, tensor, devices=devices)
    problems += follow(mesh, [each[1] for each in seen], processes)
    groups = (tensor, fsdp * tensor)
    problems += [f"groups of {n} are no boxes" for n in groups if not in_boxes(mesh, n)]
    return problems


def follow(mesh: Any, parts: list[tuple[int, int]], processes: list[int]) -> list[str]:
    """Follows every row of a batch; `parts` are what each process says that it feeds."""
    count = ROWS * mesh.devices[..., 0].size if mesh.devices.ndim == 3 else ROWS * mesh.size
    places = meshes.batch_sharding(mesh).devices_indices_map((count,))
    held: dict[Any, np.ndarray] = {}
    fed = Counter()
    for process, (part, of) in zip(processes, parts, strict=True):
        if count % of:
            return [f"{of} parts of {count} rows"]
        rows = np.arange(count).reshape(of, -1)[part]
        here = {d: index[0].indices(count)[:2] for d, index in places.items()
                if d.process_index == process}  # fmt: skip
        starts = sorted({start for start, _ in here.values()})
        if len(starts) * ROWS != len(rows):
            return [f"process {process} reads {len(rows)} rows for {len(starts)} x {ROWS}"]
        for device, (start, _) in here.items():
            held[device] = rows[starts.index(start) * ROWS :][:ROWS]
            fed.update((device, int(row)) for row in held[device])
    numbers = Counter(row for device, row in fed)
    tensor = mesh.shape.get("tensor", 1)
    if set(numbers) != set(range(count)) or set(numbers.values()) != {tensor}:
        return ["rows are fed twice or never"]
    shifts = meshes.row_shifts(mesh, count)
    for device, index in places.items():
        position = index[0].start // ROWS if index[0].start else 0
        moved = 0 if shifts is None else shifts[position]
        if list(held[device]) != [position * ROWS + i + moved for i in range(ROWS)]:
            return ["a row does not carry its number"]
    return []


def in_boxes(mesh: Any, size: int) -> bool:
    """Whether the devices of each group fill a box, unless it is larger than a slice."""
    slices = Counter(getattr(d, "slice_index", 0) for d in mesh.devices.flat)
    for group in mesh.devices.reshape(-1, size) if size <= min(slices.values()) else ():
        places = np.array([(*d.coords, d.core_on_chip) for d in group])
        one = len({getattr(d, "slice_index", 0) for d in group}) == 1
        if not one or np.prod(places.max(0) - places.min(0) + 1) != size:
            return False
    return True


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object per topology")
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(ENVIRONMENT)
    as_json, asked = parser.parse_args().json, sorted({*SIZES, *documented()})
    total = wrong = 0
    for name in TOPOLOGIES:
        devices = devices_of(name)
        sizes = [(f, t) for f, t in asked if len(devices) % (f * t) == 0]
        problems = [f"{f} x {t}: {p}" for f, t in sizes for p in look(devices, f, t)]
        problems += [] if same_as_table(name, devices) else ["not what the tests' table says"]
        processes = len({d.process_index for d in devices})
        total, wrong = total + len(sizes), wrong + len(problems)
        row = {"topology": name, "devices": len(devices), "processes": processes}
        row |= {"meshes": len(sizes), "problems": problems}
        text = f"{name:22} {len(devices):4} devices {processes:3} processes {len(sizes):3} meshes  "
        print(json.dumps(row) if as_json else text + ("; ".join(problems) or "good"), flush=True)
    said = f"{len(TOPOLOGIES)} topologies, {total} meshes (documented: {documented()})"
    print(f"{said}: {wrong} problems", file=sys.stderr if as_json else sys.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
