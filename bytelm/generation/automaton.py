"""Which bytes may follow: a byte automaton as tables, which both frameworks take as plain arrays.

Strict UTF-8 is RFC 3629, which is table 3-7 of the Unicode standard: no overlong forms, no
surrogates, nothing above U+10FFFF.
"""

import functools
from typing import NamedTuple

import numpy as np

END = 256
"""The column of `Automaton.allowed` that stands for the end of the text."""

_LONGEST = 4
"""Bytes of the longest character, and so the rows of `Automaton.allowed`."""

_ARCS = (
    (0, 0x00, 0x7F, 0), (0, 0xC2, 0xDF, 1), (0, 0xE0, 0xE0, 3), (0, 0xE1, 0xEC, 2),
    (0, 0xED, 0xED, 4), (0, 0xEE, 0xEF, 2), (0, 0xF0, 0xF0, 5), (0, 0xF1, 0xF3, 6),
    (0, 0xF4, 0xF4, 7),
    (1, 0x80, 0xBF, 0), (2, 0x80, 0xBF, 1), (3, 0xA0, 0xBF, 1), (4, 0x80, 0x9F, 1),
    (5, 0x90, 0xBF, 2), (6, 0x80, 0xBF, 2), (7, 0x80, 0x8F, 2),
)  # fmt: skip
"""(state, first byte, last byte, next state) of UTF-8; state 0 is between characters."""

_MISSING = np.array([0, 1, 2, 2, 2, 3, 3, 3])
"""Bytes that each of these states still needs until its character is complete."""


class Automaton(NamedTuple):
    """The bytes that may follow in each of S states, and the states that they lead to.

    All automata of this module have the same shapes, so one compiled program serves them all.
    """

    allowed: np.ndarray
    """bool[R, S, 257]: whether byte v, or in column 256 the end of the text, may follow in state s.

    The row for `left` more bytes that may be written, this one included, is min(left, R) − 1.
    """
    step: np.ndarray
    """int32[S, 256]: the state after byte v, which need not be an allowed one."""


@functools.lru_cache(maxsize=1)
def free() -> Automaton:
    """The automaton that allows everything, in the shapes of `valid_utf8`."""
    states = len(_MISSING)
    return Automaton(np.ones((_LONGEST, states, 257), bool), np.zeros((states, 256), np.int32))


@functools.lru_cache(maxsize=1)
def valid_utf8() -> Automaton:
    """The automaton of strict UTF-8.

    No byte is allowed from which the text cannot be completed within `left` bytes, and the end only
    between characters. A prompt that was cut so that `left` bytes cannot complete its character
    leads to a state in which nothing would be allowed; there the bytes that go on with the
    character stay allowed, so that there is something to sample from. Callers refuse such a request
    first: `least_bytes` says what it needs.

    A byte that is not allowed leads where it leads between characters: to the state of the
    character that it starts, or to state 0.
    """
    states = len(_MISSING)
    legal = np.zeros((states, 256), bool)
    step = np.zeros((states, 256), np.int32)
    for state, first, last, after in _ARCS:
        if state == 0:
            step[:, first : last + 1] = after
    for state, first, last, after in _ARCS:
        legal[state, first : last + 1] = True
        step[state, first : last + 1] = after
    allowed = np.zeros((_LONGEST, states, 257), bool)
    for row in range(_LONGEST):
        fits = legal & (_MISSING[step] <= row)
        allowed[row, :, :END] = np.where(fits.any(1, keepdims=True), fits, legal)
    allowed[:, 0, END] = True
    return Automaton(allowed, step)


def start_state(automaton: Automaton, prompt: bytes) -> int:
    """The state after `prompt`.

    For `valid_utf8` a prompt that ends inside a valid but unfinished character starts in that
    state, and any other, even an invalid one, between characters. For `free` it is the one state.
    """
    state = 0
    for byte in prompt[1 - _LONGEST :]:  # an unfinished character is no longer than that
        state = int(automaton.step[state, byte])
    return state


def least_bytes(automaton: Automaton, state: int) -> int:
    """Bytes that must still be written before the text may end in `state` or after it.

    0 between characters. Callers refuse a `max_new_bytes` below it.
    """
    legal, ends = automaton.allowed[-1, :, :END], automaton.allowed[-1, :, END]
    reached, count = {state}, 0
    while not any(ends[each] for each in reached):
        reached = {int(after) for each in reached for after in automaton.step[each, legal[each]]}
        count += 1
    return count
