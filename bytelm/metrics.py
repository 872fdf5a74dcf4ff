"""`metrics.jsonl`, bits per byte, throughput, and model FLOP utilisation."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelm.tracking import Tracker

METRIC = "validation_bits_per_byte"
"""The metric of "best" checkpoints: its lowest finite value wins."""

WALL_CLOCK = ("bytes_per_second", "seconds", "mfu")
"""Fields that differ between two runs of the same training."""

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "TPU v5p": 459e12, "TPU v4": 275e12}
"""Dense bfloat16 operations per second by the vendors' data sheets, by part of the device's name.
"""


def bits_per_byte(nats: float, count: int) -> float:
    """Mean code length in bits of `count` bytes that cost `nats` in total."""
    return nats / count / math.log(2)


@dataclass(frozen=True)
class Evaluation:
    """Summed nats and the number of ids they cover: bytes, and ends of documents if requested."""

    nats: float
    count: int

    @property
    def bits_per_byte(self) -> float:
        """Mean code length in bits."""
        return bits_per_byte(self.nats, self.count)


def score(metrics: dict[str, Any] | None) -> float | None:
    """The score by which "best" compares; None without an evaluation or if it is not finite."""
    value = (metrics or {}).get(METRIC)
    return value if value is not None and math.isfinite(value) else None


def peak_flops(device: str) -> float | None:
    """Peak operations per second of a device by its name; None if it is not in the table."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device), None)


class MetricsLog:
    """Appends one JSON object per line; each is complete on disk before the next begins."""

    def __init__(self, path: Path, step: int, trackers: Sequence[Tracker] = ()):
        """Opens `path` for a run at step `step`: lines of later steps are removed.

        `trackers` receive every record as well and are closed with the file.
        """
        if path.is_file():
            lines = [line for line in path.read_text("utf-8").splitlines() if _keeps(line, step)]
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_text("".join(line + "\n" for line in lines), "utf-8")
            os.replace(temporary, path)
        self.path = path
        self._trackers = trackers
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line and flushes it; null stands for values that JSON cannot express."""
        record = {name: None if _is_no_json(value) else value for name, value in record.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(record)

    def close(self) -> None:
        """Closes the file, then the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file."""
    records = []
    for line in path.read_text("utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a line that a kill cut short
    return records


def _is_no_json(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _keeps(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False


class Throughput:
    """Bytes per second and model FLOP utilisation since the last reading."""

    def __init__(self, flops_per_byte: float, devices: int, device: str):
        """`flops_per_byte` is the training cost, `device` the name of each device."""
        self._flops, self._devices = flops_per_byte, devices
        self._peak = peak_flops(device)
        self._reading: dict[str, float] = {}
        self.restart()

    def add(self, count: int) -> None:
        """Counts `count` more trained bytes."""
        self._count += count

    def read(self) -> dict[str, float]:
        """The rates since the last reading or restart; the previous rates if nothing was added."""
        if self._reading and not self._count:
            return self._reading
        seconds = time.perf_counter() - self._since
        rates = {"bytes_per_second": self._count / seconds, "seconds": seconds}
        if self._peak is not None:
            rates["mfu"] = rates["bytes_per_second"] * self._flops / (self._peak * self._devices)
        self.restart()
        self._reading = rates
        return rates

    def restart(self, flops_per_byte: float | None = None) -> None:
        """Excludes the time and bytes since the last reading (compilation, evaluation).

        `flops_per_byte` is the cost from now on, if it changes.
        """
        self._flops = self._flops if flops_per_byte is None else flops_per_byte
        self._count, self._since = 0, time.perf_counter()
