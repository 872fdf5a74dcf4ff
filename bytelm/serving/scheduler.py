"""Texts that share a batch: a thread that lets them join, advances them and hands out what is new.

A text waits in order of arrival for a free slot. One that nobody waits for any more is dropped
before the next advance, and so is one that has met a stop text.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

from bytelm.generation.stops import StopScanner
from bytelm.serving.engine import Engine, Scores, Settings, Written

SECONDS = 0.1
"""How long an advance should take when all slots are busy: so long a reader waits."""

TOGETHER = 0.002
"""Texts that come no further apart start together if no others are being written.

Of a burst, the first would otherwise be written alone while the others wait for it.
"""

STOP_SECONDS = 2.0
"""How long texts may go on once the server is to stop."""

STOPPING = "the server is stopping"

End = Literal["stop", "length", "error"]


class Piece(NamedTuple):
    """What of a text is new and certain."""

    data: bytes
    scores: Scores | None
    end: End | None
    """Why the text is complete; "stop" also if the model ended it. None if it goes on."""
    error: str | None = None


class QueueFull(Exception):
    """More texts wait than may."""


class Failed(Exception):
    """The engine has failed, and nothing is generated any more."""


class Text:
    """A text that is asked for; `index` is its number in the request, `inbox` takes its pieces.

    `cancelled` is for the scheduler, `complete` for whoever reads the pieces.
    """

    def __init__(
        self,
        index: int,
        prompt: bytes,
        settings: Settings,
        stop: Sequence[bytes],
        inbox: Callable[[int, Piece], None],
    ) -> None:
        self.index, self.prompt, self.settings, self.inbox = index, prompt, settings, inbox
        self.cancelled = self.complete = False
        self._scanner = StopScanner(stop)
        self._scores: Scores | None = None

    def piece(self, new: Written) -> Piece:
        """What may be given out, now that the engine has written more."""
        if new.error is not None:
            return Piece(b"", None, "error", new.error)
        data, met = self._scanner.feed(new.data)
        if new.end is not None and not met:
            data += self._scanner.finish()
        end: End | None = "stop" if met or new.end == "eos" else new.end
        return Piece(data, self._scores_of(new.scores, len(data)), end)

    def _scores_of(self, new: Scores | None, count: int) -> Scores | None:
        """The scores of the next `count` bytes; the others are kept for the bytes held back."""
        if new is None:
            return None
        known = new if self._scores is None else self._scores.joined([new])
        self._scores = known.cut(count)
        return known.cut(0, count)


class Counts(NamedTuple):
    """How many texts are being written, how many wait, and the advances so far.

    `seconds` is what the engine has taken to let texts join, to read prompts and to advance.
    """

    active: int
    waiting: int
    advances: int
    seconds: Mapping[str, float]


class Scheduler:
    """Runs an engine in a thread of its own. `queue` texts may wait.

    `deliver` is called in that thread, once an advance, with all new pieces; `ready` turns true
    when everything is compiled.
    """

    def __init__(
        self, engine: Engine, queue: int, deliver: Callable[[list[tuple[Text, Piece]]], None]
    ) -> None:
        self._engine, self._queue, self._deliver = engine, queue, deliver
        self._changed = threading.Condition()
        self._waiting: deque[Text] = deque()
        self._active: dict[int, Text] = {}
        self._pieces: list[tuple[Text, Piece]] = []
        self._closed, self._until = False, 0.0
        self._seconds_per_round, self._advances = 0.0, 0
        self._seconds = {"join": 0.0, "read": 0.0, "advance": 0.0}
        self._reading = False
        self._written: set[int] = set()
        """The slots of texts that the last advance has added to and that go on."""
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="bytelm scheduler", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Counts:
        """Of now."""
        return Counts(len(self._active), len(self._waiting), self._advances, dict(self._seconds))

    def submit(self, texts: Sequence[Text]) -> None:
        """Adds texts, all of them or, by `QueueFull` and `Failed`, none."""
        with self._changed:
            if self.failure is not None or self._closed:
                if self._closed:
                    raise Failed(STOPPING)
                raise Failed(f"the model does not answer any more: {self.failure}")
            free = self._engine.slots - len(self._active)
            if len(self._waiting) + len(texts) > self._queue + free:
                raise QueueFull
            self._waiting.extend(texts)
            self._changed.notify()

    def cancel(self, texts: Sequence[Text]) -> None:
        """Drops texts before the next advance; those that are complete are left as they are."""
        with self._changed:
            for text in texts:
                text.cancelled = True
            self._changed.notify()

    @property
    def closed(self) -> bool:
        """Whether it takes no texts any more because it is to stop."""
        return self._closed

    def close(self) -> None:
        """Takes no texts any more, and ends the thread.

        Texts that are not complete `STOP_SECONDS` later end with an error.
        """
        with self._changed:
            self._closed, self._until = True, time.monotonic() + STOP_SECONDS
            self._changed.notify()
        self._thread.join(30)

    def _run(self) -> None:
        try:
            while self._wait():
                if not self._written:  # no advance may follow during which to hand out
                    self._hand_out()
                    if self._waiting:
                        self._gather()
                self._drop_cancelled()
                self._join()
                if self._active:
                    self._read()
                    self._advance()
            self._end_all(STOPPING)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}".splitlines()[0])

    def _wait(self) -> bool:
        """Whether there is something to do, once there is; False at the end."""
        with self._changed:
            while not (self._closed or self._waiting or self._active or self._pieces):
                self._changed.wait()
            if not self._closed:
                return True
            left = self._waiting or self._active or self._pieces
            return bool(left) and time.monotonic() < self._until

    def _gather(self) -> bool:
        """Waits for texts that come together; whether there is one for a free slot."""
        until, seen = time.perf_counter() + SECONDS / 2, -1
        while seen < len(self._waiting) < self._engine.slots - len(self._active):
            if self._closed or time.perf_counter() > until:
                break
            seen = len(self._waiting)
            time.sleep(TOGETHER)  # to be told of each would take the time of those that come
        return bool(self._waiting) and len(self._active) < self._engine.slots

    def _drop_cancelled(self) -> None:
        for slot in [slot for slot, text in self._active.items() if text.cancelled]:
            self._engine.leave(slot)
            del self._active[slot]
            self._written.discard(slot)
        with self._changed:
            if any(text.cancelled for text in self._waiting):
                self._waiting = deque(text for text in self._waiting if not text.cancelled)

    def _join(self) -> None:
        """Fills free slots."""
        free = [slot for slot in range(self._engine.slots) if slot not in self._active]
        with self._changed:
            new = {slot: self._waiting.popleft() for slot in free[: len(self._waiting)]}
            self._active.update(new)
        if new:
            with self._timed("join"):
                self._engine.join([(at, text.prompt, text.settings) for at, text in new.items()])
            self._reading = True

    def _read(self) -> None:
        """Reads prompts, but for no longer than an advance takes; half of it if others wait.

        Those that come meanwhile are read as well, so that texts that came together are written
        together, and the last of them do not keep the whole batch at work.
        """
        writing = bool(self._written)
        until = time.perf_counter() + SECONDS / (2 if writing else 1)
        while time.perf_counter() < until:
            if self._reading:
                with self._timed("read"):
                    self._reading = self._engine.read(writing)
            elif writing or not self._gather():
                break
            self._join()

    def _advance(self) -> None:
        rounds = 1
        if self._seconds_per_round:
            # Short while there is room or prompts are to be read, so that nobody waits long.
            busy = 0.0 if self._reading else len(self._active) / self._engine.slots
            rounds = int(SECONDS * (1 + 3 * busy) / 4 / self._seconds_per_round)
        rounds = max(1, min(rounds, self._engine.most_rounds))
        before = self._seconds["advance"]
        # Handed out once the device is at work: whoever reads them takes the host's time.
        with self._timed("advance"):
            written, rounds = self._engine.advance(rounds, self._hand_out)
        self._advances += 1
        if rounds:
            took, known = (self._seconds["advance"] - before) / rounds, self._seconds_per_round
            self._seconds_per_round = known + (took - known) / 5 if known else took
        for new in written:
            text = self._active[new.slot]
            piece = text.piece(new)
            if piece.end is not None:
                del self._active[new.slot]
                if new.end is None and new.error is None:
                    self._engine.leave(new.slot)
            if (piece.data or piece.end) and not text.cancelled:
                self._pieces.append((text, piece))
        self._written = {new.slot for new in written if new.slot in self._active}

    @contextmanager
    def _timed(self, work: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[work] += time.perf_counter() - began

    def _hand_out(self) -> None:
        """Gives out what the advance before has written."""
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._deliver(pieces)

    def _fail(self, error: str) -> None:
        with self._changed:
            self.failure = error
        self._end_all(error)

    def _end_all(self, error: str) -> None:
        """Tells everybody who still waits."""
        with self._changed:
            texts = [*self._active.values(), *self._waiting]
            self._active.clear()
            self._waiting.clear()
        self._pieces += [(text, Piece(b"", None, "error", error)) for text in texts]
        self._hand_out()
