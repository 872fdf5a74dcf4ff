"""Corpora: documents in memory-mapped files.

A document is a whole file or, in a prepared file, the bytes between two bounds. Files of any other
form are read once into a prepared file: see `cache.py`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64

from bytelm.config import require
from bytelm.data.cache import prepared_copy, prepared_input
from bytelm.data.formats import binary_kind, binary_notes, look_at
from bytelm.data.prepared import DIGEST_BYTES, Bounds, read_spans
from bytelm.data.records import Fields, fields_of
from bytelm.data.remote import Listings
from bytelm.data.sources import (
    STANDARD_INPUT,
    Listed,
    SeenFiles,
    expand_paths,
    library_files,
    unreadable,
    without_bytes,
)
from bytelm.progress import ReadingBar

_OPEN_MAPS = 256  # each map holds a file descriptor, of which a process often has only 1024


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus: its name relative to the given path, its location, its size in bytes.

    `given` is the path by which it was asked for: its own, that of a folder, or a glob.
    """

    name: str
    path: str
    size: int
    given: str = ""


class _Maps:
    """The memory maps of a corpus' files; closes the least recently used first. Thread-safe."""

    def __init__(self, files: tuple[SourceFile, ...]) -> None:
        self.files = files
        self.counted: dict[int, Int64[np.ndarray, "runs 2"]] = {}
        """The runs of counted bytes of each file some bytes of which are not counted."""
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

    def spans(self, index: int, spans: Iterable[tuple[int, int]]) -> Iterator[bytes | None]:
        """The bytes of a file from each start to its stop, each span followed by None."""
        return read_spans(self.files[index].path, spans)


class _Memory(_Maps):
    """Documents in memory instead of files."""

    def __init__(self, documents: Sequence[bytes]) -> None:
        named = enumerate(map(len, documents))
        super().__init__(tuple(SourceFile(str(index), "", size) for index, size in named))
        self._documents = documents

    def _map(self, file: SourceFile) -> np.ndarray:
        return np.frombuffer(self._documents[int(file.name)], np.uint8)

    def spans(self, index: int, spans: Iterable[tuple[int, int]]) -> Iterator[bytes | None]:
        for start, stop in spans:
            yield self._documents[index][start:stop]
            yield None


_Digests = tuple[UInt64[np.ndarray, " documents"], Bool[np.ndarray, " documents"]]
"""The digest of each document, and whether it is known yet."""


class Corpus:
    """Documents in memory-mapped files; created by `open_corpus`, `split` and its own methods.

    `lengths` is int64 [documents], in bytes; no document is empty, but a corpus may be. `notes` are
    lines that a person should see before these data are used. `is_cut` says that this is a part of
    a corpus at whose border a document may be divided. `inputs` are device and inode of the files
    that a corpus was opened from.
    """

    def __init__(
        self,
        maps: _Maps,
        owners: Int64[np.ndarray, " documents"],
        starts: Int64[np.ndarray, " documents"],
        stops: Int64[np.ndarray, " documents"],
        digests: _Digests | None = None,
    ) -> None:
        self._maps, self._owners, self._starts, self._stops = maps, owners, starts, stops
        self._digests = digests
        self.notes: tuple[str, ...] = ()
        self.is_cut = False
        self.inputs: frozenset[tuple[int, int]] = frozenset()
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

    def source(self, document: int) -> SourceFile:
        """The file that a document stands in."""
        return self._maps.files[int(self._owners[document])]

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

    @property
    def is_masked(self) -> bool:
        """Whether some bytes of its files are read and not counted."""
        return bool(self._maps.counted)

    @property
    def counted_bytes(self) -> int:
        """How many of all bytes are counted."""
        total = self.total_bytes
        for owner, runs in self._maps.counted.items():
            chosen = self._owners == owner
            # How many are counted before each place: those of the runs that begin before it.
            sums = np.concatenate(([0], np.cumsum(runs[:, 1] - runs[:, 0])))
            bounds = np.stack([self._starts[chosen], self._stops[chosen]])
            index = np.searchsorted(runs[:, 0], bounds)
            stops = np.concatenate(([0], runs[:, 1]))
            before = sums[index] - np.maximum(stops[index] - bounds, 0)
            total += int((before[1] - before[0]).sum() - (bounds[1] - bounds[0]).sum())
        return total

    def counted(self, document: int, start: int, stop: int) -> Bool[np.ndarray, " bytes"]:
        """Which of the bytes `start` to `stop` of a document are counted, bool [stop - start]."""
        runs = self._maps.counted.get(int(self._owners[document]))
        if runs is None:
            return np.ones(stop - start, bool)
        origin = int(self._starts[document])
        begin, end = origin + start, origin + stop
        mask = np.zeros(stop - start, bool)
        first, last = np.searchsorted(runs[:, 1], begin, "right"), np.searchsorted(runs[:, 0], end)
        for run in runs[first:last]:
            mask[max(int(run[0]) - begin, 0) : int(run[1]) - begin] = True
        return mask

    def subset(self, indices: Sequence[int] | Int64[np.ndarray, " chosen"]) -> Corpus:
        """A corpus of the documents with these indices, in that order."""
        chosen = np.asarray(indices, np.int64)
        inside = bool(((chosen >= 0) & (chosen < self.documents)).all())
        require(inside, f"indices: choose from 0 to {self.documents - 1}")
        digests = self._digests and (self._digests[0][chosen], self._digests[1][chosen])
        bounds = self._owners[chosen], self._starts[chosen], self._stops[chosen]
        part = Corpus(self._maps, *bounds, digests)
        part.notes, part.is_cut = self.notes, self.is_cut
        return part

    def cut(self, position: int) -> tuple[Corpus, Corpus]:
        """The first `position` bytes and the rest; a document across the cut is divided."""
        total = self.total_bytes
        require(0 <= position <= total, f"position={position}: the corpus has {total} bytes")
        starts = np.cumsum(self.lengths) - self.lengths
        middles = self._starts + np.clip(position - starts, 0, self.lengths)
        head, tail = middles > self._starts, middles < self._stops
        parts = (
            Corpus(self._maps, self._owners[head], self._starts[head], middles[head]),
            Corpus(self._maps, self._owners[tail], middles[tail], self._stops[tail]),
        )
        for part in parts:
            part.notes, part.is_cut = self.notes, True
        return parts

    def digests(self) -> UInt64[np.ndarray, " documents"]:
        """BLAKE2b of 8 bytes over each document, as little-endian numbers.

        Prepared files hold them. All other documents are read once, at some 0.5 to 1 GB/s.
        """
        known = self._digests or (
            np.zeros(self.documents, np.uint64),
            np.zeros(self.documents, bool),
        )
        digests, hashed = known[0].copy(), known[1]
        missing = np.flatnonzero(~hashed)
        done, digest = 0, blake2b(digest_size=DIGEST_BYTES)
        with ReadingBar("hashing documents", int(self.lengths[missing].sum())) as bar:
            order = iter(missing.tolist())
            for piece in self._pieces(missing):
                if piece is not None:
                    digest.update(piece)
                    done += len(piece)
                    bar.move(done)
                else:
                    digests[next(order)] = int.from_bytes(digest.digest(), "little")
                    digest = blake2b(digest_size=DIGEST_BYTES)
        self._digests = (digests, np.ones(self.documents, bool))
        return digests

    def _pieces(self, chosen: Int64[np.ndarray, " chosen"]) -> Iterator[bytes | None]:
        """The bytes of these documents in pieces, each document followed by None."""
        for owner, group in groupby(chosen.tolist(), key=lambda index: int(self._owners[index])):
            spans = ((int(self._starts[index]), int(self._stops[index])) for index in group)
            yield from self._maps.spans(owner, spans)

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


def open_corpus(
    paths: Sequence[str | Path],
    text_field: str = "text",
    raw: bool = False,
    cache_dir: str = "",
    once: bool = True,
    prompt_field: str = "",
    completion_field: str = "",
    chat_field: str = "",
) -> Corpus:
    """The documents of files and folders, in the order of `paths`.

    A file of plain bytes is one document. JSON, Parquet, Arrow, tar and ArrayRecord give a document
    for each record, the text in its field `text_field`; prepared files give their documents, and
    compressed files those of what is in them. `raw` takes the bytes of all but prepared files as
    they are. What cannot be mapped is read once into `cache_dir` (default: the user's cache).

    A folder contributes its files in the order of their relative paths. In folders, hidden and
    empty files are skipped and each linked folder is entered once. A path may be a glob, "-" for
    standard input, or "@FILE" for the paths in a file. An address on a store (`gs://`, `s3://`,
    `hf://`, `https://`) is downloaded into the cache, a folder there with all under it. Empty
    `paths` mean the `.py` files of the
    running interpreter's standard library without its tests.

    `prompt_field` and `completion_field`, or `chat_field`, take the place of `text_field` where
    some bytes are read and not counted; see `DataConfig`. Of plain bytes all are counted.

    A file that is met again, by the same path or as a hard link, is left out with a line in the
    corpus' `notes`; without `once` it is read again.

    Raises `ValueError` for a path that is missing, unreadable or without bytes, for a damaged file
    and for a record without the field.
    """
    fields = fields_of(text_field, prompt_field, completion_field, chat_field, raw)
    expanded = expand_paths(paths)
    if not expanded:
        return _assemble([library_files()], _Reading(fields, True, cache_dir))
    listings = Listings(expanded, cache_dir)
    with listings.naming_addresses():
        corpus = _assemble(listings.pairs, _Reading(fields, raw, cache_dir, once))
    corpus.notes = tuple(map(listings.named, corpus.notes))
    return corpus


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


def _assemble(listings: Sequence[tuple[str, Sequence[Listed]]], reading: _Reading) -> Corpus:
    """The corpus of pairs (path given, its files). Raises `ValueError` for a path without bytes."""
    files: list[SourceFile] = []
    bounds: list[Bounds] = []
    binary: list[str] = []
    seen = SeenFiles()
    for path, listed in listings:
        filled = False
        for name, location in listed:
            if seen.repeats(location) and reading.once:
                filled = True
                continue
            try:
                found = reading.open(name, location, binary)
            except OSError as error:
                raise ValueError(unreadable(location, error)) from None
            if found is not None and len(found[1].ends):
                files.append(replace(found[0], given=path))
                bounds.append(found[1])
                filled = True
        require(filled, without_bytes(path))
    owners = np.repeat(np.arange(len(files)), [len(each.ends) for each in bounds])
    starts = [np.concatenate(([0], each.ends[:-1])) for each in bounds]
    digests = [np.zeros(len(b.ends), np.uint64) if b.digests is None else b.digests for b in bounds]
    hashed = np.repeat([b.digests is not None for b in bounds], [len(b.ends) for b in bounds])
    stops = [each.ends for each in bounds]
    known_digests = (np.concatenate(digests), hashed)
    maps = _Maps(tuple(files))
    masks = enumerate(each.counted for each in bounds)
    maps.counted = {index: runs for index, runs in masks if runs is not None}
    corpus = Corpus(maps, owners, np.concatenate(starts), np.concatenate(stops), known_digests)
    corpus.notes = binary_notes(binary) + (seen.notes() if reading.once else ())
    corpus.inputs = frozenset(seen.identities)
    return corpus


class _Reading(NamedTuple):
    """How files are read."""

    fields: Fields
    raw: bool
    cache_dir: str
    once: bool = True

    def open(self, name: str, path: str, binary: list[str]) -> tuple[SourceFile, Bounds] | None:
        """A file to map and its documents; None if it is empty or not a regular file.

        What looks binary is added to `binary`.
        """
        if path == STANDARD_INPUT:
            path = prepared_input(self.fields, self.raw, self.cache_dir)
        looked = look_at(path, self.raw)
        if looked is not None and looked.is_container:
            path = prepared_copy(path, name, self.fields, self.cache_dir)
            looked = look_at(path, self.raw)
        if looked is None:
            return None
        if kind := binary_kind(looked.head):
            binary.append(f"{path}: looks binary ({kind})")
        return SourceFile(name, path, looked.size), looked.bounds
