"""What `--compile-for` names: a slice of a TPU pod or a host of GPUs. Needs no JAX."""

import math
import re
from typing import NamedTuple

from bytelm.chips import Chip, find_chip

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBE, "v4": _CUBE, "v7": _CUBE}
"""TPU → its slices, as chips along each axis."""

_GPUS = ("A100", "H100", "H200", "B200")
_MOST_GPUS = 4096


class Target(NamedTuple):
    """The devices that a step is compiled for."""

    chip: Chip
    shape: str
    """Chips along each axis of a TPU's slice; the number of GPUs."""
    devices: int

    @property
    def name(self) -> str:
        """As the command line writes it."""
        return f"{self.chip.name.lower()}:{self.shape}"


def read_target(text: str) -> Target:
    """`v5e:16x16` or `h100:8`; raises `ValueError` that lists what is known."""
    name, _, shape = text.partition(":")
    try:
        chip = find_chip(name)
    except ValueError:
        raise ValueError(f"compile_for={text}: unknown; {_known()}") from None
    if shape in TOPOLOGIES.get(chip.name, ()):
        cores = 2 if chip.name == "v7" else 1  # devices of a chip
        return Target(chip, shape, cores * math.prod(map(int, shape.split("x"))))
    if chip.name in _GPUS and re.fullmatch(r"[1-9]\d*", shape) and int(shape) <= _MOST_GPUS:
        return Target(chip, shape, int(shape))
    raise ValueError(f"compile_for={text}: unknown; {_known()}")


def _known() -> str:
    each = [f"{name}:{'|'.join(shapes)}" for name, shapes in TOPOLOGIES.items()]
    return f"choose one of {', '.join(each)}, or a number of {', '.join(_GPUS)} as in h100:8"
