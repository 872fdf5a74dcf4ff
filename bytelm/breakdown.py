"""Bits per byte of parts of the data: by path, file, document, script, position in the window.

Every counted byte belongs to one group of each kind, so the groups add up to the whole.
"""

import functools
import math
import unicodedata

import numpy as np

from bytelm.data import Windows
from bytelm.metrics import Evaluation

KINDS = ("source", "file", "document", "script", "position")
"""By what data can be divided: `source` is a path as it was given, `file` each file in it."""

NOT_UTF8, COMMON = "not UTF-8", "Common"

_SCRIPTS = {
    "CJK": "Han", "IDEOGRAPHIC": "Han", "KANGXI": "Han", "BOPOMOFO": "Bopomofo",
    "COMBINING": COMMON, "MATHEMATICAL": COMMON, "MODIFIER": COMMON, "VARIATION": COMMON,
    "MICRO": COMMON, "SCRIPT": COMMON, "DOUBLE-STRUCK": COMMON, "BLACK-LETTER": COMMON,
    "KATAKANA-HIRAGANA": COMMON, "ALEF": COMMON, "BET": COMMON, "GIMEL": COMMON, "DALET": COMMON,
    "FEMININE": "Latin", "MASCULINE": "Latin", "OHM": "Greek", "KELVIN": "Latin",
    "ANGSTROM": "Latin", "CANADIAN": "Canadian Aboriginal",
}  # fmt: skip
"""Where the first word of a letter's name is not the name of its script."""

_TWO_WORDS = {
    "OLD",
    "NEW",
    "TAI",
    "MEETEI",
    "OL",
    "PHAGS-PA",
    "LINEAR",
    "SYLOTI",
    "PAHAWH",
    "NYIAKENG",
}


class Breakdown:
    """Collects the nats of the bytes of `windows` in groups of one kind."""

    def __init__(self, windows: Windows, kind: str) -> None:
        self._windows, self._kind = windows, kind
        self._numbers: dict[str, int] = {}
        self._nats: list[list[float]] = []
        self._counts: list[int] = []

    def add(self, number: int, nats: np.ndarray, counted: np.ndarray) -> None:
        """Adds window `number`: nats [T], and which of its ids are counted, bool [T]."""
        groups = self._groups(number)
        for group in np.unique(groups[counted]).tolist():
            inside = counted & (groups == group)
            self._nats[group].append(math.fsum(nats[inside].tolist()))
            self._counts[group] += int(inside.sum())

    def rows(self) -> dict[str, Evaluation]:
        """Name → what its bytes cost, in the order of the data; scripts by their bytes."""
        rows = {
            name: Evaluation(math.fsum(self._nats[number]), self._counts[number])
            for name, number in self._numbers.items()
        }
        if self._kind == "script":
            rows = dict(sorted(rows.items(), key=lambda row: -row[1].count))
        return {name: row for name, row in rows.items() if row.count}

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._numbers)
            self._nats.append([])
            self._counts.append(0)
        return self._numbers[name]

    def _groups(self, number: int) -> np.ndarray:
        """The group of each position of a window."""
        length = self._windows.length
        if self._kind == "position":
            return np.array([self._number(name) for name in positions(length)])
        groups = np.zeros(length, np.int64)
        for document, at, begin, end in self._windows.parts(number):
            if self._kind == "script":
                groups[begin:end] = self._scripts(document, at, at + end - begin)
            else:
                groups[begin : end + 1] = self._number(self._name(document))
        return groups

    def _name(self, document: int) -> str:
        file = self._windows.corpus.source(document)
        if self._kind == "source":
            return file.given or file.name
        name = file.name if file.given.endswith(file.name) else f"{file.given}: {file.name}"
        return name if self._kind == "file" else f"{document}: {name}"

    def _scripts(self, document: int, start: int, stop: int) -> list[int]:
        """The groups of a document's bytes; a character that is cut counts with its whole."""
        corpus = self._windows.corpus
        size = int(corpus.lengths[document])
        first = max(0, start - 3)  # a character has at most four bytes
        data = corpus.read(document, first, min(size, stop + 3)).tobytes()
        names = scripts(data)[start - first : stop - first]
        return [self._number(name) for name in names]


@functools.lru_cache(maxsize=8)
def positions(length: int) -> tuple[str, ...]:
    """The name of each position in a window: 0, 1, 2–3, 4–7, …"""
    names = []
    for position in range(length):
        first = 1 << max(position.bit_length() - 1, 0) if position else 0
        last = min(max(2 * first - 1, first), length - 1)
        names.append(str(first) if first == last else f"{first}–{last}")
    return tuple(names)


def scripts(data: bytes) -> list[str]:
    """The name of each byte's script: that of its character."""
    names: list[str] = []
    for character in data.decode("utf-8", "surrogateescape"):
        names += _bytes_of(character)
    return names


@functools.lru_cache(maxsize=1 << 16)
def _bytes_of(character: str) -> tuple[str, ...]:
    if "\udc80" <= character <= "\udcff":
        return (NOT_UTF8,)
    return (script(character),) * len(character.encode("utf-8"))


def script(character: str) -> str:
    """The script of a letter or mark by its Unicode name; `Common` for all other characters."""
    if unicodedata.category(character)[0] not in "LM":
        return COMMON
    words = unicodedata.name(character, COMMON).split()
    if words[0] in ("FULLWIDTH", "HALFWIDTH", "SMALL") and len(words) > 1:
        words = words[1:]
    if words[0] in _SCRIPTS:
        return _SCRIPTS[words[0]]
    count = 2 if words[0] in _TWO_WORDS and len(words) > 2 else 1
    return " ".join(words[:count]).title()
