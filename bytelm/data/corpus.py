"""Bytes on disk to batches of ids: corpora, their split, windows, shuffled and ordered batches.

A corpus is a sequence of documents in memory-mapped files; a document is a whole file or, in a
prepared file, the bytes between two bounds. Layout of a prepared file, all numbers little-endian:

    documents, one after the other | end of each document, int64 | their count, uint64 | BYTELM01

Windows cut the stream of all documents into rows of equal length. The position in the data is one
integer, the step: its batch depends on nothing but the seed, the step and the global batch size.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from bytelm.config import require

MAGIC = b"BYTELM01"
_FOOTER_TAIL = 16  # bytes of count and magic
_OPEN_MAPS = 256  # each map holds a file descriptor, of which a process often has only 1024
_NOT_LIBRARY = ["__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"]


# ---- corpus ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus: its name relative to the given path, its location, its size in bytes."""

    name: str
    path: str
    size: int


class _Maps:
    """The memory maps of a corpus' files; closes the least recently used first. Thread-safe."""

    def __init__(self, files: tuple[SourceFile, ...]) -> None:
        self.files = files
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> np.ndarray:
        with self._lock:
            if index not in self._open:
                self._open[index] = self._map(self.files[index])
                if len(self._open) > _OPEN_MAPS:
                    self._open.popitem(last=False)
            self._open.move_to_end(index)
            return self._open[index]

    def _map(self, file: SourceFile) -> np.ndarray:
        try:
            size = os.stat(file.path).st_size
            # Reading a map past the end of a file that has shrunk kills the process.
            require(
                size == file.size,
                f"{file.path}: changed from {file.size} to {size} bytes since it was opened; "
                "leave data files alone during a run",
            )
            return np.asarray(np.memmap(file.path, np.uint8, mode="r"))
        except OSError as error:
            raise ValueError(unreadable(file.path, error)) from None


class _Memory(_Maps):
    """Documents in memory instead of files."""

    def __init__(self, documents: Sequence[bytes]) -> None:
        named = enumerate(map(len, documents))
        super().__init__(tuple(SourceFile(str(index), "", size) for index, size in named))
        self._documents = documents

    def _map(self, file: SourceFile) -> np.ndarray:
        return np.frombuffer(self._documents[int(file.name)], np.uint8)


class Corpus:
    """Documents in memory-mapped files; created by `open_corpus`, `split` and its own methods.

    `lengths` is int64 [documents], in bytes; no document is empty, but a corpus may be.
    """

    def __init__(
        self,
        maps: _Maps,
        owners: Int64[np.ndarray, " documents"],
        starts: Int64[np.ndarray, " documents"],
        stops: Int64[np.ndarray, " documents"],
    ) -> None:
        self._maps, self._owners, self._starts, self._stops = maps, owners, starts, stops
        self.lengths: Int64[np.ndarray, " documents"] = stops - starts
        self.lengths.setflags(write=False)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.lengths)

    @property
    def total_bytes(self) -> int:
        """Total bytes of all documents."""
        return int(self.lengths.sum())

    def read(self, document: int, start: int, stop: int) -> UInt8[np.ndarray, " bytes"]:
        """Bytes `start` to `stop` of a document, uint8 [stop - start]: a read-only view.

        Raises `ValueError` for a range outside the document and for a file whose size has changed.
        """
        known = 0 <= document < self.documents
        require(known, f"document={document}: the corpus has {self.documents}, counted from 0")
        length = int(self.lengths[document])
        inside = 0 <= start <= stop <= length
        require(inside, f"range {start} to {stop}: document {document} has {length} bytes")
        origin = int(self._starts[document])
        return self._maps[int(self._owners[document])][origin + start : origin + stop]

    def subset(self, indices: Sequence[int] | Int64[np.ndarray, " chosen"]) -> Corpus:
        """A corpus of the documents with these indices, in that order."""
        chosen = np.asarray(indices, np.int64)
        inside = bool(((chosen >= 0) & (chosen < self.documents)).all())
        require(inside, f"indices: choose from 0 to {self.documents - 1}")
        return Corpus(self._maps, self._owners[chosen], self._starts[chosen], self._stops[chosen])

    def cut(self, position: int) -> tuple[Corpus, Corpus]:
        """The first `position` bytes and the rest; a document across the cut is divided."""
        total = self.total_bytes
        require(0 <= position <= total, f"position={position}: the corpus has {total} bytes")
        starts = np.cumsum(self.lengths) - self.lengths
        middles = self._starts + np.clip(position - starts, 0, self.lengths)
        head, tail = middles > self._starts, middles < self._stops
        return (
            Corpus(self._maps, self._owners[head], self._starts[head], middles[head]),
            Corpus(self._maps, self._owners[tail], middles[tail], self._stops[tail]),
        )

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the names and sizes of the files and the bounds of the documents.

        It is independent of where the data is stored. It does not read the documents: a change that
        keeps every size goes unnoticed.
        """
        digest = hashlib.sha256(f"{len(self._maps.files)} {self.documents}".encode())
        for file in self._maps.files:
            name = file.name.encode("utf-8", "surrogateescape")
            digest.update(f" {file.size} {len(name)} ".encode() + name)
        for array in (self._owners, self._starts, self._stops):
            digest.update(array.astype("<i8").tobytes())
        return digest.hexdigest()


def open_corpus(paths: Sequence[str | Path]) -> Corpus:
    """The documents of files and folders, in the order of `paths`.

    A prepared file contributes its documents, any other file is one document, and a folder
    contributes its files in the order of their relative paths. In folders, hidden and empty files
    are skipped and each linked folder is entered once. Empty `paths` mean the `.py` files of the
    running interpreter's standard library without its tests. Raises `ValueError` for a path that is
    missing, unreadable or without bytes, and for a damaged prepared file.
    """
    if not path_list(paths):
        library = sysconfig.get_paths()["stdlib"]
        return assemble([(library, _library_files(library))], damaged_is_plain=False)
    return assemble([(path, list_files(path)) for path in paths], damaged_is_plain=False)


def memory_corpus(documents: bytes | Sequence[bytes]) -> Corpus:
    """One document, or several in order, as a corpus; empty ones are dropped.

    Raises `ValueError` for data that are not bytes.
    """
    listed = [documents] if isinstance(documents, bytes) else documents
    for document in listed:
        known = isinstance(document, bytes)
        require(known, f"data: {type(document).__name__}; give bytes (text.encode()), or a list")
    filled = [document for document in listed if document]
    owners, stops = np.arange(len(filled)), np.array([len(each) for each in filled], np.int64)
    return Corpus(_Memory(filled), owners, np.zeros_like(stops), stops)


def path_list(paths: Sequence[str | Path]) -> Sequence[str | Path]:
    single = isinstance(paths, (str, os.PathLike))  # a string is a sequence of strings
    require(not single, f"paths={str(paths)!r}: give a list of paths")
    return paths


def list_files(path: str | Path) -> list[tuple[str, str]]:
    """(name, path) of the file at `path` or of every file in that folder."""
    if os.path.isdir(path):
        return _walk(str(path), ())
    require(os.path.lexists(path), f"{path}: does not exist; check the spelling")
    return [(os.path.basename(path), str(path))]


def _library_files(library: str) -> list[tuple[str, str]]:
    installed = ("_sysconfigdata", "config-")  # differs from machine to machine
    files = [each for each in _walk(library, _NOT_LIBRARY) if each[0].endswith(".py")]
    return [each for each in files if not each[0].startswith(installed)]


def _walk(root: str, left_out: Sequence[str]) -> list[tuple[str, str]]:
    """(path relative to `root`, path) of every visible file below, sorted by the former."""
    seen = {os.path.realpath(root)}

    def enters(folder: str, name: str) -> bool:
        if name.startswith(".") or name in left_out:
            return False
        parent, target = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
        if (
            target in seen or os.path.commonpath((parent, target)) == target
        ):  # already visited, or a loop
            return False
        seen.add(target)
        return True

    def fail(error: OSError) -> None:
        raise ValueError(unreadable(str(error.filename), error))

    paths = []
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = [name for name in sorted(folders) if enters(folder, name)]
        paths += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    return sorted((os.path.relpath(path, root).replace(os.sep, "/"), path) for path in paths)


def assemble(
    listings: Iterable[tuple[str | Path, list[tuple[str, str]]]], *, damaged_is_plain: bool
) -> Corpus:
    """The corpus of pairs (path given, its files). Raises `ValueError` for a path without bytes."""
    files: list[SourceFile] = []
    ends: list[np.ndarray] = []
    for path, listed in listings:
        known = len(files)
        for name, location in listed:
            try:
                size, bounds = _inspect(location, damaged_is_plain)
            except OSError as error:
                raise ValueError(unreadable(location, error)) from None
            if len(bounds):
                files.append(SourceFile(name, location, size))
                ends.append(bounds)
        filled = len(files) > known
        require(filled, f"{path}: holds no bytes; give a file or folder with visible content")
    owners = np.repeat(np.arange(len(files)), [len(bounds) for bounds in ends])
    starts = [np.concatenate(([0], bounds[:-1])) for bounds in ends]
    return Corpus(_Maps(tuple(files)), owners, np.concatenate(starts), np.concatenate(ends))


def _inspect(path: str, damaged_is_plain: bool) -> tuple[int, Int64[np.ndarray, " documents"]]:
    """Size of a file and the ends of its documents: none if it is empty or not a regular file."""
    status = os.stat(path)
    size = status.st_size
    if not stat.S_ISREG(status.st_mode) or not size:
        return 0, np.zeros(0, np.int64)
    with open(path, "rb") as file:
        file.seek(max(0, size - _FOOTER_TAIL))
        tail = file.read(_FOOTER_TAIL)
        if not tail.endswith(MAGIC):
            return size, np.array([size])
        count = int.from_bytes(tail[: -len(MAGIC)], "little")
        body = size - _FOOTER_TAIL - 8 * count
        if 1 <= count <= body:
            file.seek(body)
            ends = np.frombuffer(file.read(8 * count), "<i8").astype(np.int64)
            if ends[0] > 0 and ends[-1] == body and bool((ends[1:] > ends[:-1]).all()):
                return size, ends
    require(
        damaged_is_plain,
        f"{path}: ends like a prepared file, but its {count} documents do not fit its {size} "
        "bytes; prepare it again from the originals",
    )
    return size, np.array([size])


def unreadable(path: str, error: OSError) -> str:
    return f"{path}: cannot be read ({error.strerror}); fix it or leave it out"


# ---- prepared files ---------------------------------------------------------------------------


# ---- training and validation ------------------------------------------------------------------


# ---- windows and batches ----------------------------------------------------------------------
