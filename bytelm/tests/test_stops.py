"""Stop texts: whole texts and pieces agree with each other and with a literal definition."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.generation.stops import LONGEST_STOP, MOST_STOPS, StopScanner, cut_at_stop

LETTERS = st.integers(97, 99)
TEXTS = st.lists(LETTERS, max_size=40).map(bytes)
STOPS = st.lists(st.lists(LETTERS, min_size=1, max_size=6).map(bytes), max_size=4)


def fed(pieces, stops):
    """What a scanner gives out for each piece and at the end, and whether it met a stop."""
    scanner = StopScanner(stops)
    results = [scanner.feed(piece) for piece in pieces]
    return [text for text, _ in results] + [scanner.finish()], any(met for _, met in results)


def literal_cut(text, stops):
    """The shortest beginning of `text` that ends with a stop, without that stop."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            return text[: end - max(map(len, endings))], True
    return text, False


@given(TEXTS, STOPS, st.data())
def test_pieces_give_what_the_whole_gives(text, stops, data):
    bounds = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *bounds], [*bounds, len(text)], strict=True)]
    for division in (pieces, [bytes([byte]) for byte in text]):
        given_out, met = fed(division, stops)
        assert (b"".join(given_out), met) == cut_at_stop(text, stops) == literal_cut(text, stops)


@given(TEXTS, STOPS)
def test_only_a_tail_that_may_become_a_stop_is_held_back(text, stops):
    scanner = StopScanner(stops)
    released, met = scanner.feed(text)
    if not met:
        tails = [stop[:size] for stop in stops for size in range(len(stop))]
        longest = max((len(tail) for tail in tails if text.endswith(tail)), default=0)
        assert released == text[: len(text) - longest]


def test_a_worked_example():
    assert fed([b"a", b"bST", b"Ux", b"STOPy", b"z"], [b"STOP"]) == (
        [b"a", b"b", b"STUx", b"", b"", b""],
        True,
    )
    assert fed([b"aST"], [b"STOP"]) == ([b"a", b"ST"], False)
    assert fed([b"abcd"], [b"abcd", b"bc"]) == ([b"a", b""], True)
    assert fed([b"xabc"], [b"bc", b"abc"]) == ([b"x", b""], True)
    assert fed([b"any", b"thing"], []) == ([b"any", b"thing", b""], False)


@pytest.mark.parametrize(
    ("stops", "reason"),
    [([b"a", b""], "empty"), ([b"x"] * (MOST_STOPS + 1), "17 texts"),
     ([b"x" * (LONGEST_STOP + 1)], "257 bytes")],
)  # fmt: skip
def test_stops_that_are_refused(stops, reason):
    for refused in (lambda: StopScanner(stops), lambda: cut_at_stop(b"", stops)):
        with pytest.raises(ValueError, match=reason) as error:
            refused()
        assert "\n" not in str(error.value)
    StopScanner([b"x" * LONGEST_STOP] * MOST_STOPS)
