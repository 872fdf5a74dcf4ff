"""Drafts: the table against one that is counted with dictionaries, its file, and n-grams."""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.generation.draft_table import (
    ORDERS,
    DraftTable,
    build_table,
    bytes_per_round,
    context_hash,
    load_table,
    look_up,
    ngram_draft,
    save_table,
)

NONE = bytes(8)


def words(seed: int, count: int) -> bytes:
    chance = random.Random(seed)
    known = ["one ", "only ", "on ", "two ", "twofold ", "three, ", "there\n", "the "]
    return "".join(chance.choice(known) for _ in range(count)).encode()


def rows(*texts: bytes) -> np.ndarray:
    """The last 8 bytes of each text, filled with zeros in front."""
    return np.stack([np.frombuffer(text[-8:].rjust(8, b"\0"), np.uint8) for text in texts])


def counted_drafts(text: bytes) -> dict[bytes, bytes]:
    """Context → draft, counted as `build_table` says, with slots for all."""
    table, everywhere = {}, [*range(8, len(text) - 7)]
    left = everywhere
    for order, part in ((order, part) for order in ORDERS for part in ("left", "all")):
        places = defaultdict(list)
        for place in left if part == "left" else everywhere:
            places[text[place - order : place]].append(place)
        for context, its in places.items():
            if len(its) < 2 or context in table:
                continue
            draft = b""
            while len(draft) < 8:
                after = (text[p : p + len(draft) + 1] for p in its)
                nexts = Counter(each[-1] for each in after if each[:-1] == draft)
                draft += bytes([min(nexts, key=lambda byte: (-nexts[byte], byte))])
            table[context] = draft
        if part == "all":
            left = [place for place in left if text[place - order : place] not in table]
    return table


def test_a_table_drafts_what_followed_most_often_after_the_longest_context():
    text = words(0, 300)
    table, counted = build_table([text], slots=1 << 16), counted_drafts(text)
    contexts = [text[: place + 1] for place in range(len(text))]
    contexts += [b"xx" + text[place : place + 5] for place in range(200)] + [b"", b"qq", b"zthe"]
    drafts, found = look_up(table, rows(*contexts))
    assert {len(context) for context in counted} == {*ORDERS}
    for context, draft, known in zip(contexts, drafts, found, strict=True):
        matches = (counted.get(context[-order:]) for order in ORDERS if len(context) >= order)
        expected = next((match for match in matches if match), None)
        assert (draft.tobytes(), known) == (expected or NONE, expected is not None), context


def test_a_worked_example():
    table = build_table([b"abcdefgh12345678 " * 3])
    drafts, found = look_up(table, rows(b"xyabcdefgh", b"??gh", b"h", b"nothing"))
    assert [draft.tobytes() for draft in drafts] == [b"12345678", b"12345678", NONE, NONE]
    assert found.tolist() == [True, True, False, False]


def test_bytes_a_round_are_those_of_a_model_that_writes_the_text():
    text, table = words(5, 900), build_table([words(6, 300)])
    place, rounds = 8, 0
    while place < len(text) - 8:
        (draft,), _ = look_up(table, rows(text[:place]))
        right = [a == b for a, b in zip(draft.tolist(), text[place:], strict=False)]
        place += 1 + [*right, False].index(False)
        rounds += 1
    assert bytes_per_round(table, text) == (place - 8) / rounds > 2
    assert bytes_per_round(table, bytes(range(128, 200))) == 1
    with pytest.raises(ValueError, match="16 bytes; give at least 17"):
        bytes_per_round(table, bytes(16))


def test_of_contexts_that_share_a_slot_the_most_frequent_has_it():
    text = words(1, 3000)
    table = build_table([text], slots=1 << 8)
    recent = np.lib.stride_tricks.sliding_window_view(np.frombuffer(text, np.uint8), 8)[:-8]
    hashes, checks = context_hash(recent)
    counts = defaultdict(Counter)
    for slot, check in zip((hashes[0] % 256).tolist(), checks[0].tolist(), strict=True):
        counts[slot][check] += 1
    assert max(map(len, counts.values())) > 3
    for slot, held in enumerate(table.keys[0].tolist()):
        most = max(counts[slot].values(), default=0)
        assert counts[slot][held] == most if most > 1 else held == 0


def test_the_hash_is_the_one_that_is_described():
    """In Python's integers, without a product of 2⁶³ or more: PyTorch computes it in int64."""
    recent = np.frombuffer(random.Random(2).randbytes(8 * 50), np.uint8).reshape(-1, 8)
    hashes, checks = context_hash(recent)
    assert hashes.dtype == checks.dtype == np.uint32
    largest = 0
    for at, order in np.ndindex(len(recent), len(ORDERS)):
        h = 0
        for byte in reversed(recent[at, -ORDERS[order] :].tolist()):
            largest = max(largest, 0x01000193 * h)
            h = (0x01000193 * h + byte + 1) % 2**32
        x = (h ^ h >> 16) * 0x2C1B3C6D
        largest = max(largest, x, 0x5BD1E995 * h)
        x %= 2**32
        assert hashes[order, at] == x ^ x >> 15
        assert checks[order, at] == (0x5BD1E995 * h) % 2**32 | 1
    assert largest < 2**63


def test_chunks_are_one_text_and_no_more_is_read_than_asked_for():
    text = words(3, 400)

    def endless():
        while True:
            yield text[:100]

    def same(one: DraftTable, other: DraftTable) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))

    whole = build_table([text])
    assert same(whole, build_table([text[:7], b"", text[7:90], text[90:]]))
    assert same(build_table([text[:150]]), build_table([text], most_bytes=150))
    build_table(endless(), most_bytes=1050)


@pytest.mark.parametrize("text", [b"", b"abc", bytes(15), bytes(range(256))])
def test_a_text_that_repeats_nothing_is_refused(text):
    with pytest.raises(ValueError, match=f"{len(text)} bytes repeat nothing"):
        build_table([text])


@pytest.mark.parametrize("slots", [0, 128, 1000, 1 << 19])
def test_numbers_of_slots_that_are_refused(slots):
    with pytest.raises(ValueError, match=f"slots={slots}: choose a power of two"):
        build_table([words(0, 9)], slots=slots)


def test_a_table_comes_back_from_its_file(tmp_path):
    table, file = build_table([words(4, 500)], slots=1 << 10), tmp_path / "draft_table.npz"
    save_table(file, table)
    save_table(file, table)
    loaded = load_table(file)
    for stored, array in zip(loaded, table, strict=True):
        assert stored.dtype == array.dtype and np.array_equal(stored, array)
    assert [*tmp_path.iterdir()] == [file]


def test_files_that_are_no_table_are_refused_in_one_line(tmp_path):
    table, file = build_table([words(4, 500)], slots=1 << 10), tmp_path / "draft_table.npz"
    save_table(file, table)
    whole = file.read_bytes()
    with np.load(file) as stored:
        arrays = dict(stored)

    def refused(reason: str, content: bytes | dict) -> None:
        if isinstance(content, dict):
            np.savez(file, **content)
        else:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=reason) as error:
            load_table(file)
        assert str(file) in str(error.value) and "\n" not in str(error.value)

    bad_middle = whole[:3000] + bytes(byte ^ 0x55 for byte in whole[3000:3100]) + whole[3100:]
    for content in (b"", b"PK", b"a text\n" * 99, whole[:-1], whole[: len(whole) // 2], bad_middle):
        refused("is no table", content)
    refused("is no table", {"keys": table.keys, "drafts": table.drafts})
    refused("is no table", arrays | {"keys": np.array([{}])})
    refused("is no table", arrays | {"keys": np.zeros(2**24, np.uint32)})
    refused("another version", arrays | {"version": np.int32(2)})
    refused("another version", arrays | {"orders": np.array([8, 4])})
    refused("is damaged", arrays | {"keys": table.keys[:, :-1], "drafts": table.drafts[:, :-1]})
    refused("is damaged", arrays | {"keys": table.keys.astype(np.int64)})
    refused("is damaged", arrays | {"drafts": table.drafts[..., :7]})
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "none", "No such file")):
        with pytest.raises(ValueError, match=f"{path}: cannot be read.*{reason}.*draft-table"):
            load_table(path)


# ---- n-grams ------------------------------------------------------------------------------------


def literal_ngram_draft(text: bytes) -> bytes:
    for size in range(min(16, len(text)), 2, -1):
        start = text.rfind(text[-size:], 0, len(text) - 1)
        if start >= 0:
            copied = bytearray(text)
            for at in range(8):
                copied.append(copied[start + size + at])
            return bytes(copied[-8:])
    return NONE


@given(st.lists(st.sampled_from(b"ab"), max_size=60).map(bytes), st.binary(max_size=9))
def test_the_latest_of_the_longest_repetitions_is_continued(text, rest):
    buffer = np.frombuffer(text + rest, np.uint8)
    assert ngram_draft(buffer, len(text)).tobytes() == literal_ngram_draft(text)


@pytest.mark.parametrize(
    ("text", "draft"),
    [(b"", NONE), (b"a", NONE), (b"abab", NONE), (b"abcabc", b"abcabcab"), (b"aaaa", b"aaaaaaaa"),
     (b"the cat and the ", b"cat and "), (b"abc1 abc2 abc", b"2 abc2 a"),
     (b"xabc1 abc2 xabc", b"1 abc2 x")],
)  # fmt: skip
def test_examples_of_n_grams(text, draft):
    assert ngram_draft(np.frombuffer(text, np.uint8), len(text)).tobytes() == draft
