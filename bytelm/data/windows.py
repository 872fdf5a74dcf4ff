"""The stream of all documents cut into windows of equal length."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Int32

from bytelm.config import ByteVocab, ModelConfig, require
from bytelm.data.corpus import Corpus, memory_corpus


class Windows:
    """The stream of a corpus' documents as rows of `length` ids; a random-access sequence.

    Each document is followed by `eos_id` if `append_eos`; the last row is padded with `pad_id`.
    Rows start `stride` ids apart, by default their length. With less, they overlap, and only what
    the row before has not shown is counted.
    """

    def __init__(
        self, corpus: Corpus, vocab: ByteVocab, length: int, append_eos: bool, stride: int = 0
    ) -> None:
        require(length >= 1, f"length={length}: must be at least 1")
        fits = 0 <= stride <= length
        require(fits, f"stride={stride}: must be from 1 to the length of a window, {length}")
        self.corpus, self.vocab, self.length, self.append_eos = corpus, vocab, length, append_eos
        self.stride = stride or length
        self.is_masked = corpus.is_masked or self.stride < length
        self._ends = np.cumsum(corpus.lengths + int(append_eos))

    def __len__(self) -> int:
        total = int(self._ends[-1]) if len(self._ends) else 0
        return 1 - min(self.length - total, 0) // self.stride if total else 0

    def __getitem__(self, index: SupportsIndex) -> Int32[np.ndarray, " T"]:
        """Row `index`, int32 [length]. Raises `IndexError` outside the sequence."""
        number, count = operator.index(index), len(self)
        if not -count <= number < count:
            raise IndexError(f"window {number} of {count}")
        ids = np.full(self.length, self.vocab.pad_id, np.int32)
        for document, at, begin, end in self.parts(number % count):
            part = ids[begin:end]
            part[:] = self.corpus.read(document, at, at + end - begin)
            part += np.int32(self.vocab.offset)
            if self.append_eos and end < self.length and at + end - begin == self._size(document):
                ids[end] = self.vocab.eos_id
        return ids

    def counted(self, index: SupportsIndex) -> Bool[np.ndarray, " T"]:
        """Which ids of row `index` are counted, bool [length]; pads are not.

        The end of a document is if its last byte is.
        """
        mask, number = np.zeros(self.length, bool), operator.index(index) % len(self)
        for document, at, begin, end in self.parts(number):
            size = self._size(document)
            mask[begin:end] = self.corpus.counted(document, at, at + end - begin)
            if self.append_eos and end < self.length and at + end - begin == size:
                mask[end] = self.corpus.counted(document, size - 1, size)[0]
        if number:
            mask[: self.length - self.stride] = False
        return mask

    def _size(self, document: int) -> int:
        return int(self.corpus.lengths[document])

    def parts(self, number: int) -> Iterator[tuple[int, int, int, int]]:
        """Of a row: each document, where it goes on, and the first and last + 1 of its ids."""
        begin = number * self.stride
        document = int(np.searchsorted(self._ends, begin, side="right"))
        at = begin - (int(self._ends[document - 1]) if document else 0)
        filled = 0
        while filled < self.length and document < self.corpus.documents:
            taken = min(self._size(document) - at, self.length - filled)
            yield document, at, filled, filled + taken
            filled += taken + int(self.append_eos)
            document, at = document + 1, 0


def scored_windows(
    config: ModelConfig,
    data: bytes | Sequence[bytes] | Corpus,
    length: int,
    stride: int = 0,
) -> tuple[Windows, int | None]:
    """The windows by which data are evaluated, and the id in them that is read but not counted.

    `data` is a document, several, or a corpus; they are joined and cut into windows of `length`
    bytes, each of which the model sees alone. They start `stride` bytes apart if that is not 0 (see
    `Windows`). A model that resets after documents also reads their ends.
    """
    longest = config.longest_input
    fits = longest is None or length <= longest
    require(fits, f"length={length}: this model sees at most {longest} bytes")
    corpus = data if isinstance(data, Corpus) else memory_corpus(data)
    by_document = config.reset_on == "document"
    end_id = config.vocab.eos_id if by_document else None
    return Windows(corpus, config.vocab, length, by_document, stride), end_id
