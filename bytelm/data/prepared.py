"""Prepared files: documents one after the other, mapped into memory as they are.

Layout, all numbers little-endian:

    documents | end of each, int64 | digest of each, uint64 | count, uint64 | MAGIC

A document's digest is BLAKE2b of 8 bytes over its bytes; by it the split is made. Files of before,
whose magic is `BYTELM01`, have no digests. Files some bytes of which are read and not counted have
another section, between digests and count, and the magic `BYTELM03`:

    first and last + 1 of each run of counted bytes, int64 | number of runs, uint64
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from bytelm.config import require
from bytelm.data.sources import unreadable

MAGIC = b"BYTELM02"
MAGIC_BEFORE = b"BYTELM01"
MAGIC_MASKED = b"BYTELM03"
DIGEST_BYTES = 8
_TAIL = 16  # bytes of count and magic
_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True)
class Prepared:
    """How much a prepared file holds, and what a person should know about it."""

    documents: int
    bytes: int
    notes: tuple[str, ...] = ()


class Unscored(bytes):
    """A piece of a document that models read and that is not counted, such as a prompt."""


class Bounds(NamedTuple):
    """Where the documents of a file end, and their digests if the file has them.

    `counted` are the runs of bytes that are counted, in order; None if all are.
    """

    ends: Int64[np.ndarray, " documents"]
    digests: UInt64[np.ndarray, " documents"] | None
    counted: Int64[np.ndarray, "runs 2"] | None = None


def read_bounds(path: str, size: int, damaged_is_plain: bool = False) -> Bounds | None:
    """The documents of a file of `size` bytes if it is a prepared one, otherwise None.

    Raises `ValueError` for a damaged prepared file, unless it counts as plain.
    """
    with open(path, "rb") as file:
        file.seek(max(0, size - _TAIL - 8))
        tail = file.read(_TAIL + 8)
        if not tail.endswith((MAGIC, MAGIC_BEFORE, MAGIC_MASKED)):
            return None
        masked, numbers = tail.endswith(MAGIC_MASKED), 1 + tail.endswith((MAGIC, MAGIC_MASKED))
        count = int.from_bytes(tail[-_TAIL : -len(MAGIC)], "little")
        runs = int.from_bytes(tail[:8], "little") if masked else 0
        body = size - _TAIL - 8 * count * numbers - (8 + 16 * runs) * masked
        if count == body == 0:
            return Bounds(np.zeros(0, np.int64), np.zeros(0, np.uint64))
        if 1 <= count <= body:
            file.seek(body)
            index = np.frombuffer(file.read(8 * count * numbers), "<u8").reshape(numbers, count)
            ends = index[0].astype(np.int64)
            edges = np.frombuffer(file.read(16 * runs), "<i8").astype(np.int64)
            sound = ends[0] > 0 and ends[-1] == body and bool((ends[1:] > ends[:-1]).all())
            sound = sound and bool((edges[1:] > edges[:-1]).all())
            if sound and (not runs or (edges[0] >= 0 and edges[-1] <= body)):
                digests = index[1].astype(np.uint64) if numbers == 2 else None
                return Bounds(ends, digests, edges.reshape(-1, 2) if masked else None)
    require(
        damaged_is_plain,
        f"{path}: ends like a prepared file, but its {count} documents do not fit its {size} "
        "bytes; prepare it again from the originals",
    )
    return None


def write_prepared(target: Path, pieces: Iterable[bytes | None], called: str) -> Prepared:
    """Writes documents, whose pieces come each document followed by None; empty ones are left out.

    `target` appears complete or keeps its old content; errors of writing name `called`. Memory is
    bounded by the longest piece and 16 bytes per document.
    """
    partial = target.with_name(f".{target.name}.{os.urandom(4).hex()}.partial")
    ends, digests, runs, masked = array("q"), array("Q"), array("q"), False
    position, start, digest = 0, 0, blake2b(digest_size=DIGEST_BYTES)
    try:
        with open(partial, "wb", _BUFFER) as sink:
            for piece in pieces:
                if piece is not None:
                    sink.write(piece)
                    digest.update(piece)
                    masked |= isinstance(piece, Unscored)
                    if piece and not isinstance(piece, Unscored):
                        if runs and runs[-1] == position:
                            runs.pop()
                        else:
                            runs.append(position)
                        runs.append(position + len(piece))
                    position += len(piece)
                elif position > start:
                    ends.append(position)
                    digests.append(int.from_bytes(digest.digest(), "little"))
                    start, digest = position, blake2b(digest_size=DIGEST_BYTES)
            for index, kind in ((ends, "<i8"), (digests, "<u8")):
                sink.write(np.asarray(index, kind).tobytes())
            if masked:
                sink.write(np.asarray(runs, "<i8").tobytes())
                sink.write((len(runs) // 2).to_bytes(8, "little"))
            sink.write(len(ends).to_bytes(8, "little") + (MAGIC_MASKED if masked else MAGIC))
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise ValueError(unwritable(called, error)) from None
    finally:
        partial.unlink(missing_ok=True)
    return Prepared(len(ends), position)


def unwritable(called: str, error: OSError) -> str:
    """What to say of a file or folder that cannot be written."""
    return f"{called}: cannot be written ({error.strerror}); choose another place or free space"


def read_spans(path: str, spans: Iterable[tuple[int, int]]) -> Iterator[bytes | None]:
    """The bytes of a file from each start to its stop, in pieces, each span followed by None.

    By plain reads: mapping a file that shrinks meanwhile would be fatal. Raises `ValueError` if it
    does.
    """
    try:
        with open(path, "rb", _BUFFER) as file:
            position = 0
            for start, stop in spans:
                if start != position:
                    file.seek(start)
                position = start
                while position < stop:
                    piece = file.read(min(stop - position, _BUFFER))
                    require(piece != b"", f"{path}: shrank while it was read; try again")
                    position += len(piece)
                    yield piece
                yield None
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None


def _sync_folder(folder: Path) -> None:
    """Makes the rename survive a power cut, if the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)
