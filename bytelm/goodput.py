"""Where a run's wall time goes: into steps, or into something else; across restarts."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

KINDS: tuple[str, ...] = ("steps", "start", "compile", "data", "evaluation", "checkpoint", "lost")
"""What time goes into; "lost" are steps that were done again, after a restart."""

TOTAL = "wall_seconds"
"""The field of all seconds; a kind's is this and its name, as "wall_seconds/steps"."""

FIELDS = ("goodput", TOTAL, *(f"{TOTAL}/{kind}" for kind in KINDS))
"""Fields of a record: the share of wall time spent in steps, and seconds."""

_LEAST_SHARE = 0.0005
"""What took less of the time is not mentioned."""


class WallClock:
    """Adds up the seconds of a run by kind; those of a new run start with "start"."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since = "start", time.perf_counter()

    def resume(self, records: Sequence[Mapping[str, Any]], last: Mapping[str, Any], step: int):
        """Continues the count of a run that goes on at `step`.

        `records` are those up to `step`, and `last` is the last that the run had written: the steps
        between them are lost. Nobody knows what was done after `last`, or how long a run was gone.
        """
        counted = [record for record in records if _is_count(record)]
        if not _is_count(last):
            last = counted[-1] if counted else {}
        for kind in KINDS if last else ():
            self._seconds[kind] += last[f"{TOTAL}/{kind}"]
        kept = counted[-1] if counted else {"step": 0}
        steps = last.get("step", 0) - kept["step"]
        if steps > 0 and last["step"] > step:
            done = last[f"{TOTAL}/steps"] - kept.get(f"{TOTAL}/steps", 0.0)
            lost = max(done, 0.0) * (last["step"] - step) / steps
            self._seconds["steps"] -= lost
            self._seconds["lost"] += lost

    def switch(self, kind: str) -> str:
        """Counts the time from now on as `kind`; gives the kind of the time before."""
        before = self._kind
        self.count_as(before)
        self._kind = kind
        return before

    def count_as(self, kind: str) -> None:
        """Counts the time since the last change as `kind` instead."""
        now = time.perf_counter()
        self._seconds[kind] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """The time within this context, or within the function that it decorates, is of `kind`."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    @contextmanager
    def leaving(self, context: AbstractContextManager[Any], kind: str) -> Iterator[None]:
        """The same context, the time of whose end is of `kind`."""
        before = self._kind
        with context:
            yield
            before = self.switch(kind)
        self.switch(before)

    def batches(self, items: Iterable[T], is_idle: Callable[[], bool]) -> Iterator[T]:
        """`items`; waiting for one is of kind "data", and what follows it of kind "steps".

        Only if `is_idle` then: while devices are still busy with earlier steps, nothing waits.
        """
        iterator = iter(items)
        while True:
            self.switch("steps")
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.count_as("data" if is_idle() else "steps")
            yield item

    def record(self) -> dict[str, float]:
        """All of `FIELDS`, up to now."""
        self.count_as(self._kind)
        total = sum(self._seconds.values())
        counts = {f"{TOTAL}/{kind}": round(value, 3) for kind, value in self._seconds.items()}
        goodput = round(self._seconds["steps"] / total, 4) if total else 0.0
        return {"goodput": goodput, TOTAL: round(total, 3), **counts}

    def line(self, mfu: float | None) -> str:
        """A line for people: goodput, the mean MFU of the steps if known, and what took the rest.

        Kinds that took next to nothing are left out.
        """
        record = self.record()
        total = record[TOTAL]
        rest = {kind: record[f"{TOTAL}/{kind}"] for kind in KINDS if kind != "steps"}
        took = [
            f"{kind} {seconds:,.1f} s"
            for kind, seconds in sorted(rest.items(), key=lambda each: -each[1])
            if seconds > _LEAST_SHARE * total
        ]
        head = f"goodput {record['goodput']:.1%}: {record[f'{TOTAL}/steps']:,.1f} s of steps in "
        head += f"{total:,.1f} s"
        head += f", at an MFU of {mfu:.1%}" if mfu is not None else ""
        return f"{head}; the rest: {', '.join(took)}" if took else head


def _is_count(record: Mapping[str, Any]) -> bool:
    """Whether a record holds a whole count; those of older runs do not, and files get damaged."""
    return all(isinstance(record.get(f"{TOTAL}/{kind}"), int | float) for kind in KINDS)
