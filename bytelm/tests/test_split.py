"""Training and validation: which document is on which side."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bytelm import data
from bytelm.data import Corpus


def contents(corpus: Corpus) -> list[bytes]:
    lengths = corpus.lengths.tolist()
    return [corpus.read(index, 0, length).tobytes() for index, length in enumerate(lengths)]


def splitmix(seed: int, key: int) -> int:
    """The hash of a document, in Python integers."""

    def scramble(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    return scramble((scramble((seed + 0x9E3779B97F4A7C15) % 2**64) + key) % 2**64)


@pytest.mark.parametrize("rule", ["content", "rank"])
@pytest.mark.parametrize("seed", [0, -7, 2**70])
def test_split_by_document(seed: int, rule: str) -> None:
    documents = [b"%d" % index for index in range(400)]
    corpus = data.memory_corpus(documents)
    train, validation = data.split(corpus, 0.25, seed, rule)
    golden = 0x9E3779B97F4A7C15
    keys = [(index + 1) * golden for index in range(400)]
    if rule == "content":
        digests = (hashlib.blake2b(each, digest_size=8).digest() for each in documents)
        keys = [int.from_bytes(each, "little") for each in digests]
    held_out = [splitmix(seed, key) < 2**62 for key in keys]
    assert contents(validation) == [b"%d" % index for index in np.flatnonzero(held_out)]
    assert contents(train) == [b"%d" % index for index in np.flatnonzero(np.invert(held_out))]
    assert 60 < validation.documents < 140
    assert data.split(corpus, 0.25, seed + 1, rule)[0].fingerprint() != train.fingerprint()


def test_the_split_by_content_moves_no_document() -> None:
    """Files in front, others added and removed, in any order and form: all keep their sides."""

    def sides(documents: list[bytes]) -> dict[bytes, int]:
        listed = data.memory_corpus(documents)
        parts = data.split(listed, 0.2, 3)
        return {each: side for side, part in enumerate(parts) for each in contents(part)}

    random = np.random.default_rng(0)
    documents = [b"text %03d" % index for index in range(60)]
    known = sides(documents)
    assert 0 < sum(known.values()) < 30
    assert known.items() <= sides([b"in front", *documents]).items()
    for trial in range(50):
        documents = [documents[index] for index in random.permutation(len(documents))]
        documents = documents[int(random.integers(0, len(documents) - 49)) :]
        documents += [b"%d %d" % (trial, n) for n in range(int(random.integers(0, 20)))]
        now = sides(documents)
        assert all(known.get(each, side) == side for each, side in now.items())
        known |= now
    train, held_out = data.split(data.memory_corpus(documents * 2), 0.2, 3)
    assert not set(contents(train)) & set(contents(held_out))


def test_few_documents_are_split_at_the_end() -> None:
    corpus = data.memory_corpus([b"%02d" % index for index in range(49)])
    train, held_out = data.split(corpus, 0.1, 0)
    assert held_out.is_cut and contents(held_out) == [b"44", b"45", b"46", b"47", b"48"]
    assert b"".join(contents(train) + contents(held_out)) == b"".join(contents(corpus))
    assert not data.split(corpus, 0.1, 0, "rank")[1].is_cut


def test_a_side_is_never_empty() -> None:
    single = data.memory_corpus([bytes(range(200))])
    parts = [contents(part) for part in data.split(single, 0.1, 0)]
    assert parts == [[bytes(range(180))], [bytes(range(180, 200))]]
    several = data.memory_corpus([b"abcd", b"efgh", b"ijkl"])
    for fraction, expected in ((1e-9, b"l"), (0.999999999, b"bcdefghijkl")):
        train, validation = data.split(several, fraction, 0)
        assert b"".join(contents(validation)) == expected
        assert b"".join(contents(train) + contents(validation)) == b"abcdefghijkl"
    assert [part.documents for part in data.split(several, 0.0, 0)] == [3, 0]
    with pytest.raises(ValueError, match=r"fraction=0\.5: 1 bytes cannot be split"):
        data.split(data.memory_corpus([b"x"]), 0.5, 0)
    for fraction in (-0.1, 1.0):
        with pytest.raises(
            ValueError, match=f"fraction={fraction}: must be at least 0 and below 1"
        ):
            data.split(several, fraction, 0)
