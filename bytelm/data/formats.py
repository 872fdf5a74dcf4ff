"""What a file is, by its first bytes and then by its name, and the documents that it holds.

Documents come as pieces of bytes, each document followed by None, so that one of any length passes
through bounded memory. What cannot be read ends in a `ValueError` that names file and record.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bytelm.config import require
from bytelm.data import records
from bytelm.data.prepared import Bounds, read_bounds
from bytelm.data.sources import STANDARD_INPUT, unreadable
from bytelm.files import one_line

Pieces = Iterator[bytes | None]
HEAD = 1024
"""Bytes from which a format is recognised."""

_CHUNK = 1 << 20  # bytes
_MOST_LAYERS = 3
_BLANK = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_JSON_START = re.compile(rb"\s*(\[\s*)?\{\s*\"")
_JSON_LINES = (".jsonl", ".ndjson")
_COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
_CONTAINERS = {".parquet": "Parquet", ".arrow": "Arrow"}
_BINARY = {
    b"PK\x03\x04": "ZIP", b"\x89PNG\r\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF",
    b"%PDF-": "PDF", b"\x7fELF": "a program", b"7z\xbc\xaf": "7z", b"Rar!": "RAR",
    b"RIFF": "RIFF", b"OggS": "Ogg", b"fLaC": "FLAC", b"ID3": "MP3", b"\x89HDF": "HDF5",
    b"\x93NUMPY": "NumPy", b"SQLite format 3": "SQLite",
}  # fmt: skip
"""The first bytes of files that are hardly meant as text."""


class Format(NamedTuple):
    """How a file is compressed, and what it is otherwise; both empty for plain bytes."""

    compression: str
    kind: str

    def __bool__(self) -> bool:
        return bool(self.compression or self.kind)


def detect(path: str, name: str, head: bytes) -> Format:
    """The format of a file that begins with `head`; raises `ValueError` if its name lies.

    `path` is what errors call it, `name` what it is recognised by.
    """
    found = Format(_compression(head), _kind(name, head))
    suffix = os.path.splitext(name)[1].lower()
    promised = (_COMPRESSED | _CONTAINERS).get(suffix)
    require(
        not promised or bool(found),
        f"{path}: is called {suffix} but is no {promised} file; fetch it again, or take its bytes "
        "with --raw",
    )
    begins = suffix not in _JSON_LINES or bool(found) or not head.strip()
    require(
        begins,
        f"{path}: is called {suffix} but does not begin with a JSON object; repair its first line, "
        "or take its bytes with --raw",
    )
    return found


class Looked(NamedTuple):
    """What a file is, told by a look at both ends.

    `bounds` are those of a prepared file's documents, otherwise one over all of it. `head` are the
    first bytes where they say what the file is: of neither a prepared file nor a raw one.
    """

    size: int
    bounds: Bounds
    is_container: bool
    head: bytes = b""


def look_at(path: str, raw: bool, damaged_is_plain: bool = False) -> Looked | None:
    """A look at a file; None if it is empty or not a regular file.

    `raw` and `damaged_is_plain`, which is that of `read_bounds`, take bytes as they are. Raises
    `OSError`, and `ValueError` as `read_bounds` and `detect` do.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        return None
    bounds = read_bounds(path, status.st_size, damaged_is_plain)
    if bounds is not None:
        return Looked(status.st_size, bounds, False)
    whole = Bounds(np.array([status.st_size]), None)
    if raw:
        return Looked(status.st_size, whole, False)
    with open(path, "rb") as file:
        head = file.read(HEAD)
    return Looked(status.st_size, whole, bool(detect(path, os.path.basename(path), head)), head)


def binary_kind(head: bytes) -> str:
    """What a file that looks binary seems to be; empty for one that may be text."""
    for magic, kind in _BINARY.items():
        if head.startswith(magic):
            return kind
    return "it has zero bytes" if b"\0" in head else ""


def binary_notes(binary: Sequence[str]) -> tuple[str, ...]:
    """A note of files that look binary, each with what it seems to be."""
    if not binary:
        return ()
    more = f", and so do {len(binary) - 1} more files" if len(binary) > 1 else ""
    return (f"{binary[0]}{more}; its bytes are taken as they are; --raw says that this is meant",)


def _compression(head: bytes) -> str:
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bzip2"
    for magic, kind in ((b"\x1f\x8b\x08", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"(\xb5/\xfd", "zstd")):
        if head.startswith(magic):
            return kind
    return ""


def _kind(name: str, head: bytes) -> str:
    suffix = os.path.splitext(name)[1].lower()
    if name == STANDARD_INPUT and _JSON_START.match(head):
        suffix = ".jsonl"
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1\0\0"):
        return "arrow"
    if suffix == ".arrow" and head.startswith(b"\xff" * 4):
        return "arrow stream"
    if head[257:262] == b"ustar":
        return "tar"
    if suffix in (".array_record", ".arrayrecord"):
        return "array record"
    first = head.removeprefix(_BYTE_ORDER_MARK).lstrip(_BLANK)[:1]
    if suffix in _JSON_LINES and first == b"{":
        return "JSON lines"
    return "JSON" if suffix in (".json", *_JSON_LINES) and first in (b"{", b"[") else ""


# ---- streams ----------------------------------------------------------------------------------


class _Rest(io.RawIOBase):
    """A stream with the bytes that were read ahead of it put back."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        part = self._head[: len(view)] or self._rest.read(len(view))
        self._head = self._head[len(part) :]
        view[: len(part)] = part
        return len(part)


class _Zstd(io.RawIOBase):
    """The frames of a zstd file. `zstandard`'s own reader does not notice one that is cut short."""

    _STEP = 1 << 13  # bytes in at a time, since a frame may be 30,000 times as long as its source

    def __init__(self, source: Any, zstandard: Any) -> None:
        self._source, self._ready = source, b""
        # Also frames of `zstd --long=31`: the window is allocated as large as the file says.
        new = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._start_frame, self._frame, self._begun = new.decompressobj, new.decompressobj(), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            left = self._frame.unused_data if self._frame.eof else b""
            data = left or self._source.read(self._STEP)
            if self._frame.eof:
                self._frame, self._begun = self._start_frame(), False
            if not data:
                if self._begun:
                    raise EOFError("the file ends within a frame")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(data)
        part = self._ready[: len(buffer)]
        self._ready = self._ready[len(part) :]
        memoryview(buffer)[: len(part)] = part
        return len(part)


def _decompress(stream: Any, kind: str, path: str) -> Any:
    match kind:
        case "gzip":
            return gzip.GzipFile(fileobj=stream, mode="rb")
        case "xz":
            return lzma.LZMAFile(stream)
        case "bzip2":
            return bz2.BZ2File(stream)
    return _Zstd(stream, records.optional("zstandard", path))


def _read_head(stream: Any) -> bytes:
    head = b""
    while len(head) < HEAD and (part := stream.read(HEAD - len(head))):
        head += part
    return head


def _unpack(file: Any, path: str, name: str) -> tuple[Any, str, bool]:
    """A stream of the file without its compressions, what it then is, and whether it had any."""
    stream = file
    for layer in range(_MOST_LAYERS + 1):
        head = _read_head(stream)
        found = detect(path, name, head)
        stream = io.BufferedReader(_Rest(head, stream), _CHUNK)
        if not found.compression:
            return stream, found.kind, layer > 0
        require(layer < _MOST_LAYERS, f"{path}: is compressed too often; unpack it")
        stream = _decompress(stream, found.compression, path)
        stem, suffix = os.path.splitext(name)
        name = stem + ".tar" * (suffix == ".tgz") if suffix.lower() in _COMPRESSED else name
    raise AssertionError


@contextlib.contextmanager
def _seekable(stream: Any, scratch: Path) -> Iterator[Any]:
    """What is left of a stream, in a nameless file: some formats begin at their end."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        shutil.copyfileobj(stream, file, _CHUNK)
        yield file


# ---- documents --------------------------------------------------------------------------------


def read_documents(
    path: str, name: str, fields: records.Fields, scratch: Path, progress: Callable[[int], Any]
) -> Pieces:
    """The documents of a file that is no plain text, in pieces; see the top of this file.

    `scratch` is a folder for temporary files; `progress` is called with the bytes read so far.
    Raises `ValueError` for a file that is damaged, lacks the field, or changes while it is read.
    """
    before = _identity(path)
    try:
        with open(path, "rb") as file:
            yield from read_stream(file, path, name, fields, scratch, progress)
    except ValueError:
        _require_unchanged(path, before)
        raise
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None
    _require_unchanged(path, before)


def read_stream(
    file: Any,
    path: str,
    name: str,
    fields: records.Fields,
    scratch: Path,
    progress: Callable[[int], Any],
) -> Pieces:
    """`read_documents` of an open file, or of standard input."""
    try:
        for number, piece in enumerate(_documents(file, path, name, fields, scratch)):
            yield piece
            if number % 64 == 0 and not file.closed:
                progress(file.tell() if file.seekable() else 0)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(_damaged(path, error)) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(_damaged(path, error)) from None  # said by gzip, bz2 or pyarrow
    except Exception as error:
        # Packages that may not be installed, and whose errors are of no type that we can name.
        if type(error).__module__.partition(".")[0] not in ("pyarrow", "zstandard", "zstd"):
            raise
        raise ValueError(_damaged(path, error)) from None


def _documents(file: Any, path: str, name: str, fields: records.Fields, scratch: Path) -> Pieces:
    stream, kind, compressed = _unpack(file, path, name)
    match kind:
        case "":
            while piece := stream.read(_CHUNK):
                yield piece
            yield None
        case "JSON lines":
            yield from records.json_lines(stream, path, fields)
        case "JSON":
            yield from records.json_values(stream, path, fields)
        case "tar":
            yield from records.tar_samples(stream, path, fields)
        case "array record":
            yield from records.array_record(path, fields)
        case "arrow stream":
            yield from records.arrow_columns(stream, kind, path, fields)
        case _:
            random_access = not compressed and file.seekable()
            opened = contextlib.nullcontext(file) if random_access else _seekable(stream, scratch)
            with opened as seekable:
                seekable.seek(0)
                yield from records.arrow_columns(seekable, kind, path, fields)


def _damaged(path: str, error: Exception) -> str:
    return f"{path}: is damaged or cut short ({one_line(error, 120)}); fetch or write it again"


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None
    return status.st_size, status.st_mtime_ns


def _require_unchanged(path: str, before: tuple[int, int]) -> None:
    same = _identity(path) == before
    require(same, f"{path}: changed while it was read; try again when nothing writes to it")
