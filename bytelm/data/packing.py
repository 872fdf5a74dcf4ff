"""Packing data of any form into one prepared file."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.config import require
from bytelm.data.cache import input_pieces
from bytelm.data.formats import Pieces, binary_kind, binary_notes, look_at, read_documents
from bytelm.data.prepared import (
    Prepared,
    Unscored,
    read_bounds,
    read_spans,
    unwritable,
    write_prepared,
)
from bytelm.data.records import Fields, fields_of
from bytelm.data.remote import Listings
from bytelm.data.sources import (
    STANDARD_INPUT,
    Listed,
    SeenFiles,
    expand_paths,
    unreadable,
    without_bytes,
)
from bytelm.progress import ReadingBar
from bytelm.storage.stores import require_local


def prepare(
    paths: Sequence[str | Path],
    out: str | Path,
    text_field: str = "text",
    raw: bool = False,
    shard_bytes: int = 0,
    prompt_field: str = "",
    completion_field: str = "",
    chat_field: str = "",
) -> Prepared:
    """Writes the documents of files and folders, as `open_corpus` finds them, into one file.

    With `shard_bytes`, `out` is a new folder of files, each of which is closed by the document with
    which it reaches that size; opened as a folder they are the same corpus in the same order.

    Files that are met again are left out, with a line in the `notes` of the result.
    `prompt_field` and the others are those of `DataConfig`: what is not counted is marked in `out`.
    Prepared files among them are merged; a damaged prepared file counts as one plain document.
    Memory use is bounded whatever the size, and the cache is used for addresses alone. `out`
    appears complete or keeps its old content. Raises `ValueError` where `open_corpus` does, for an
    `out` that is a folder (with `shard_bytes`, one that holds something), lies in one of the inputs
    or cannot be written, and for a file that changes meanwhile.
    """
    fields = fields_of(text_field, prompt_field, completion_field, chat_field, raw)
    expanded = expand_paths(paths)
    require(len(expanded) > 0, "paths: give at least one file or folder")
    require(shard_bytes >= 0, f"shard_bytes={shard_bytes}: must be at least 0")
    target = Path(os.path.realpath(out))
    _check_target(expanded, out, target, bool(shard_bytes))
    listings = Listings(expanded, "")
    listed = {os.path.realpath(file.path) for _, files in listings.pairs for file in files}
    require(str(target) not in listed, f"{out}: is one of the inputs; choose another output")
    size = 0 if shard_bytes or not target.exists() else target.stat().st_size
    ours = not size or read_bounds(str(target), size, damaged_is_plain=True) is not None
    require(ours, f"{out}: exists and is no prepared file; name another, or remove it")

    seen, binary = SeenFiles(), list[str]()

    def pieces() -> Iterator[bytes | None]:
        for path, files in listings.pairs:
            filled = False
            for file in files:
                if seen.repeats(file.path):
                    filled = True
                    continue
                for piece in _pieces(file, fields, raw, target.parent, binary):
                    filled = filled or bool(piece)
                    yield piece
            require(filled, without_bytes(path))

    with listings.naming_addresses():
        if shard_bytes:
            written = _write_shards(target, pieces(), str(out), shard_bytes)
        else:
            written = write_prepared(target, pieces(), str(out))
    return replace(written, notes=(*seen.notes(), *binary_notes(binary)))


def _write_shards(
    target: Path, pieces: Iterator[bytes | None], called: str, shard_bytes: int
) -> Prepared:
    """`write_prepared` into the files of a folder, which appears when it is complete."""
    partial, written = target.with_name(f".{target.name}.{os.urandom(4).hex()}.partial"), []
    try:
        partial.mkdir()
        for first in pieces:
            shard = _one_shard(first, pieces, shard_bytes)
            written.append(write_prepared(partial / f"{len(written):05}.bytes", shard, called))
        os.replace(partial, target)
    except OSError as error:
        raise ValueError(unwritable(called, error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Prepared(sum(each.documents for each in written), sum(each.bytes for each in written))


def _one_shard(
    first: bytes | None, pieces: Iterator[bytes | None], shard_bytes: int
) -> Iterator[bytes | None]:
    """The pieces from `first` on, until a document ends at `shard_bytes` or later."""
    size = 0
    for piece in itertools.chain((first,), pieces):
        yield piece
        size += len(piece or b"")
        if piece is None and size >= shard_bytes:
            return


def _pieces(
    file: Listed, fields: Fields, raw: bool, scratch: Path, binary: list[str]
) -> Iterator[bytes | None]:
    """The documents of a file in pieces, each document followed by None.

    A file of plain bytes that look binary is added to `binary`, with what it seems to be.
    """
    if file.path == STANDARD_INPUT:
        return input_pieces(fields, raw, scratch)
    try:
        looked = look_at(file.path, raw, damaged_is_plain=True)
    except OSError as error:
        raise ValueError(unreadable(file.path, error)) from None
    if looked is None:
        return iter(())
    if looked.is_container:
        return _with_bar(
            file,
            looked.size,
            lambda move: read_documents(
                file.path, os.path.basename(file.path), fields, scratch, move
            ),
        )
    if kind := binary_kind(looked.head):
        binary.append(f"{file.path}: looks binary ({kind})")
    ends, counted = looked.bounds.ends.tolist(), looked.bounds.counted
    spans = zip([0, *ends[:-1]], ends, strict=True)
    if counted is not None:
        return _masked(file.path, spans, counted)
    return read_spans(file.path, spans)


def _masked(path: str, spans: Iterable[tuple[int, int]], counted: np.ndarray) -> Pieces:
    """`read_spans` of a prepared file some bytes of which are not counted."""
    edges = counted.ravel()
    for start, stop in spans:
        first = int(np.searchsorted(edges, start, "right"))
        last = int(np.searchsorted(edges, stop, "left"))
        cuts = [start, *edges[first:last].tolist(), stop]
        for number, part in enumerate(pairwise(cuts), first):
            for piece in read_spans(path, [part]):
                if piece is not None:
                    yield piece if number % 2 else Unscored(piece)
        yield None


def _with_bar(
    file: Listed, size: int, read: Callable[[Callable[[int], Any]], Iterator[bytes | None]]
) -> Iterator[bytes | None]:
    with ReadingBar(f"reading {file.name}", size) as bar:
        yield from read(bar.move)


def _check_target(paths: Sequence[str], out: str | Path, target: Path, shards: bool) -> None:
    require_local(out, "out")
    if shards:
        empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        require(empty, f"{out}: exists already; name a new folder for the shards")
    else:
        require(not target.is_dir(), f"{out}: is a folder; name a file")
        usable = target.is_file() or not target.exists()
        require(usable, f"{out}: is not a regular file; name another")
    require(target.parent.is_dir(), f"{out}: its folder does not exist; create it first")
    for path in paths:
        inside = os.path.isdir(path) and target.is_relative_to(os.path.realpath(path))
        require(not inside, f"{out}: lies in the input {path}; choose a place outside it")
