"""Which prompts of a batch are read next: a plan that both packages carry out.

Short prompts are read several at a time and long ones in parts, so that no pass takes long. What a
slot has read of the same prompt is copied, be it the slot itself, and of a prompt that begins alike
if that saves a pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PART_BYTES = 512
"""Bytes of a prompt that one pass reads, if the model can go on behind them."""

GROUP = 8
"""Prompts that one pass reads at most while texts are being written, which wait for it."""

_GROUP_BYTES = 128  # of each of these prompts


def many(slots: int) -> int:
    """Prompts that one pass reads at most while no text is being written.

    Half of a batch that is filled at once: two passes take much less than one for every eight.
    """
    return max(GROUP, slots // 2)


class Pass(NamedTuple):
    """The next work. All of its slots go on at `start`, for up to `size` bytes.

    If there are `sources`, the slots take over what these have read, and nothing is computed.
    """

    slots: Sequence[int]
    start: int
    size: int
    sources: Sequence[int] = ()


class Prompts:
    """The prompts of all slots; `part` is the longest part of one, and None if it is all of it.

    A prompt is read up to its last whole round of `round_length` bytes.
    """

    def __init__(self, round_length: int, part: int | None) -> None:
        self._round, self.part = round_length, part
        self._known: dict[int, bytes] = {}
        """What the row of each slot holds at least; also of texts that have ended."""
        self._waiting: dict[int, bytes] = {}
        """What is to be read, in the order in which it came."""
        self._left: dict[int, bytes] = {}
        """What the rows of slots in `_waiting` still hold of the texts before."""
        self._short_next = True

    @property
    def waiting(self) -> bool:
        """Whether something is left to read."""
        return bool(self._waiting)

    def join(self, slot: int, prompt: bytes) -> None:
        """A prompt to be read into a slot, in the place of what it holds."""
        self._left[slot] = self._known.pop(slot, b"")
        self._waiting[slot] = prompt[: self._whole(len(prompt))]

    def leave(self, slot: int) -> None:
        """The slot's prompt is not read on."""
        self._waiting.pop(slot, None)

    def forget(self, slot: int) -> None:
        """The slot's row may not be copied."""
        self._known.pop(slot, None)
        self._left.pop(slot, None)

    def next(self, most: int = GROUP) -> Pass | None:
        """What to do next, with at most so many prompts; `done` must follow."""
        if not self._waiting:
            return None
        return self._copies(most) or self._computed(most)

    def done(self, work: Pass) -> list[int]:
        """Notes that it has been done; gives the slots whose prompts have been read."""
        ready = []
        for at, slot in enumerate(work.slots):
            prompt = self._waiting[slot]
            known = prompt[: work.start + work.size]
            if work.sources:
                source = work.sources[at]
                held = self._left[slot] if source == slot else self._known[source]
                known = prompt[: self._shared(prompt, held)]
            self._known[slot] = known
            self._left.pop(slot, None)
            if len(known) == len(prompt):
                del self._waiting[slot]
                ready.append(slot)
        return ready

    def _copies(self, most: int) -> Pass | None:
        """Slots that take over what others have read."""
        found = {}
        whole = {slot: known for slot, known in self._known.items() if slot not in self._waiting}
        for slot, prompt in self._waiting.items():
            if slot in self._known or not prompt or len(found) == most:
                continue
            least, rows = self._least(prompt), whole | {slot: self._left.get(slot, b"")}
            shared = {
                other: self._shared(prompt, held)
                for other, held in rows.items()
                if held.startswith(least)
            }
            if shared:
                found[slot] = max(shared, key=lambda other: shared[other])
        return Pass(list(found), 0, 0, list(found.values())) if found else None

    def _computed(self, group: int) -> Pass:
        """A part of the long prompt that came first or, in turns, a group of short prompts."""
        ready, ahead = [], [prompt for slot, prompt in self._waiting.items() if slot in self._known]
        for slot, prompt in self._waiting.items():
            if slot in self._known:
                ready.append(slot)
                continue
            least = self._least(prompt)  # what another one is about to read, is copied then
            if not prompt or not any(other.startswith(least) for other in ahead):
                ready.append(slot)
            ahead.append(prompt)
        most = min(_GROUP_BYTES, self.part or _GROUP_BYTES)
        fits = lambda slot: slot not in self._known and len(self._waiting[slot]) <= most  # noqa: E731
        short, long = [slot for slot in ready if fits(slot)], [s for s in ready if not fits(s)]
        if short and (self._short_next or not long):
            self._short_next = False
            return Pass(short[:group], 0, max(len(self._waiting[slot]) for slot in short[:group]))
        self._short_next = True
        start, size = len(self._known.get(long[0], b"")), len(self._waiting[long[0]])
        return Pass(long[:1], start, min(size - start, self.part or size))

    def _least(self, prompt: bytes) -> bytes:
        """The beginning that another slot must have read for its copy to save a pass."""
        part = self.part or max(1, len(prompt))
        return prompt[: len(prompt) - max(0, -(-len(prompt) // part) - 1) * part]

    def _shared(self, prompt: bytes, held: bytes) -> int:
        """Bytes at the beginning of a prompt that a row holds, in whole rounds."""
        most = min(len(prompt), len(held))
        mine, theirs = (np.frombuffer(each[:most], np.uint8) for each in (prompt, held))
        differs = np.flatnonzero(mine != theirs)
        return self._whole(int(differs[0]) if differs.size else most)

    def _whole(self, size: int) -> int:
        return size // self._round * self._round
