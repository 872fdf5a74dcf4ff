"""Stop texts: generation ends where one appears, and none of it is given out.

The first stop is the one that is complete first; of several that end at the same byte it is the
longest. So the result is the same however the text is divided into pieces.
"""

from collections.abc import Sequence

from bytelm.config import require

MOST_STOPS = 16
LONGEST_STOP = 256
"""Bytes of the longest stop text."""


class StopScanner:
    """Finds the first stop in the text of one row, which arrives in pieces.

    With the stop `STOP`, the pieces `a`, `bST` and `Ux` give out `a`, `b` and `STUx`: `ST` is held
    back until it is known not to be a stop.

    Raises `ValueError` for more than 16 stops, and for one that is empty or longer than 256 bytes.
    """

    def __init__(self, stops: Sequence[bytes]) -> None:
        self._stops = _checked(stops)
        self._held = b""
        self._met = False

    def feed(self, piece: bytes) -> tuple[bytes, bool]:
        """What may be given out now, and whether a stop was met, now or before.

        Nothing of a stop is given out and nothing after it; a tail that may still become one is
        held back.
        """
        if self._met:
            return b"", True
        text = self._held + piece
        start = _first_stop(text, self._stops)
        if start is not None:
            self._held, self._met = b"", True
            return text[:start], True
        kept = len(text) - _open_tail(text, self._stops)
        self._held = text[kept:]
        return text[:kept], False

    def finish(self) -> bytes:
        """What was held back and is not a stop, now that the text has ended."""
        held, self._held = self._held, b""
        return held


def cut_at_stop(text: bytes, stops: Sequence[bytes]) -> tuple[bytes, bool]:
    """A whole text up to its first stop, and whether it has one; as `StopScanner` gives it out.

    Raises `ValueError` as `StopScanner` does.
    """
    start = _first_stop(text, _checked(stops))
    return (text, False) if start is None else (text[:start], True)


def _checked(stops: Sequence[bytes]) -> tuple[bytes, ...]:
    rows = not isinstance(stops, str | bytes) and all(isinstance(stop, bytes) for stop in stops)
    require(rows, "stop: give a list of bytes, such as [b'text']")
    require(len(stops) <= MOST_STOPS, f"stop: {len(stops)} texts; give at most {MOST_STOPS}")
    for stop in stops:
        size = len(stop)
        require(size > 0, "stop: a text is empty; give at least one byte, or leave it out")
        require(size <= LONGEST_STOP, f"stop: a text has {size} bytes; give at most {LONGEST_STOP}")
    return tuple(stops)


def _first_stop(text: bytes, stops: tuple[bytes, ...]) -> int | None:
    """Where the first stop starts; None without one."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _open_tail(text: bytes, stops: tuple[bytes, ...]) -> int:
    """Length of the longest end of `text` with which a stop starts."""
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
