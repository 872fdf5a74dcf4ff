"""`metrics.jsonl`, bits per byte, throughput, and model FLOP utilisation."""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelm.chips import peak_flops
from bytelm.files import errors_about, one_line, replace_file, require_plain_file
from bytelm.goodput import FIELDS
from bytelm.tracking import Tracker

METRIC = "validation_bits_per_byte"
"""The metric of "best" checkpoints: its lowest finite value wins."""

WALL_CLOCK = ("bytes_per_second", "seconds", "mfu", *FIELDS)
"""Fields that differ between two runs of the same training."""


def comparable(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without the fields of `WALL_CLOCK`; those of nothing else are left out."""
    kept = [{k: v for k, v in record.items() if k not in WALL_CLOCK} for record in records]
    return [record for record in kept if record.keys() != {"step"}]


def bits_per_byte(nats: float, count: int) -> float:
    """Mean code length in bits of `count` bytes that cost `nats` in total; NaN of none.

    >>> round(bits_per_byte(nats=math.log(256) * 10, count=10), 6)
    8.0
    """
    return nats / count / math.log(2) if count else math.nan


@dataclass(frozen=True)
class Evaluation:
    """Summed nats and the number of ids they cover: bytes, and ends of documents if requested."""

    nats: float
    count: int

    @property
    def bits_per_byte(self) -> float:
        """Mean code length in bits."""
        return bits_per_byte(self.nats, self.count)


def validation_record(results: Mapping[str, Evaluation]) -> dict[str, float]:
    """What is logged of an evaluation of several sets, by name: all together, then each.

    A set without a name, "", and one of which nothing was counted have no figure of their own.
    """
    count = sum(each.count for each in results.values())
    whole = Evaluation(math.fsum(each.nats for each in results.values()), count)
    record = {"validation_loss": whole.nats / count if count else math.nan}
    record[METRIC] = whole.bits_per_byte
    named = {name: each.bits_per_byte for name, each in results.items() if name and each.count}
    return record | {f"{METRIC}/{name}": bits for name, bits in named.items()}


def validation_line(step: int, record: Mapping[str, float]) -> str:
    """A line for people about a record of `validation_record`."""
    bits = score(record)
    line = f"step {step}: validation {'is not finite' if bits is None else f'{bits:.4f} bits'}"
    named = [key for key in record if key.startswith(f"{METRIC}/")]
    each = ", ".join(f"{key.partition('/')[2]} {record[key]:.4f}" for key in named)
    return line + " per byte" * (bits is not None) + f" ({each})" * bool(each)


def add_bits(values: dict[str, float]) -> None:
    """Adds bits per byte to the metrics of a step that have a `loss`, and a `loss/NAME` by source.

    A source without a row in that step, whose loss is NaN, is left out.
    """
    for key in [key for key in values if key.startswith("loss/") and math.isnan(values[key])]:
        del values[key]
    for key in [key for key in values if key == "loss" or key.startswith("loss/")]:
        values[f"bits_per_byte{key.removeprefix('loss')}"] = bits_per_byte(values[key], 1)


def skipped_step(
    step: int, count: int, values: Mapping[str, float]
) -> tuple[str, dict[str, float]]:
    """A line for people and a record about a step that was skipped, the run's `count`-th."""
    why = "its loss or gradient norm is not finite"
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return f"step {step}: skipped because {why} ({count} so far)", {
        "step": step,
        "skipped": count,
        **finite,
    }


def score(metrics: Mapping[str, Any] | None) -> float | None:
    """The score by which "best" compares; None without an evaluation or if it is not finite."""
    value = (metrics or {}).get(METRIC)
    return value if value is not None and math.isfinite(value) else None


class MetricsLog:
    """Appends one JSON object per line; each is complete on disk before the next begins."""

    def __init__(self, path: Path, step: int, trackers: Sequence[Tracker] = ()):
        """Opens `path` for a run at step `step`: lines of later steps are removed.

        A file with damaged lines is moved to `path`.damaged, and the others are kept, with a
        warning on standard error. `trackers` receive every record as well and are closed with the
        file. Raises `ValueError` if the file cannot be read or written.
        """
        self.path = path
        self.records: list[dict[str, Any]] = []
        """The records that were kept."""
        self.last: dict[str, Any] = {}
        """The last record that the file held, kept or not."""
        self._trackers = trackers
        with _writing(path):
            if path.exists() and str(path) != os.devnull:
                lines = list(_lines(path))
                damaged = [line for line in lines if isinstance(line, str)]
                records = [line for line in lines if isinstance(line, dict)]
                self.records = [record for record in records if record["step"] <= step]
                self.last = records[-1] if records else {}
                if damaged:
                    aside = path.with_name(path.name + ".damaged")
                    os.replace(path, aside)
                    print(
                        f"warning: {path}: {damaged[0]}; the file is now {aside}, and the run "
                        "continues with the lines that can be read",
                        file=sys.stderr,
                        flush=True,
                    )
                text = "".join(_dump(record) for record in self.records)
                replace_file(path, text.encode())
            # Without a buffer: after a failed write nothing is left that closing would write again.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    @property
    def skipped(self) -> int:
        """How many steps were skipped before this log was opened."""
        return sum("skipped" in record for record in self.records)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line; null stands for values that JSON cannot express.

        Raises `ValueError` if it cannot be written.
        """
        record = {name: None if _is_no_json(value) else value for name, value in record.items()}
        line = _dump(record).encode()
        with _writing(self.path):
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for tracker in self._trackers:
            tracker.write(record)

    def close(self) -> None:
        """Closes the file, then the trackers."""
        with _writing(self.path):
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a metrics file.

    A last line that a kill cut short is left out. Raises `ValueError` for a file that cannot be
    read and for any other line that is not an object of numbers with a step.
    """
    records = []
    with errors_about(path, "give the metrics.jsonl of a run"):
        for line in _lines(path):
            if isinstance(line, str):
                raise ValueError(f"{line}; remove that line")
            records.append(line)
    return records


_LONGEST_LINE = 2**20
"""Bytes of the longest line that is read."""


def _lines(path: Path) -> Iterator[dict[str, Any] | str]:
    """The records of a metrics file; for a damaged line, what is wrong with it."""
    require_plain_file(path)
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            whole = line.endswith(b"\n")
            if not whole and len(line) == _LONGEST_LINE:
                yield f"line {number} is longer than {_LONGEST_LINE} bytes"
                return
            try:
                yield _record(line)
            except (ValueError, RecursionError, OverflowError) as error:
                if whole:  # otherwise a kill cut it short
                    yield f"line {number} is damaged ({one_line(error, 100)})"


def _record(line: bytes) -> dict[str, Any]:
    record = json.loads(line.decode("utf-8"), parse_constant=lambda _: None)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("not an object with a step")
    for name, value in record.items():
        if value is not None and not isinstance(value, int | float):
            raise ValueError(f"{name}: not a number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name}: too large")
    return {name: None if _is_no_json(value) else value for name, value in record.items()}


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _is_no_json(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system into a one-line `ValueError` that names the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or one_line(error)
        hint = "make room or repair it, and run the same command again"
        raise ValueError(f"{path}: cannot be written ({why}); {hint}") from None


class Throughput:
    """Bytes per second and model FLOP utilisation since the last reading."""

    def __init__(self, flops_per_byte: float, devices: int, device: str):
        """`flops_per_byte` is the training cost, `device` the name of each device."""
        self._flops, self._devices = flops_per_byte, devices
        self._peak = peak_flops(device)
        self._reading: dict[str, float] = {}
        self._operations = self._measured = 0.0  # of all readings
        self.restart()

    @property
    def mean_mfu(self) -> float | None:
        """The model FLOP utilisation over all readings, None if the chip's peak is not known."""
        if self._peak is None or not self._measured:
            return None
        return self._operations / (self._measured * self._peak * self._devices)

    def add(self, count: int) -> None:
        """Counts `count` more trained bytes."""
        self._count += count

    def read(self) -> dict[str, float]:
        """The rates since the last reading or restart; the previous rates if nothing was added."""
        if self._reading and not self._count:
            return self._reading
        seconds = time.perf_counter() - self._since
        rates = {"bytes_per_second": self._count / seconds, "seconds": seconds}
        self._operations += self._count * self._flops
        self._measured += seconds
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
