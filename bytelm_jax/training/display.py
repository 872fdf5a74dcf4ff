"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

import time
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 10.0
"""Without a terminal, at most one progress line per this many seconds."""


class Display:
    """A context manager around the training loop; writes to standard error, if `shown`."""

    def __init__(self, name: str, start: int, steps: int, shown: bool = True):
        self._console = Console(stderr=True, quiet=not shown)
        self._bar = Progress(
            TextColumn(name),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rates]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=steps, completed=start, rates="compiling …")
        self._steps, self._last = steps, float("-inf")
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """Prints one line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def show(self, step: int, record: dict[str, Any]) -> None:
        """Updates the bar and the rates to a finished step's metrics."""
        rates = (
            f"{record['bits_per_byte']:.3f} bits/byte  {record['bytes_per_second'] / 1e3:,.1f} kB/s"
        )
        if "mfu" in record:
            rates += f"  MFU {record['mfu']:.1%}"
        self._bar.update(self._task, completed=step, rates=rates)
        now = time.monotonic()
        # Only the time after the first report predicts the rest: before it, the step was compiled.
        since, begun = self._first = self._first or (step, now)
        if not self._console.is_terminal and now - self._last > _LINE_SECONDS:
            self._last = now
            if step > since:
                left = (now - begun) / (step - since) * (self._steps - step)
                rates += f"  {timedelta(seconds=round(left))} left"
            self.say(f"step {step}/{self._steps}  {rates}")
