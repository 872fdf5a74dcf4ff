"""Texts with small damage, to see what a model makes of them: seeded, and the same everywhere."""

from collections.abc import Callable
from random import Random

SHARE = 0.05
"""Of the letters, or of the characters, that are touched."""


def perturb(documents: list[bytes], kind: str) -> list[bytes]:
    """The documents with one kind of damage; bytes that are not UTF-8 stay as they are."""
    change, rng = KINDS[kind], Random(0)
    return [change(document, rng) for document in documents]


def _swap_case(document: bytes, rng: Random) -> bytes:
    return _encode(_decode(document).swapcase())


def _swap_letters(document: bytes, rng: Random) -> bytes:
    letters = list(_decode(document))
    at = 0
    while at + 1 < len(letters):
        pair = letters[at : at + 2]
        if pair[0].isalpha() and pair[1].isalpha() and rng.random() < SHARE:
            letters[at : at + 2] = reversed(pair)
            at += 1
        at += 1
    return _encode("".join(letters))


def _drop_letters(document: bytes, rng: Random) -> bytes:
    return _encode(
        "".join(c for c in _decode(document) if not c.isalpha() or rng.random() >= SHARE)
    )


def _cut_characters(document: bytes, rng: Random) -> bytes:
    """Characters of several bytes lose their last one."""
    parts = []
    for character in _decode(document):
        part = _encode(character)
        parts.append(part[:-1] if len(part) > 1 and rng.random() < SHARE else part)
    return b"".join(parts)


def _decode(document: bytes) -> str:
    return document.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


KINDS: dict[str, Callable[[bytes, Random], bytes]] = {
    "case swapped": _swap_case,
    "letters swapped": _swap_letters,
    "letters dropped": _drop_letters,
    "UTF-8 truncated": _cut_characters,
}
"""Kinds of damage: every letter's case; of 5 % of the letters the order, or the letters themselves;
of 5 % of the characters beyond ASCII the last byte.
"""
