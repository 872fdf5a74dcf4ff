"""What a person sees of a run without a terminal, and how a signal stops it."""

import math
import os
import signal
import sys
import time
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

from bytelm.config import Recipe

Signal = TypeVar("Signal", bound="StopSignal")

_LINE_SECONDS = 10.0
"""At most one progress line per this many seconds."""


class ProgressLines:
    """Plain progress lines on standard error, if `shown` at all."""

    def __init__(self, steps: int, shown: bool = True):
        self._steps, self._shown, self._last = steps, shown, float("-inf")
        self._first: tuple[int, float] | None = None

    def say(self, message: str) -> None:
        """Prints one line."""
        if self._shown:
            print(message, file=sys.stderr, flush=True)

    def show(self, step: int, record: dict[str, Any]) -> None:
        """Prints a finished step's rates, if some time has passed since the last line."""
        now = time.monotonic()
        # Only the time after the first report predicts the rest: before it, the step was compiled.
        since, begun = self._first = self._first or (step, now)
        if now - self._last > _LINE_SECONDS:
            self._last, line = now, f"step {step}/{self._steps}  {rates(record)}"
            if step > since:
                left = (now - begun) / (step - since) * (self._steps - step)
                line += f"  {timedelta(seconds=round(left))} left"
            self.say(line)


class GuessWarning:
    """Says once that a loss is above that of a uniform guess although warm-up is over."""

    def __init__(self, recipe: Recipe) -> None:
        self._from, self._guess = recipe.optimizer.warmup_steps, math.log(recipe.model.vocab.size)

    def look(self, step: int, loss: float) -> str | None:
        """The warning, if it is due at this step, whose loss is in nats."""
        if step <= self._from or loss <= self._guess:
            return None
        self._from = sys.maxsize
        return (
            f"warning: step {step}: the loss of {loss:.3g} nats is above that of a uniform guess "
            f"({self._guess:.3g}) after warm-up; lower optimizer.learning_rate, or look at the data"
        )


class ReadingBar:
    """A context manager: a progress bar for reading that takes more than a second.

    It stands on standard error while that is a terminal and `rich` is installed, and vanishes.
    `total` is in bytes, None if unknown.
    """

    _PATIENCE = 1.0  # seconds

    def __init__(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._begun = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "ReadingBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def move(self, done: int) -> None:
        """Shows that `done` bytes of all are read."""
        if self._bar is None and time.monotonic() - self._begun > self._PATIENCE:
            self._begun = math.inf  # the bar starts once
            self._start()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)

    def _start(self) -> None:
        if not sys.stderr.isatty():
            return
        try:
            from rich import progress
            from rich.console import Console
        except ImportError:  # the PyTorch twin installs without it
            return
        columns = (progress.TextColumn("{task.description}"), progress.BarColumn())
        columns += (progress.DownloadColumn(), progress.TimeRemainingColumn())
        self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._what, total=self._total)
        self._bar.start()


def rates(record: dict[str, Any]) -> str:
    """Bits per byte, bytes per second and, where it is known, the MFU of a step's metrics."""
    text = f"{record['bits_per_byte']:.3f} bits/byte  {record['bytes_per_second'] / 1e3:,.1f} kB/s"
    return text + (f"  MFU {record['mfu']:.1%}" if "mfu" in record else "")


class StopSignal:
    """A context manager; true once SIGINT or SIGTERM arrived. A second one ends the process."""

    signals: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.seen = False

    def __bool__(self) -> bool:
        return self.seen

    def __enter__(self: Signal) -> Signal:
        self._old = {number: signal.signal(number, self.handle) for number in self.signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Notes the first signal, and ends the process at the second."""
        if self.seen:
            os._exit(128 + number)
        self.seen = True
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
