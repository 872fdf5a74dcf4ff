"""Files to compressed files and back, with any model that predicts the next byte of S streams.

A file is cut into windows, S of which are read side by side, as S rows of the model's batch: window
0 is the first of stream 0, window S the second of it. Each window is predicted alone, as
`bytelm eval` does; only the coder's state goes on from one window of a stream to its next. Encoder
and decoder ask the same program for the same distributions in the same order and at the same shape,
since no other way of computing them gives the same bits.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from bytelm.compression.coder import Decoder, Encoder
from bytelm.compression.container import (
    DIGEST_BYTES,
    MAX_STREAMS,
    MAX_WINDOW,
    Header,
    check_machine,
    read_block,
    read_header,
    write_block,
)
from bytelm.config import ModelConfig, require
from bytelm.files import replacing, require_plain_file, require_replaceable

SUFFIX = ".blm"
_PIECE_BYTES = 1 << 14  # of each stream in a block, on average: their lengths take 0.02 % then
_IN_FLIGHT = 4
_COPY_BYTES = 1 << 20


class Predictor(Protocol):
    """A model that predicts the next byte of S streams at once, always by the same programs."""

    @property
    def model_digest(self) -> bytes:
        """16 bytes that differ between models."""
        ...

    def restart(self) -> None:
        """Begins a new window in every stream."""
        ...

    def advance(self, before: np.ndarray) -> Any:
        """Cumulative counts uint32[S, 256] of the next byte; `np.asarray` of them may wait.

        `before` uint8[S] holds the byte before it, anything at the start of a window. A row whose
        probabilities are not finite is zero.
        """
        ...


class Place(NamedTuple):
    """Where compressed files are made: `machine()` describes it, `predictor(S, window)` predicts.

    Compressing and decompressing are inverses only at places of one description.
    """

    machine: Callable[[], dict[str, str]]
    predictor: Callable[[int, int], Predictor]


def _no_model(streams: int, window: int) -> Predictor:
    raise ValueError("model: none was given, and this file is not stored")


NO_MODEL = Place(dict, _no_model)
"""Where stored files are read."""


@dataclass(frozen=True)
class Summary:
    """What was done: bytes of the content and of the compressed file, and seconds."""

    size: int
    compressed: int
    is_coded: bool
    seconds: float

    @property
    def line(self) -> str:
        """The figures for people."""
        share = f"{self.compressed / self.size:.1%}, " if self.size else ""
        bits = f"{8 * self.compressed / self.size:.3f} bits per byte, " if self.size else ""
        rate = f"{self.size / max(self.seconds, 1e-9) / 1e3:.1f} kB/s"
        stored = "" if self.is_coded else ", stored as it is"
        return f"{self.size} bytes, compressed {self.compressed} ({share}{bits}{rate}{stored})"


# ---- compress -------------------------------------------------------------------------------


def compress_file(path: Path, out: Path, place: Place, window: int, streams: int = 64) -> Summary:
    """Compresses the file `path` into `out`, which is replaced only by a whole file.

    `streams` windows of `window` bytes are coded side by side, fewer where the file has fewer. A
    file that would not shrink is stored. Memory does not grow with the file. Raises `ValueError`
    for sizes that do not fit and for a model whose probabilities are not finite.
    """
    begin = time.perf_counter()
    check_request(streams, window)
    require(window > 0, "window=0: must be at least 1")
    check_paths(path, out)
    size = path.stat().st_size
    while streams > 1 and (streams // 2) * window >= size:
        streams //= 2  # what a small file leaves idle costs time
    with open(path, "rb") as source, replacing(out) as sink:
        stored = len(Header(size, b"").pack()) + size
        is_coded = size > 0 and _write_coded(source, sink, place, (size, window, streams), stored)
        if not is_coded:
            source.seek(0)
            sink.seek(0)
            sink.truncate()
            _write_stored(source, sink, size)
        compressed = sink.seek(0, os.SEEK_END)
    return Summary(size, compressed, is_coded, time.perf_counter() - begin)


def check_request(streams: int, window: int) -> None:
    """Raises `ValueError` for sizes that no file has; a window of 0 stands for a default."""
    require(1 <= streams <= MAX_STREAMS, f"streams={streams}: must be from 1 to {MAX_STREAMS}")
    require(0 <= window <= MAX_WINDOW, f"window={window}: must be at most {MAX_WINDOW}, 0 or more")


def check_model(config: ModelConfig, window: int = 1) -> None:
    """Raises `ValueError` for a model that cannot predict windows of so many bytes."""
    require(config.causal, "causal=False: compression needs a causal model")
    longest = config.longest_input
    fits = longest is None or window <= longest
    require(fits, f"window={window}: this model sees at most {longest} bytes")


def check_paths(path: Path, out: Path) -> None:
    """Raises `ValueError` or `OSError` for an input or an output that cannot be one."""
    require_plain_file(path)
    same = out.exists() and out.samefile(path)
    require(not same, f"out={out}: is the input itself; name another file")
    require(not out.is_dir(), f"out={out}: is a folder; name a file")
    require(out.parent.is_dir(), f"out={out}: its folder does not exist; make it first")
    require_replaceable(out, f"out={out}")


def _write_coded(
    source: BinaryIO, sink: BinaryIO, place: Place, sizes: tuple[int, int, int], limit: int
) -> bool:
    """Writes header and blocks; False as soon as they have `limit` bytes.

    `sizes` are those of the content, a window, and the number of streams.
    """
    size, window, streams = sizes
    predictor = place.predictor(streams, window)
    digest = blake2b(digest_size=DIGEST_BYTES)
    header = Header(size, b"", True, streams, window, predictor.model_digest, place.machine())
    sink.write(header.pack())  # its place; the digest of the content comes last
    encoder = Encoder(streams)
    for rows, lengths in _read_groups(source, size, window, streams, digest):
        _encode_group(encoder, predictor, rows, lengths)
        if encoder.held_bytes >= streams * _PIECE_BYTES:
            write_block(sink, encoder.take())
        if sink.tell() + encoder.held_bytes >= limit:
            return False
    write_block(sink, encoder.finish())
    is_shorter = sink.tell() < limit
    sink.seek(0)
    sink.write(replace(header, content=digest.digest()).pack())
    return is_shorter


def _read_groups(
    source: BinaryIO, size: int, window: int, streams: int, digest: Any
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows uint8[S, window], zeros where there is nothing, and their lengths int64[S]."""
    for begin in range(0, size, streams * window):
        wanted = min(streams * window, size - begin)
        piece = source.read(wanted)
        _require_unchanged(len(piece) == wanted)
        digest.update(piece)
        rows = np.zeros(streams * window, np.uint8)
        rows[:wanted] = np.frombuffer(piece, np.uint8)
        yield rows.reshape(streams, window), _lengths(wanted, window, streams)
    _require_unchanged(not source.read(1))


def _require_unchanged(unchanged: bool) -> None:
    require(unchanged, "FILE: changed while it was read; try again")


def _lengths(count: int, window: int, streams: int) -> np.ndarray:
    """Bytes of each row of a group of `count` bytes: whole rows, then one, then none."""
    return np.clip(count - np.arange(streams) * window, 0, window)


def _encode_group(
    encoder: Encoder, predictor: Predictor, rows: np.ndarray, lengths: np.ndarray
) -> None:
    """The decoder's order, but without waiting for each distribution before asking for the next."""
    waiting: deque[tuple[int, Any]] = deque()

    def drain(keep: int) -> None:
        while len(waiting) > keep:
            position, promise = waiting.popleft()
            count = int((lengths > position).sum())
            table = _checked(promise, count)
            encoder.encode(table, rows[:count, position].astype(np.int64))

    predictor.restart()
    before = np.zeros(len(rows), np.uint8)
    for position in range(int(lengths.max())):
        waiting.append((position, predictor.advance(before)))
        before = rows[:, position]
        drain(_IN_FLIGHT)
    drain(0)


def _checked(promise: Any, count: int) -> np.ndarray:
    table = np.asarray(promise)[:count]
    finite = bool(table[:, -1].all())
    require(finite, "model: its probabilities are not finite; take another checkpoint")
    return table


def _write_stored(source: BinaryIO, sink: BinaryIO, size: int) -> None:
    digest = blake2b(digest_size=DIGEST_BYTES)
    sink.write(Header(size, bytes(DIGEST_BYTES)).pack())
    count = _copy(source, sink, digest)
    _require_unchanged(count == size)
    sink.seek(0)
    sink.write(Header(size, digest.digest()).pack())


def _copy(source: BinaryIO, sink: BinaryIO, digest: Any) -> int:
    count = 0
    while piece := source.read(_COPY_BYTES):
        digest.update(piece)
        sink.write(piece)
        count += len(piece)
    return count


# ---- decompress -----------------------------------------------------------------------------


def inspect_file(path: Path) -> Header:
    """The header of a compressed file; raises `ValueError` if it is none."""
    require_plain_file(path)
    with open(path, "rb") as source:
        return read_header(source, path)


def decompress_file(path: Path, out: Path, place: Place) -> Summary:
    """Writes the content of the compressed file `path` to `out`, which is replaced only by all of
    it. Memory does not grow with the file.

    Raises `ValueError` before anything is written for another model, and at a place whose
    description differs from the one where `path` was made; for a damaged file, `out` stays as it
    was.
    """
    begin = time.perf_counter()
    check_paths(path, out)
    with open(path, "rb") as source:
        header, predictor = read_header(source, path), None
        if header.is_coded:
            check_machine(header, place.machine(), path)
            predictor = place.predictor(header.streams, header.window)
            same = predictor.model_digest == header.model
            require(same, f"{path}: compressed with another model; give that one")
        with replacing(out) as sink:
            digest = blake2b(digest_size=DIGEST_BYTES)
            if predictor is None:
                _require_room(source, path, header.size)
                _copy(source, sink, digest)
            else:
                _read_coded(source, sink, path, header, predictor, digest)
            _require_same_content(digest.digest() == header.content, path, header)
    compressed = path.stat().st_size
    return Summary(header.size, compressed, header.is_coded, time.perf_counter() - begin)


def _require_room(source: BinaryIO, path: Path, size: int) -> None:
    left = path.stat().st_size - source.tell()
    require(left >= size, f"{path}: cut short; copy it again")
    require(left == size, f"{path}: goes on after its end; copy it again")


def _require_same_content(same: bool, path: Path, header: Header) -> None:
    why = "the model computed other bits than when it was made" if header.is_coded else "damaged"
    require(same, f"{path}: its content does not have its digest: {why}; copy it again")


def _read_coded(
    source: BinaryIO,
    sink: BinaryIO,
    path: Path,
    header: Header,
    predictor: Predictor,
    digest: Any,
) -> None:
    streams, window = header.streams, header.window
    decoder = Decoder(streams, lambda: read_block(source, streams, path))
    for begin in range(0, header.size, streams * window):
        count = min(streams * window, header.size - begin)
        rows = _decode_group(decoder, predictor, _lengths(count, window, streams), window)
        content = rows.reshape(-1)[:count].tobytes()
        digest.update(content)
        sink.write(content)
    ended = read_block(source, streams, path) is None
    require(ended, f"{path}: goes on after its end; copy it again")


def _decode_group(
    decoder: Decoder, predictor: Predictor, lengths: np.ndarray, window: int
) -> np.ndarray:
    rows = np.zeros((len(lengths), window), np.uint8)
    predictor.restart()
    before = rows[:, 0]
    for position in range(int(lengths.max())):
        count = int((lengths > position).sum())
        table = _checked(predictor.advance(before), count)
        rows[:count, position] = decoder.decode(table)
        before = rows[:, position]
    return rows
