"""Packing any corpus into one prepared file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bytelm.config import require
from bytelm.data.corpus import MAGIC, Corpus, assemble, list_files, path_list, unreadable

_COPY_CHUNK = 1 << 22  # bytes


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`."""

    documents: int
    bytes: int


def prepare(paths: Sequence[str | Path], out: str | Path) -> Prepared:
    """Writes the documents of files and folders, as `open_corpus` finds them, into one file.

    Prepared files among them are merged; a damaged prepared file counts as one plain document.
    Memory use is bounded whatever the size. `out` appears complete or keeps its old content. Raises
    `ValueError` where `open_corpus` does, for an `out` that is a folder, lies in one of the inputs
    or cannot be written, and for a file that shrinks meanwhile.
    """
    require(len(path_list(paths)) > 0, "paths: give at least one file or folder")
    target = Path(os.path.realpath(out))
    _check_target(paths, out, target)
    corpus = assemble([(path, list_files(path)) for path in paths], damaged_is_plain=True)
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
    """The documents' bytes in chunks, by plain reads: mapping a shrinking file would be fatal."""
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
            raise ValueError(unreadable(source.path, error)) from None


def _sync_folder(folder: Path) -> None:
    """Makes the rename survive a power cut, if the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)
