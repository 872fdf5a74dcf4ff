"""The automaton of UTF-8, held against Python's strict decoder."""

import codecs
import itertools
import random

import numpy as np
import pytest

from bytelm.generation.automaton import END, free, least_bytes, start_state, valid_utf8

UTF8 = valid_utf8()
CONTINUATIONS = [bytes(x) for n in range(4) for x in itertools.product(b"\x80\x90\xa0", repeat=n)]
"""Of up to three bytes, shortest first; one of them completes any character that can be."""

LEADS = [bytes([byte]) for byte in (*range(0xC2, 0xE0), *range(0xE0, 0xF5))]


def bytes_to_complete(prefix: bytes) -> int | None:
    """How many bytes complete the last character of `prefix`; None if none do."""
    for ending in CONTINUATIONS:
        try:
            (prefix + ending).decode()
        except UnicodeDecodeError:
            continue
        return len(ending)
    return None


def prefixes():
    """The start of a text, and one-, two- and three-byte beginnings of characters.

    Their second bytes are the first and last of each range in the standard's table.
    """
    edges = b"\x80\x8f\x90\x9f\xa0\xbf"
    longer = [lead + bytes([byte]) for lead in LEADS for byte in edges]
    longer += [start + b"\x80" for start in longer if start[0] >= 0xF0]
    return [b"", b"a", *LEADS, *(start for start in longer if bytes_to_complete(start) is not None)]


def may_follow(state: int, left: int) -> np.ndarray:
    return UTF8.allowed[min(left, len(UTF8.allowed)) - 1, state]


def test_shapes_and_types():
    for automaton in (free(), UTF8):
        assert automaton.allowed.shape == free().allowed.shape == (4, 8, 257)
        assert automaton.step.shape == (8, 256)
        assert (automaton.allowed.dtype, automaton.step.dtype) == (bool, np.int32)
        assert 0 <= automaton.step.min() <= automaton.step.max() < 8
        assert automaton.allowed.any(2).all()


def test_a_byte_is_allowed_where_the_text_can_be_completed_and_nowhere_else():
    for prefix in prefixes():
        state = start_state(UTF8, prefix)
        needs = [bytes_to_complete(prefix + bytes([byte])) for byte in range(256)]
        least = bytes_to_complete(prefix)
        assert least_bytes(UTF8, state) == least
        for left in (1, 2, 3, 4, 5, 1000):
            allowed = may_follow(state, left)
            assert allowed[END] == (least == 0)
            short = least is not None and left < least  # then whatever goes on is allowed
            for byte, need in enumerate(needs):
                fits = need is not None and (short or need < left)
                assert allowed[byte] == fits, (prefix, byte, left)


def test_every_character_is_reachable_and_ends_between_characters():
    for size, first, last in ((1, 0, 0x7F), (2, 0x80, 0x7FF), (3, 0x800, 0xFFFF),
                              (4, 0x10000, 0x10FFFF)):  # fmt: skip
        codes = [code for code in range(first, last + 1) if not 0xD800 <= code <= 0xDFFF]
        text = np.frombuffer("".join(map(chr, codes)).encode(), np.uint8).reshape(-1, size)
        state = np.zeros(len(text), np.int32)
        for left, column in zip(range(size, 0, -1), text.T, strict=True):
            assert UTF8.allowed[left - 1, state, column].all()
            state = UTF8.step[state, column]
        assert not state.any()


@pytest.mark.parametrize("length", range(65))
def test_random_walks_decode_strictly(length):
    for seed in range(20):
        chance = random.Random(f"{length} {seed}")
        state, text = 0, bytearray()
        while len(text) < length:
            choices = np.flatnonzero(may_follow(state, length - len(text)))
            rare = [choice for choice in choices if choice >= 0x80]  # else three in four are ASCII
            choice = int(chance.choice(rare if rare and chance.random() < 0.8 else choices))
            if choice == END:
                break
            text.append(choice)
            state = int(UTF8.step[state, choice])
        assert may_follow(state, 1)[END]
        text.decode()


@pytest.mark.parametrize(
    ("prompt", "least"),
    [(b"", 0), (b"abc", 0), ("é".encode(), 0), (b"\xc3", 1), (b"a\xe2\x82", 1), (b"\xf0\x9f", 2),
     (b"\xf4", 3), (b"\xff", 0), (b"\x80\x80", 0), (b"\xed\xa0", 0), (b"\xc0", 0), (b"\xf5\x80", 0),
     (b"\xe2\xc3", 1), (b"\xf0\x80\xe2", 2), ("😀".encode(), 0), ("😀".encode()[:3], 1),
     (b"x" * 100 + b"\xf1\x80", 2)],
)  # fmt: skip
def test_prompts_that_end_inside_a_character(prompt, least):
    state = start_state(UTF8, prompt)
    assert least_bytes(UTF8, state) == least
    if least:
        ending = b"\x80" * (least - 1) + b"\xbf"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(prompt)
        assert decoder.decode(ending, final=True) != "\ufffd"


def test_too_few_bytes_still_leave_something_to_sample():
    state = start_state(UTF8, b"\xf0\x9f")
    assert np.flatnonzero(may_follow(state, 1)).tolist() == [*range(0x80, 0xC0)]


def test_free_allows_all_from_its_one_state():
    automaton = free()
    assert automaton.allowed.all()
    assert start_state(automaton, b"\xf0\x9f") == 0 == least_bytes(automaton, 0)
