"""The stream of all documents cut into windows of equal length, and batches of them in order."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32

from bytelm.config import ByteVocab, DataConfig, ModelConfig, require
from bytelm.data.corpus import Corpus, memory_corpus

SHUFFLE_LIMIT = 1 << 32  # grain permutes 32-bit indices and silently wraps larger ones


class Windows:
    """The stream of a corpus' documents as rows of `length` ids; a random-access sequence.

    Each document is followed by `eos_id` if `append_eos`; the last row is padded with `pad_id`.
    """

    def __init__(self, corpus: Corpus, vocab: ByteVocab, length: int, append_eos: bool) -> None:
        require(length >= 1, f"length={length}: must be at least 1")
        self.corpus, self.vocab, self.length, self.append_eos = corpus, vocab, length, append_eos
        self._ends = np.cumsum(corpus.lengths + int(append_eos))

    def __len__(self) -> int:
        total = int(self._ends[-1]) if len(self._ends) else 0
        return -(-total // self.length)

    def __getitem__(self, index: SupportsIndex) -> Int32[np.ndarray, " T"]:
        """Row `index`, int32 [length]. Raises `IndexError` outside the sequence."""
        number, count = operator.index(index), len(self)
        if not -count <= number < count:
            raise IndexError(f"window {number} of {count}")
        begin = number % count * self.length
        ids = np.full(self.length, self.vocab.pad_id, np.int32)
        document = int(np.searchsorted(self._ends, begin, side="right"))
        at = begin - (int(self._ends[document - 1]) if document else 0)
        filled = 0
        while filled < self.length and document < self.corpus.documents:
            size = int(self.corpus.lengths[document])
            taken = min(size - at, self.length - filled)
            part = ids[filled : filled + taken]
            part[:] = self.corpus.read(document, at, at + taken)
            part += np.int32(self.vocab.offset)
            filled += taken
            if self.append_eos and filled < self.length:
                ids[filled] = self.vocab.eos_id
                filled += 1
            document, at = document + 1, 0
        return ids


def evaluation_batches(
    windows: Windows,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Int32[np.ndarray, "B T"]]:
    """Every window once and in order, int32 [batch_size // process_count, length].

    The last batch is padded with rows of `pad_id`. `limit` takes at most that many windows, evenly
    spaced. Process p gets the p-th of the equal parts of each batch. Raises `ValueError`
    immediately for a corpus without bytes and for sizes that do not fit.
    """
    rows = process_rows(windows, batch_size, process_index, process_count)
    require(limit is None or limit >= 1, f"limit={limit}: must be at least 1")
    count = len(windows) if limit is None else min(limit, len(windows))

    def generate() -> Iterator[np.ndarray]:
        for begin in range(process_index * rows, -(-count // batch_size) * batch_size, batch_size):
            batch = np.full((rows, windows.length), windows.vocab.pad_id, np.int32)
            for row, number in enumerate(range(begin, min(begin + rows, count))):
                batch[row] = windows[number * len(windows) // count]
            yield batch

    return generate()


def scored_windows(
    config: ModelConfig, data: bytes | Sequence[bytes] | Corpus, length: int | None = None
) -> tuple[Windows, int | None]:
    """The windows by which data are evaluated, and the id in them that is read but not counted.

    `data` is a document, several, or a corpus; they are joined and cut into windows of `length`
    bytes, each of which the model sees alone (default: 512, or the model's longest input if that is
    less). A model that resets after documents also reads their ends.
    """
    longest = config.longest_input
    if length is None:
        length = min(DataConfig().sequence_length, longest or DataConfig().sequence_length)
    fits = longest is None or length <= longest
    require(fits, f"length={length}: this model sees at most {longest} bytes")
    corpus = data if isinstance(data, Corpus) else memory_corpus(data)
    by_document = config.reset_on == "document"
    end_id = config.vocab.eos_id if by_document else None
    return Windows(corpus, config.vocab, length, append_eos=by_document), end_id


def process_rows(windows: Windows, batch_size: int, process_index: int, process_count: int) -> int:
    """Rows of each batch that belong to one process."""
    require(len(windows) > 0, "corpus: holds no bytes; give data, or hold out less of it")
    known = 0 <= process_index < process_count
    require(known, f"process_index={process_index}: must be from 0 to {process_count - 1}")
    require(
        batch_size >= 1 and batch_size % process_count == 0,
        f"batch_size={batch_size}: must be a positive multiple of process_count={process_count}",
    )
    return batch_size // process_count
