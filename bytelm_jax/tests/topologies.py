"""Devices of topologies that are not there, as libtpu describes them, for tests of meshes.

Recorded from `jax.experimental.topologies.get_topology_desc` with libtpu 0.0.42.1; that it still
says the same is checked by `scripts/check/meshes.py`.
"""

import itertools
from types import SimpleNamespace
from typing import NamedTuple


class Topology(NamedTuple):
    """A slice of a TPU pod; several if `slices` is not 1, joined by a slower network."""

    kind: str
    """What devices report as their kind."""
    shape: tuple[int, int, int]
    """Chips of a slice along x, y and z."""
    host: tuple[int, int, int] = (2, 2, 1)
    """Those of a host, which is a process."""
    cores: int = 1
    """Devices of a chip."""
    slices: int = 1

    def devices(self) -> list[SimpleNamespace]:
        """The devices in the order of JAX: process by process."""
        hosts = [range(size // part) for size, part in zip(self.shape, self.host, strict=True)]
        found, count = [], 0
        for index in range(self.slices):
            for z, y, x in itertools.product(*hosts[::-1]):
                found += self._of_host(index, (x, y, z), count)
                count += 1
        return found

    def _of_host(self, index: int, at: tuple[int, ...], process: int) -> list[SimpleNamespace]:
        devices = []
        inner = [range(part) for part in self.host]
        for k, j, i in itertools.product(*inner[::-1]):
            x, y, z = (
                place * part + offset
                for place, part, offset in zip(at, self.host, (i, j, k), strict=True)
            )
            for core in range(self.cores):
                number = (x + self.shape[0] * (y + self.shape[1] * z)) * self.cores + core
                devices.append(
                    SimpleNamespace(
                        id=number + (self.slices > 1) * 100_000 * (index + 1),
                        platform="tpu",
                        device_kind=self.kind,
                        coords=[x, y, z],
                        core_on_chip=core,
                        process_index=process,
                        **({"slice_index": index} if self.slices > 1 else {}),
                    )
                )
        return devices


V4, V5E, V5P, V6E, V7 = "TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"
TOPOLOGIES = {
    "v5e:2x2": Topology(V5E, (2, 2, 1)),
    "v5e:2x4": Topology(V5E, (2, 4, 1)),
    "v5e:4x4": Topology(V5E, (4, 4, 1)),
    "v5e:4x8": Topology(V5E, (4, 8, 1)),
    "v5e:16x16": Topology(V5E, (16, 16, 1)),
    "v6e:2x2": Topology(V6E, (2, 2, 1)),
    "v6e:4x4": Topology(V6E, (4, 4, 1)),
    "v6e:16x16": Topology(V6E, (16, 16, 1)),
    "v5p:2x2x1": Topology(V5P, (2, 2, 1)),
    "v5p:2x2x4": Topology(V5P, (2, 2, 4)),
    "v5p:4x4x4": Topology(V5P, (4, 4, 4)),
    "v4:2x2x1": Topology(V4, (2, 2, 1)),
    "v4:4x4x4": Topology(V4, (4, 4, 4)),
    "v5e:4x4 x 2 slices": Topology(V5E, (4, 4, 1), slices=2),
    "v5p:2x2x4 x 2 slices": Topology(V5P, (2, 2, 4), slices=2),
    "v7:2x2x2": Topology(V7, (2, 2, 2), cores=2),
}
"""By the names that libtpu knows, which says of two slices `num_slices=2`."""
