"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere."""

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

from bytelm.progress import ProgressLines, rates


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
        self._lines = ProgressLines(steps, shown and not self._console.is_terminal)

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
        self._bar.update(self._task, completed=step, rates=rates(record))
        self._lines.show(step, record)
