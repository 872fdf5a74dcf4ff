"""Bytes to ids and back, streams cut anywhere, and the torch package's equal text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bytelm.config import ByteVocab
from bytelm.tokenizer import ByteTokenizer, StreamingDecoder

ROOT = Path(__file__).parents[2]
VOCABS = [ByteVocab(), ByteVocab(size=259, offset=3, pad_id=0, bos_id=1, eos_id=2)]
TEXTS = ["", "a", "naïve café", "日本語のテキスト", "👩‍👩‍👧 e\u0301 \U0010ffff\x00\r\n"]


@pytest.fixture(params=VOCABS, ids=["offset0", "offset3"])
def vocab(request: pytest.FixtureRequest) -> ByteVocab:
    return request.param


def test_a_byte_is_its_value_plus_the_offset(vocab: ByteVocab) -> None:
    ids = ByteTokenizer(vocab).encode(bytes(range(256)))
    assert ids.dtype == np.int32
    assert ids.tolist() == [vocab.offset + byte for byte in range(256)]
    assert ByteTokenizer(vocab).encode("é").tolist() == [vocab.offset + 0xC3, vocab.offset + 0xA9]
    assert ByteTokenizer(vocab).encode("").shape == (0,)
    assert ByteTokenizer(vocab).vocab is vocab


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(vocab: ByteVocab, text: str) -> None:
    tokenizer = ByteTokenizer(vocab)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.to_bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_surrogates_never_fail() -> None:
    tokenizer = ByteTokenizer(ByteVocab())
    escaped = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    assert tokenizer.to_bytes(tokenizer.encode(escaped)) == b"caf\xe9.txt"
    mixed = "\udce9\ud800x\udfff"
    assert tokenizer.to_bytes(tokenizer.encode(mixed)) == b"\xe9\xef\xbf\xbdx\xef\xbf\xbd"
    every = "".join(map(chr, range(0xD800, 0xE000)))
    assert len(tokenizer.encode(every)) == 128 + 3 * (2048 - 128)


def test_specials_and_unused_ids_are_skipped(vocab: ByteVocab) -> None:
    tokenizer = ByteTokenizer(vocab)
    e_acute = tokenizer.encode("é").tolist()
    ids = [vocab.bos_id, e_acute[0], vocab.pad_id, e_acute[1], vocab.eos_id]
    assert tokenizer.decode(ids) == "é"
    everything = list(range(vocab.size))
    assert tokenizer.to_bytes(everything) == bytes(range(256))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_any_integer_type_decodes(dtype: type) -> None:
    assert ByteTokenizer(ByteVocab()).decode(np.array([104, 105], dtype)) == "hi"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 512], r"ids\[2\]=512: choose an id from 0 to 511"),
        ([1, -1, 600], r"ids\[1\]=-1"),
        (np.array([2**63], np.uint64), r"ids\[0\]=9223372036854775808"),
        ([1.0], "one-dimensional array of integers, got .*float64"),
        ([[1, 2]], r"shape \(1, 2\)"),
        ([True], "bool"),
    ],
)
def test_bad_ids_are_named(ids: object, message: str) -> None:
    for method in (ByteTokenizer(ByteVocab()).to_bytes, StreamingDecoder(ByteVocab()).push):
        with pytest.raises(ValueError, match=message) as caught:
            method(ids)  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(caught.value)


def test_a_refused_push_takes_nothing() -> None:
    decoder = StreamingDecoder(ByteVocab())
    assert decoder.push([0xC3]) == ""
    with pytest.raises(ValueError, match="999"):
        decoder.push([0x41, 999])
    assert decoder.push([0xA9]) == "é"


def _streams() -> list[bytes]:
    """Seeded byte strings: uniform, near-UTF-8, valid, and truncated four-byte characters."""
    rng = np.random.default_rng(0)
    leads = np.frombuffer(b"A\x80\x9f\xbf\xc0\xc2\xe0\xe1\xed\xef\xf0\xf1\xf4\xf5\xff", np.uint8)
    characters = np.array(list("aé日😀\U0010ffff\ud7ff"))
    streams = [rng.bytes(int(size)) for size in rng.integers(0, 40, 12)]
    streams += [rng.choice(leads, 20).tobytes() for _ in range(40)]
    valid = ["".join(rng.choice(characters, 12)).encode() for _ in range(4)]
    return streams + valid + [data[:-1] + b"\xf0\x9f\x98" for data in valid]


def test_streams_cut_anywhere_decode_to_the_whole() -> None:
    vocab = VOCABS[1]
    tokenizer = ByteTokenizer(vocab)
    for data in _streams():
        ids = tokenizer.encode(data)
        whole = tokenizer.decode(ids)
        assert whole == data.decode("utf-8", "replace")
        for size in range(1, len(ids) + 2):
            decoder = StreamingDecoder(vocab)
            pieces = [decoder.push(ids[i : i + size]) for i in range(0, len(ids), size)]
            assert "".join(pieces) + decoder.finish() == whole, (data, size)


def test_a_character_appears_when_it_is_complete(vocab: ByteVocab) -> None:
    ids = ByteTokenizer(vocab).encode("a😀")
    decoder = StreamingDecoder(vocab)
    assert [decoder.push(ids[i : i + 1]) for i in range(5)] == ["a", "", "", "", "😀"]
    assert decoder.finish() == ""
    assert decoder.push(ids[1:4]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ids) == "a😀"  # nothing is left over from before
