"""Text to byte ids and back, and a decoder for streams that never splits a character."""

from __future__ import annotations

import codecs
import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bytelm.config import ByteVocab, require

_UNPAIRED_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


class ByteTokenizer:
    """Byte b has id b + `vocab.offset`; all other ids of the vocabulary stand for no byte.

    >>> tokenizer = ByteTokenizer(ByteVocab())
    >>> tokenizer.encode("né").tolist()
    [110, 195, 169]
    >>> tokenizer.decode([110, 195, 169, 258])
    'né'
    """

    def __init__(self, vocab: ByteVocab) -> None:
        self.vocab = vocab

    def encode(self, text: str | bytes) -> NDArray[np.int32]:
        """Ids [T] int32 of the UTF-8 bytes of `text`, or of `text` itself if it is bytes.

        No string fails: U+DC80 to U+DCFF, by which Python's `surrogateescape` carries the bytes 80
        to FF of undecodable file names and arguments, become those bytes again, and any other lone
        surrogate, which has no UTF-8, becomes U+FFFD. No special id is added.
        """
        data = _utf8(text) if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32) + np.int32(self.vocab.offset)

    def decode(self, ids: ArrayLike) -> str:
        """Text of ids [T]; invalid UTF-8 becomes U+FFFD, ids that are not bytes are skipped.

        Raises `ValueError` as `to_bytes` does.
        """
        return self.to_bytes(ids).decode("utf-8", "replace")

    def to_bytes(self, ids: ArrayLike) -> bytes:
        """Bytes of ids [T] of any integer type; ids that stand for no byte are skipped.

        Raises `ValueError` for an id outside the vocabulary and for ids that are not a
        one-dimensional array of integers.
        """
        array = np.asarray(ids)
        if array.size == 0:  # np.asarray([]) is float64
            return b""
        integers = array.ndim == 1 and array.dtype.kind in "iu"
        got = f"shape {array.shape}, dtype {array.dtype}"
        require(integers, f"ids: must be a one-dimensional array of integers, got {got}")
        outside = np.flatnonzero((array < 0) | (array >= self.vocab.size))
        if outside.size:
            first, last = int(outside[0]), self.vocab.size - 1
            raise ValueError(f"ids[{first}]={array[first]}: choose an id from 0 to {last}")
        codes = array.astype(np.int64) - self.vocab.offset
        return codes[(codes >= 0) & (codes < 256)].astype(np.uint8).tobytes()


class StreamingDecoder:
    """Decodes ids that arrive in pieces.

    However the ids are divided, the results of `push` followed by that of `finish` add up to
    `ByteTokenizer.decode` of all ids.

    >>> decoder = StreamingDecoder(ByteVocab())
    >>> [decoder.push([byte]) for byte in "né".encode()]
    ['n', '', 'é']
    """

    def __init__(self, vocab: ByteVocab) -> None:
        self._tokenizer = ByteTokenizer(vocab)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: ArrayLike) -> str:
        """The text that ids [T] complete; the bytes of an unfinished character are held back.

        Raises `ValueError` as `ByteTokenizer.to_bytes` does, in which case none of the ids is
        consumed.
        """
        return self._decoder.decode(self._tokenizer.to_bytes(ids))

    def finish(self) -> str:
        """U+FFFD for an unfinished character, otherwise nothing. The decoder can then be reused."""
        return self._decoder.decode(b"", final=True)


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return _UNPAIRED_SURROGATE.sub("\ufffd", text).encode("utf-8", "surrogateescape")
