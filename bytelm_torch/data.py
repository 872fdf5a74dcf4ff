"""Bytes on disk to batches of ids: the same windows and batches as `bytelm_jax/data.py` makes.

The text is that file's but for `batches`, which needs no grain; a test holds the rest equal. A
corpus is a sequence of documents in memory-mapped files; a document is a whole file or, in a
prepared file, the bytes between two bounds (the layout is described there). `Windows` is a dataset
in torch's sense: random access, a length.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import operator
import os
import stat
import sysconfig
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int32, Int64, UInt8
from torch.utils.data import DataLoader

from .config import ByteVocab, require
from .shuffle import shuffled_index

MAGIC = b"BYTELM01"
_FOOTER_TAIL = 16  # bytes of count and magic
_COPY_CHUNK = 1 << 22  # bytes
_OPEN_MAPS = 256  # each holds a file descriptor, of which a process often has 1024
_SHUFFLE_LIMIT = 1 << 32  # the permutation is of 32-bit indices
_NOT_LIBRARY = ["__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"]


# ---- corpus ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceFile:
    """A file of a corpus: its name within the path that gave it, where it lies, its bytes."""

    name: str
    path: str
    size: int


class _Maps:
    """The memory maps of a corpus' files, the least recently used closed first. Thread-safe."""

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
            # Reading a map past the end of a file that shrank kills the process.
            require(
                size == file.size,
                f"{file.path}: changed from {file.size} to {size} bytes since it was opened; "
                "leave data files alone during a run",
            )
            return np.asarray(np.memmap(file.path, np.uint8, mode="r"))
        except OSError as error:
            raise ValueError(_unreadable(file.path, error)) from None


class Corpus:
    """Documents of bytes in memory-mapped files; made by `open_corpus`, `split` and its methods.

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
        """Bytes of all documents."""
        return int(self.lengths.sum())

    def read(self, document: int, start: int, stop: int) -> UInt8[np.ndarray, " bytes"]:
        """Bytes `start` to `stop` of a document, uint8 [stop - start]: a read-only view.

        Raises `ValueError` for a range outside the document and for a file that changed size.
        """
        known = 0 <= document < self.documents
        require(known, f"document={document}: the corpus has {self.documents}, counted from 0")
        length = int(self.lengths[document])
        inside = 0 <= start <= stop <= length
        require(inside, f"range {start} to {stop}: document {document} has {length} bytes")
        origin = int(self._starts[document])
        return self._maps[int(self._owners[document])][origin + start : origin + stop]

    def subset(self, indices: Sequence[int] | Int64[np.ndarray, " chosen"]) -> Corpus:
        """The documents of these indices, in their order."""
        chosen = np.asarray(indices, np.int64)
        inside = bool(((chosen >= 0) & (chosen < self.documents)).all())
        require(inside, f"indices: choose from 0 to {self.documents - 1}")
        return Corpus(self._maps, self._owners[chosen], self._starts[chosen], self._stops[chosen])

    def cut(self, position: int) -> tuple[Corpus, Corpus]:
        """The first `position` bytes and the rest; a document across the cut gives both a part."""
        total = self.total_bytes
        require(0 <= position <= total, f"position={position}: the corpus has {total} bytes")
        begins = np.cumsum(self.lengths) - self.lengths
        middles = self._starts + np.clip(position - begins, 0, self.lengths)
        head, tail = middles > self._starts, middles < self._stops
        return (
            Corpus(self._maps, self._owners[head], self._starts[head], middles[head]),
            Corpus(self._maps, self._owners[tail], middles[tail], self._stops[tail]),
        )

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the names and sizes of the files and the bounds of the documents.

        The same for the same data at another place. It does not read the documents: a change that
        keeps every size goes unseen.
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

    A prepared file gives its documents, any other file is one document, a folder gives its files
    in the order of their relative paths. In folders hidden and empty files are skipped and each
    linked folder is entered once. No paths: the `.py` files of the running interpreter's standard
    library without its tests. Raises `ValueError` for a path that is missing, unreadable or
    without bytes, and for a file that ends in the magic of a prepared file but does not add up.
    """
    if not _path_list(paths):
        library = sysconfig.get_paths()["stdlib"]
        return _corpus([(library, _library_files(library))], damaged_is_plain=False)
    return _corpus([(path, _list_files(path)) for path in paths], damaged_is_plain=False)


def _path_list(paths: Sequence[str | Path]) -> Sequence[str | Path]:
    single = isinstance(paths, (str, os.PathLike))  # a string is a sequence of strings
    require(not single, f"paths={str(paths)!r}: give a list of paths")
    return paths


def _list_files(path: str | Path) -> list[tuple[str, str]]:
    """(name, path) of the file at `path` or of every file in that folder."""
    if os.path.isdir(path):
        return _walk(str(path), ())
    require(os.path.lexists(path), f"{path}: does not exist; check the spelling")
    return [(os.path.basename(path), str(path))]


def _library_files(library: str) -> list[tuple[str, str]]:
    made_on_installation = ("_sysconfigdata", "config-")  # differs from machine to machine
    found = [each for each in _walk(library, _NOT_LIBRARY) if each[0].endswith(".py")]
    return [each for each in found if not each[0].startswith(made_on_installation)]


def _walk(root: str, left_out: Sequence[str]) -> list[tuple[str, str]]:
    """(path relative to `root`, path) of every visible file below, sorted by the former."""
    seen = {os.path.realpath(root)}

    def enters(folder: str, name: str) -> bool:
        if name.startswith(".") or name in left_out:
            return False
        here, there = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
        if there in seen or os.path.commonpath((here, there)) == there:  # seen, or a loop
            return False
        seen.add(there)
        return True

    def fail(error: OSError) -> None:
        raise ValueError(_unreadable(str(error.filename), error))

    found = []
    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        folders[:] = [name for name in sorted(folders) if enters(folder, name)]
        found += [os.path.join(folder, name) for name in files if not name.startswith(".")]
    return sorted((os.path.relpath(path, root).replace(os.sep, "/"), path) for path in found)


def _corpus(
    listings: Iterable[tuple[str | Path, list[tuple[str, str]]]], *, damaged_is_plain: bool
) -> Corpus:
    """The corpus of (path given, its files). A path without bytes raises."""
    files: list[SourceFile] = []
    ends: list[np.ndarray] = []
    for path, listed in listings:
        known = len(files)
        for name, location in listed:
            try:
                size, bounds = _inspect(location, damaged_is_plain)
            except OSError as error:
                raise ValueError(_unreadable(location, error)) from None
            if len(bounds):
                files.append(SourceFile(name, location, size))
                ends.append(bounds)
        filled = len(files) > known
        require(filled, f"{path}: holds no bytes; give a file or folder with visible content")
    owners = np.repeat(np.arange(len(files)), [len(bounds) for bounds in ends])
    starts = [np.concatenate(([0], bounds[:-1])) for bounds in ends]
    return Corpus(_Maps(tuple(files)), owners, np.concatenate(starts), np.concatenate(ends))


def _inspect(path: str, damaged_is_plain: bool) -> tuple[int, Int64[np.ndarray, " documents"]]:
    """Size of a file and the ends of its documents: none if it is empty or no regular file."""
    found = os.stat(path)
    size = found.st_size
    if not stat.S_ISREG(found.st_mode) or not size:
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


def _unreadable(path: str, error: OSError) -> str:
    return f"{path}: cannot be read ({error.strerror}); mend it or leave it out"


# ---- prepared files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote."""

    documents: int
    bytes: int


def prepare(paths: Sequence[str | Path], out: str | Path) -> Prepared:
    """Writes the documents of files and folders, as `open_corpus` finds them, into one file.

    Prepared files among them are merged; here a file that ends in the magic but does not add up
    is a document like any other. Memory is bounded whatever the size. `out` appears complete or
    keeps its old content. Raises `ValueError` where `open_corpus` does, for an `out` that is a
    folder, lies in one of the inputs or cannot be written, and for a file that shrinks meanwhile.
    """
    require(len(_path_list(paths)) > 0, "paths: give at least one file or folder")
    target = Path(os.path.realpath(out))
    _check_target(paths, out, target)
    corpus = _corpus([(path, _list_files(path)) for path in paths], damaged_is_plain=True)
    listed = {os.path.realpath(file.path) for file in corpus._maps.files}
    require(str(target) not in listed, f"{out}: is one of the inputs; choose another output")

    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as sink:
            for chunk in _bodies(corpus):
                sink.write(chunk)
            sink.write(np.cumsum(corpus.lengths).astype("<i8").tobytes())
            sink.write(corpus.documents.to_bytes(8, "little") + MAGIC)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(partial, target)
        _sync_folder(target.parent)
    except OSError as error:
        why = f"{out}: cannot be written ({error.strerror}); choose another place or free space"
        raise ValueError(why) from None
    finally:
        partial.unlink(missing_ok=True)
    return Prepared(corpus.documents, corpus.total_bytes)


def _check_target(paths: Sequence[str | Path], out: str | Path, target: Path) -> None:
    require(not target.is_dir(), f"{out}: is a folder; name a file")
    usable = target.is_file() or not target.exists()
    require(usable, f"{out}: is not a regular file; name another")
    require(target.parent.is_dir(), f"{out}: its folder does not exist; create it first")
    for path in paths:
        inside = os.path.isdir(path) and target.is_relative_to(os.path.realpath(path))
        require(not inside, f"{out}: lies in the input {path}; choose a place outside it")


def _bodies(corpus: Corpus) -> Iterator[bytes]:
    """The documents' bytes in chunks. Plain reads: a map of a shrinking file is fatal."""
    firsts = np.flatnonzero(np.diff(corpus._owners, prepend=-1))
    sizes = np.add.reduceat(corpus.lengths, firsts)
    for source, body in zip(corpus._maps.files, sizes.tolist(), strict=True):
        try:
            with open(source.path, "rb") as file:
                while body:
                    chunk = file.read(min(body, _COPY_CHUNK))
                    require(chunk != b"", f"{source.path}: shrank while it was read; try again")
                    body -= len(chunk)
                    yield chunk
        except OSError as error:
            raise ValueError(_unreadable(source.path, error)) from None


def _sync_folder(folder: Path) -> None:
    """Makes the rename survive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)


# ---- training and validation ------------------------------------------------------------------


def split(corpus: Corpus, fraction: float, seed: int) -> tuple[Corpus, Corpus]:
    """(training, validation): by document, about `fraction` of them in validation.

    A document's side depends on `seed` and its index alone. Where that leaves a side empty, as
    with a single document, the last `fraction` of all bytes is validation instead, at least one
    byte on each side. With `fraction=0` validation is an empty corpus. Raises `ValueError` for a
    fraction outside [0, 1) and for a corpus too small to share.
    """
    require(0 <= fraction < 1, f"fraction={fraction}: must be at least 0 and below 1")
    if fraction == 0:
        return corpus, corpus.subset([])
    held_out = _mix(seed, corpus.documents) < np.uint64(int(fraction * 2**64))
    if held_out.any() and not held_out.all():
        return corpus.subset(np.flatnonzero(~held_out)), corpus.subset(np.flatnonzero(held_out))
    total = corpus.total_bytes
    require(total >= 2, f"fraction={fraction}: {total} bytes cannot be shared; give more data")
    return corpus.cut(total - min(max(1, round(total * fraction)), total - 1))


def _mix(seed: int, count: int) -> np.ndarray:
    """Hashes uint64 [count] of (seed, index): SplitMix64 (Steele et al. 2014), twice seeded.

    Integer arithmetic, so the same on every machine and numpy.
    """
    golden = 0x9E3779B97F4A7C15

    def scramble(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    # Scrambled first: else seeds that differ by the golden constant share shifted hashes.
    origin = scramble(np.array([(seed + golden) % 2**64], np.uint64))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(golden)
    return scramble(origin + steps)


# ---- windows and batches ----------------------------------------------------------------------


class Windows:
    """The stream of a corpus' documents as rows of `length` ids; a random-access sequence.

    Each document is followed by `eos_id` if `append_eos`; the last row is filled up with `pad_id`.
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


def batches(
    windows: Windows,
    batch_size: int,
    shuffle_seed: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Int32[np.ndarray, "B T"]]:
    """Endless shuffled batches from `start_step` on, int32 [batch_size // process_count, length].

    The batch of step s is rows s * batch_size to (s + 1) * batch_size of an endless order in which
    every epoch visits each window once, newly shuffled; process p gets the p-th of the equal parts
    that it is cut into. Nothing before `start_step` is read. The order is grain's, and so that of
    `bytelm_jax`. Raises `ValueError` at once for a corpus without bytes and for sizes that do not
    fit.
    """
    rows = _rows(windows, batch_size, process_index, process_count)
    for name, value in (("shuffle_seed", shuffle_seed), ("start_step", start_step)):
        require(value >= 0, f"{name}={value}: must be at least 0")
    fits = len(windows) <= _SHUFFLE_LIMIT
    require(fits, f"length={windows.length}: more than 2**32 windows; choose longer ones")

    def order() -> Iterator[list[int]]:
        for step in itertools.count(start_step):
            begin = step * batch_size + process_index * rows
            yield [
                shuffled_index(position, len(windows), shuffle_seed)
                for position in range(begin, begin + rows)
            ]

    return iter(DataLoader(windows, batch_sampler=order(), collate_fn=np.stack))  # pyright: ignore


def evaluation_batches(
    windows: Windows,
    batch_size: int,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Int32[np.ndarray, "B T"]]:
    """Every window once and in order, int32 [batch_size // process_count, length].

    The last batch is filled up with rows of `pad_id`. `limit` takes at most that many windows,
    evenly spaced. Process p gets the p-th of the equal parts that each batch is cut into. Raises
    `ValueError` at once for a corpus without bytes and for sizes that do not fit.
    """
    rows = _rows(windows, batch_size, process_index, process_count)
    require(limit is None or limit >= 1, f"limit={limit}: must be at least 1")
    count = len(windows) if limit is None else min(limit, len(windows))

    def generate() -> Iterator[np.ndarray]:
        for begin in range(process_index * rows, -(-count // batch_size) * batch_size, batch_size):
            batch = np.full((rows, windows.length), windows.vocab.pad_id, np.int32)
            for row, number in enumerate(range(begin, min(begin + rows, count))):
                batch[row] = windows[number * len(windows) // count]
            yield batch

    return generate()


def _rows(windows: Windows, batch_size: int, process_index: int, process_count: int) -> int:
    """Rows of each batch that belong to one process."""
    require(len(windows) > 0, "corpus: holds no bytes; give data, or hold less of it out")
    known = 0 <= process_index < process_count
    require(known, f"process_index={process_index}: must be from 0 to {process_count - 1}")
    require(
        batch_size >= 1 and batch_size % process_count == 0,
        f"batch_size={batch_size}: must be a positive multiple of process_count={process_count}",
    )
    return batch_size // process_count
