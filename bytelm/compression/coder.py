"""A range coder for many streams at once: one NumPy operation codes a byte of each stream.

Arithmetic coding narrows an interval [low, low + width) of numbers below 1 to the share that the
model gives to each byte, and writes the digits that all numbers of the interval share. Here the
digits are words of 16 bits and `low` and `width` have 64, so that with totals of about 2^30 the
code is longer than the model's own code length by less than one part in 100,000, plus one word.

Example with one stream: a byte whose share is [4, 6) of 8 turns [0, 1) into [0.5, 0.75); its first
two binary digits, 10, are settled.

Axes: S streams, of which the first K may still have bytes left.
"""

from collections.abc import Callable

import numpy as np

WORD_BYTES = 2
ONE = 2.0**30
"""The count of probability 1: float32 has no finer steps near it, and 256 of them fit 32 bits."""

_WORD = np.uint64(16)
_LEAST = np.uint64(1 << 48)  # a smaller width is multiplied by 2^16, and a word is written
_LAST_WORD = np.uint64(48)
_FULL = 0xFFFF


def shares(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first, size, total) of each row's value in `table`, cumulative counts uint32[K, 256]."""
    rows = np.arange(len(table))
    ends = table[rows, values].astype(np.uint64)
    before = table[rows, np.maximum(values, 1) - 1].astype(np.uint64)
    first = np.where(values > 0, before, np.uint64(0))
    return first, ends - first, table[:, -1].astype(np.uint64)


class Encoder:
    """Codes a byte of each stream at a time; `take` gives what is settled, `finish` the rest."""

    def __init__(self, streams: int) -> None:
        self._low = np.zeros(streams, np.uint64)
        self._width = np.full(streams, 2**64 - 1, np.uint64)
        self._words = np.zeros((streams, 1024), np.uint16)
        self._held = np.zeros(streams, np.int64)

    @property
    def held_bytes(self) -> int:
        """Bytes written and not yet taken, of all streams."""
        return int(self._held.sum()) * WORD_BYTES

    def encode(self, table: np.ndarray, values: np.ndarray) -> None:
        """Codes `values` int[K], given cumulative counts uint32[K, 256], in the first K streams."""
        first, size, total = shares(table, values)
        low, width = self._low[: len(values)], self._width[: len(values)]
        step = width // total
        low += step * first
        carried = np.flatnonzero(low < step * first)
        np.multiply(step, size, out=width)
        self._carry(carried)
        while (small := np.flatnonzero(width < _LEAST)).size:
            self._write(small, low[small] >> _LAST_WORD)
            low[small] <<= _WORD
            width[small] <<= _WORD

    def take(self) -> list[bytes]:
        """Each stream's words that no later byte can change, and forgets them.

        A carry passes through words of ones and ends in the word before them. So that one stays.
        """
        taken = []
        for row, held in enumerate(self._held.tolist()):
            open_words = np.flatnonzero(self._words[row, :held] != _FULL)
            cut = int(open_words[-1]) if open_words.size else 0
            taken.append(_packed(self._words[row, :cut]))
            self._words[row, : held - cut] = self._words[row, cut:held].copy()
            self._held[row] = held - cut
        return taken

    def finish(self) -> list[bytes]:
        """The rest of each stream: the shortest number in its interval, without trailing zeros."""
        last = self._low + (_LEAST - np.uint64(1))
        self._carry(np.flatnonzero(last < self._low))
        self._write(np.arange(len(last)), last >> _LAST_WORD)
        rest = []
        for row, held in zip(self._words, self._held.tolist(), strict=True):
            some = np.flatnonzero(row[:held])
            rest.append(_packed(row[: int(some[-1]) + 1 if some.size else 0]))
        self._held[:] = 0
        return rest

    def _write(self, rows: np.ndarray, words: np.ndarray) -> None:
        at = self._held[rows]
        if int(at.max()) >= self._words.shape[1]:
            self._words = np.concatenate([self._words, np.zeros_like(self._words)], axis=1)
        self._words[rows, at] = words.astype(np.uint16)
        self._held[rows] = at + 1

    def _carry(self, rows: np.ndarray) -> None:
        at = self._held[rows] - 1
        while rows.size:
            words = self._words[rows, at]
            self._words[rows, at] = words + np.uint16(1)
            overflows = words == _FULL
            rows, at = rows[overflows], at[overflows] - 1


def _packed(words: np.ndarray) -> bytes:
    return words.astype(">u2").tobytes()


class Decoder:
    """Undoes `Encoder`: needs the same counts in the same order.

    `more()` gives the next piece of every stream, as `take` and `finish` gave them, and None after
    the last; it is called when some stream has run out. Words past the end are zero.
    """

    def __init__(self, streams: int, more: Callable[[], list[bytes] | None]) -> None:
        self._more: Callable[[], list[bytes] | None] | None = more
        self._words = np.zeros((streams, 0), np.uint16)
        self._at = np.zeros(streams, np.int64)
        self._ends = np.zeros(streams, np.int64)
        self._width = np.full(streams, 2**64 - 1, np.uint64)
        self._code = np.zeros(streams, np.uint64)  # the number read, minus the interval's `low`
        everyone = np.arange(streams)
        for _ in range(4):
            self._code = (self._code << _WORD) | self._read(everyone)

    def decode(self, table: np.ndarray) -> np.ndarray:
        """The next value int64[K] of the first K streams: cumulative counts uint32[K, 256]."""
        code, width = self._code[: len(table)], self._width[: len(table)]
        total = table[:, -1].astype(np.uint64)
        step = width // total
        target = np.minimum(code // step, total - np.uint64(1)).astype(np.uint32)
        values = (table <= target[:, None]).sum(axis=1)
        first, size, _ = shares(table, values)
        code -= step * first
        np.multiply(step, size, out=width)
        while (small := np.flatnonzero(width < _LEAST)).size:
            code[small] = (code[small] << _WORD) | self._read(small)
            width[small] <<= _WORD
        return values

    def _read(self, rows: np.ndarray) -> np.ndarray:
        while self._more is not None and (self._at[rows] >= self._ends[rows]).any():
            self._refill(self._more())
        at = self._at[rows]
        self._at[rows] = at + 1
        inside = at < self._ends[rows]
        words = np.zeros(len(rows), np.uint64)
        words[inside] = self._words[rows[inside], at[inside]]
        return words

    def _refill(self, pieces: list[bytes] | None) -> None:
        if pieces is None:
            self._more = None
            return
        left = [row[a:e] for row, a, e in zip(self._words, self._at, self._ends, strict=True)]
        new = [np.frombuffer(piece, ">u2") for piece in pieces]
        self._ends = np.array([len(a) + len(b) for a, b in zip(left, new, strict=True)])
        self._words = np.zeros((len(new), int(self._ends.max())), np.uint16)
        for row, a, b in zip(self._words, left, new, strict=True):
            row[: len(a)], row[len(a) : len(a) + len(b)] = a, b
        self._at[:] = 0
