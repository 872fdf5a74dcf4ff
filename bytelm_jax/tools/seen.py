"""How far compiled steps were from the estimates of a dry run, by architecture.

`scripts/check/tpu_compile.jsonl` has the steps, and a test compares it with this table.
"""

from typing import NamedTuple

from bytelm.config.base import ArchitectureConfig

SMALL = 10_000_000
"""Parameters below which a recipe counts as small: its program, and holes between its temporaries,
take as much memory as its state."""


class Deviation(NamedTuple):
    """What compiled steps needed, as fractions of the estimate above it; below it is negative."""

    low: float
    high: float
    steps: int
    """The number of steps that were compiled."""


SEEN: dict[str, dict[tuple[str, bool], Deviation]] = {
    "tpu": {
        ("entropy", True): Deviation(0.2, 0.42, 4),
        ("lfbyte", True): Deviation(0.75, 0.94, 4),
        ("blt", True): Deviation(0.01, 0.33, 8),
        ("megabyte", True): Deviation(0.03, 0.21, 8),
        ("blt", False): Deviation(-0.17, 0.34, 22),
        ("lfbyte", False): Deviation(0.24, 0.94, 12),
        ("entropy", False): Deviation(0.05, 0.08, 4),
        ("megabyte", False): Deviation(-0.15, 0.09, 24),
    }
}
"""Platform → (architecture, whether small) → what was seen: on a v5e with 4 rows per chip."""


def seen(model: ArchitectureConfig, platform: str) -> Deviation | None:
    """What was seen for models like this one; None if nothing was."""
    small = model.parameter_count() < SMALL
    return SEEN.get(platform, {}).get((model.architecture, small))
