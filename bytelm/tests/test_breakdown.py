"""Parts of the data and damaged data: what bytes belong to, and what is changed."""

import numpy as np
import pytest

from bytelm import perturb
from bytelm.breakdown import COMMON, NOT_UTF8, Breakdown, positions, script, scripts
from bytelm.config import ByteVocab
from bytelm.data import Windows, evaluation_batches, memory_corpus, open_corpus

VOCAB = ByteVocab()
TEXT = "aé ж漢\n".encode() + b"\xff\x80"


def test_the_script_of_every_character_is_known_by_its_name():
    expected = {
        "a": "Latin", "é": "Latin", "ﬁ": "Latin", "Ａ": "Latin", "Ω": "Greek", "ж": "Cyrillic",
        "漢": "Han", "ひ": "Hiragana", "カ": "Katakana", "ｱ": "Katakana", "한": "Hangul",
        "ब": "Devanagari", "ก": "Thai", "ا": "Arabic", "א": "Hebrew", "ა": "Georgian",
        "1": COMMON, " ": COMMON, "😀": COMMON, "\n": COMMON, "\u0301": COMMON, "𝔸": COMMON,
        "\U00010300": "Old Italic", "\ue000": COMMON,
    }  # fmt: skip
    assert {character: script(character) for character in expected} == expected
    names = ["Latin"] * 3 + [COMMON] + ["Cyrillic"] * 2 + ["Han"] * 3 + [COMMON] + [NOT_UTF8] * 2
    assert scripts(TEXT) == names


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64])
def test_a_character_that_a_window_cuts_has_one_script(length):
    windows = Windows(memory_corpus([TEXT, TEXT]), VOCAB, length, append_eos=False)
    parts = Breakdown(windows, "script")
    for number in range(len(windows)):
        parts.add(number, np.ones(length), windows[number] != VOCAB.pad_id)
    counts = {name: row.count for name, row in parts.rows().items()}
    assert counts == {"Latin": 6, "Han": 6, COMMON: 4, "Cyrillic": 4, NOT_UTF8: 4}


def test_positions_are_those_of_the_window():
    assert positions(6) == ("0", "1", "2–3", "2–3", "4–5", "4–5")
    windows = Windows(memory_corpus(b"abcdefg"), VOCAB, 4, append_eos=False)
    parts = Breakdown(windows, "position")
    for number, nats in enumerate(([1, 2, 3, 4], [10, 20, 30, 0])):
        parts.add(number, np.array(nats), windows[number] != VOCAB.pad_id)
    rows = {name: (row.nats, row.count) for name, row in parts.rows().items()}
    assert rows == {"0": (11, 2), "1": (22, 2), "2–3": (37, 3)}


def test_files_paths_and_documents_have_their_own_bytes(tmp_path):
    (tmp_path / "two").mkdir()
    for name, content in ("x", b"xx"), ("two/y", b"yyy"), ("two/z", b"zzzz"):
        (tmp_path / name).write_bytes(content)
    paths = (str(tmp_path / "x"), str(tmp_path / "two"))
    windows = Windows(open_corpus(paths), VOCAB, 5, append_eos=True)

    def counts(kind: str) -> list[int]:
        parts = Breakdown(windows, kind)
        for number in range(len(windows)):
            bytes_alone = windows[number] < 256
            parts.add(number, np.ones(5), bytes_alone)
        return [row.count for row in parts.rows().values()]

    assert counts("source") == [2, 7]
    assert counts("file") == counts("document") == [2, 3, 4]
    parts = Breakdown(windows, "file")
    for number in range(len(windows)):
        parts.add(number, np.ones(5), windows[number] < 256)
    assert list(parts.rows()) == ["x", f"{paths[1]}: y", f"{paths[1]}: z"]


@pytest.mark.parametrize("stride", [1, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 6, 7, 8, 20, 21, 22])
def test_sliding_windows_count_every_byte_once_where_it_has_most_before_it(size, stride):
    content = bytes(range(size))
    windows = Windows(memory_corpus(content), VOCAB, 7, append_eos=False, stride=stride)
    seen = []
    for batch in evaluation_batches(windows, 2):
        counted = batch.ids != VOCAB.pad_id
        counted &= True if batch.counted is None else batch.counted
        seen += batch.ids[counted].tolist()
        if batch.counted is not None:
            first = batch.ids[:, 0].tolist()
            for row, number in zip(counted, first, strict=True):
                assert number == 0 or not row[: 7 - stride].any()
    assert seen == list(content)


def test_a_stride_that_leaves_bytes_out_is_refused():
    for stride in (8, -1):
        with pytest.raises(ValueError, match=f"stride={stride}: must be from 1 to"):
            Windows(memory_corpus(b"abc"), VOCAB, 7, append_eos=False, stride=stride)


def test_damage_is_seeded_and_of_its_kind():
    text = "Ein Mädchen saß auf der Mauer, ὡς ἔοικε. " * 50
    broken = b"\xff\x80"
    documents = [text.encode() + broken, b"", b"ab"]
    for kind in perturb.KINDS:
        changed = perturb.perturb(documents, kind)
        assert changed == perturb.perturb(documents, kind) != documents
        assert changed[0].endswith(broken) and changed[1] == b""
    swapped, mixed, dropped, cut = (perturb.perturb(documents, k)[0] for k in perturb.KINDS)
    assert swapped == text.swapcase().encode() + broken
    assert sorted(mixed[:-2].decode()) == sorted(text) and mixed != documents[0]
    letters = sum(map(str.isalpha, text))
    lost = len(text) - len(dropped[:-2].decode())
    assert 0.03 * letters < lost < 0.07 * letters
    with pytest.raises(UnicodeDecodeError):
        cut[:-2].decode()
    assert 0 < len(documents[0]) - len(cut) < 40
