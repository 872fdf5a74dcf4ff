"""Accelerators: the names that devices report, dense bfloat16 operations per second, memory.

Figures are the vendors' data sheets', without sparsity, of one device as JAX and PyTorch count
them: a v4 or v5p chip is one device, a v7 chip two.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One kind of accelerator."""

    name: str
    """What people call it, and what `--chip` takes."""
    platform: str
    """"gpu" or "tpu"."""
    reported: str
    """What a TPU of this kind reports as its name, or what a GPU's name contains."""
    peak: float
    """Dense bfloat16 operations per second."""
    memory: int
    """Bytes of its own memory."""


CHIPS = tuple(
    Chip(name, platform, reported, tera * 1e12, gibibytes * 2**30)
    for name, platform, reported, tera, gibibytes in (
        ("H100", "gpu", "H100", 989, 80),
        ("H100 NVL", "gpu", "H100 NVL", 835, 94),
        ("H100 PCIe", "gpu", "H100 PCIe", 756, 80),
        ("H200", "gpu", "H200", 989, 141),
        ("A100", "gpu", "A100", 312, 80),
        ("B200", "gpu", "B200", 2250, 180),
        ("GB200", "gpu", "GB200", 2500, 186),
        ("L40S", "gpu", "L40S", 362, 48),
        ("RTX 4090", "gpu", "RTX 4090", 165.2, 24),
        ("v4", "tpu", "TPU v4", 275, 32),
        ("v5e", "tpu", "TPU v5 lite", 197, 16),
        ("v5p", "tpu", "TPU v5", 459, 95),
        ("v6e", "tpu", "TPU v6 lite", 918, 32),
        ("v7", "tpu", "TPU7", 1153.5, 96),
    )
)
"""All kinds that are known; the first is the default of a dry run."""

_PARTS = ("Laptop", "MIG ", "4090 D")
"""What the name of a device contains that is less than the chip it is named after."""

_ALIASES = {"v5litepod": "v5e", "v5elite": "v5e", "v7x": "v7", "tpu7x": "v7", "4090": "RTX 4090"}


def find_chip(name: str) -> Chip:
    """The chip of this name, or that reports it ("v5e", "TPU v5e", "TPU v5 lite", "h100").

    Raises `ValueError` for an unknown one.
    """
    plain = name.lower().removeprefix("tpu ").strip()
    plain = _ALIASES.get(plain, plain).lower()
    for chip in CHIPS:
        if plain in (chip.name.lower(), chip.reported.lower().removeprefix("tpu ")):
            return chip
    raise ValueError(f"chip={name}: unknown; choose one of {known()}")


def known() -> str:
    """The names of all chips, for messages."""
    return ", ".join(chip.name for chip in CHIPS)


def chip_of(device: str) -> Chip | None:
    """The chip of a device by the name that it reports; None if it is not known.

    A TPU's name is the whole of it: "TPU v5" is a v5p, "TPU v5 lite" and "TPU v5e" are a v5e, and
    "TPU v4 lite" is unknown. Of all names of GPUs that fit, the longest counts.
    """
    if device.startswith("TPU"):
        try:
            return find_chip(device)
        except ValueError:
            return None
    fitting = [chip for chip in CHIPS if chip.reported in device]
    whole = not any(part in device for part in _PARTS)
    return max(fitting, key=lambda chip: len(chip.reported), default=None) if whole else None


def peak_flops(device: str) -> float | None:
    """Peak operations per second of a device by the name that it reports; None if not known."""
    chip = chip_of(device)
    return chip.peak if chip else None


def unknown_peak(device: str) -> list[str]:
    """A line for people if `mfu` cannot be reported on this accelerator; none for a CPU."""
    if device.lower() == "cpu" or chip_of(device):
        return []
    return [f"no mfu is reported: the peak of {device!r} is not known (known are {known()})"]
