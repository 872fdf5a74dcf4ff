"""Objects on stores become files in a folder here: listed, downloaded, checked, kept.

An object lies in FOLDER/KEY/NAME, where the key is that of its address, size and version, as the
store tells it: one that has changed has another key.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from bytelm.config import require
from bytelm.progress import ReadingBar
from bytelm.storage.stores import open_store, patiently, protocol_of, tidy

_VERSIONS = (
    "generation", "etag", "ETag", "lfs", "blob_id", "md5Hash", "Content-MD5", "Digest",
    "LastModified", "Last-Modified", "updated", "mtime", "modified", "created",
)  # fmt: skip
"""Fields of a store's description of an object that change with it; the first known one counts."""

_PIECE = 1 << 24  # bytes of a request
_READERS = 16
"""Requests at once, of all objects together."""


@dataclass(frozen=True)
class StoredObject:
    """An object on a store: its address, name under the address asked for, size and version.

    `size` is None where the store does not tell.
    """

    address: str
    name: str
    size: int | None
    version: str
    digest: tuple[str, str] = ("", "")
    """How the store sums up its bytes, "md5", "sha256" or "git" (SHA-1 of a blob), and the sum, in
    hexadecimal; empty where it does not tell."""
    whole: bool = False
    """Whether the store gives it only from its beginning."""

    @property
    def key(self) -> str:
        """A name for this version of the object, in hexadecimal."""
        text = repr((self.address, self.size, self.version))
        return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def find_addresses(pattern: str) -> list[str]:
    """The addresses that a glob stands for, sorted; hidden ones must be asked for by their dot."""
    address = tidy(pattern)
    store = open_store(address)
    try:
        found = patiently(address, lambda: store.glob(address))
    except FileNotFoundError:
        found = []
    hidden = address.rpartition("/")[2].startswith(".")
    names = [name for name in found if hidden or not _base(name).startswith(".")]
    require(bool(names), f"{address}: matches no object; check the spelling")
    return sorted(tidy(store.unstrip_protocol(name)) for name in names)


def has_magic(address: str) -> bool:
    """Whether an address is a glob; a `?` belongs to the query of an `https://` address."""
    if protocol_of(address) in ("http", "https"):
        return "*" in address.partition("?")[0]
    return any(letter in address for letter in "*?[")


def list_objects(address: str) -> tuple[list[StoredObject], bool]:
    """The object at an address, or all visible objects under it, and whether it is a folder.

    Raises `ValueError` if there is nothing.
    """
    address = tidy(address)
    store = open_store(address)
    try:
        info = patiently(address, lambda: store.info(address))
    except FileNotFoundError:
        raise ValueError(f"{address}: does not exist; check the spelling") from None
    if info["type"] != "directory":
        return [_described(address, _base(address.partition("?")[0]), info)], False
    return objects_under(address), True


def objects_under(address: str) -> list[StoredObject]:
    """All visible objects in the folder at an address, in the order of their names."""
    store = open_store(address)
    try:
        found = patiently(address, lambda: store.find(address, detail=True))
    except FileNotFoundError:
        return []
    objects = []
    root = store._strip_protocol(address).rstrip("/") + "/"
    for path, details in sorted(found.items()):
        name = str(path).removeprefix(root)
        parts = name.split("/")
        if details["type"] == "directory" or any(part.startswith(".") for part in parts):
            continue
        if all(parts):  # an object whose name ends with a slash is a folder's mark
            objects.append(_described(f"{address}/{name}", name, details))
    return objects


def _base(address: str) -> str:
    return address.rstrip("/").rpartition("/")[2] or "object"


def _described(address: str, name: str, info: dict[str, Any]) -> StoredObject:
    version = next((f"{field} {info[field]}" for field in _VERSIONS if info.get(field)), "")
    whole = info.get("partial") is False
    return StoredObject(address, name, info.get("size"), version, _digest(info), whole)


def _digest(info: Mapping[str, Any]) -> tuple[str, str]:
    """What a store's description of an object says of its contents."""
    if md5 := info.get("md5Hash"):  # Google's
        return "md5", base64.b64decode(md5).hex()
    if large := info.get("lfs"):  # Hugging Face's, of a large file and of one in Git
        return "sha256", str(large["sha256"])
    blob = info.get("blob_id")
    return ("git", str(blob)) if blob else ("", "")


def read_bytes(address: str) -> bytes:
    """The contents of a small object; raises `ValueError` if it does not exist."""
    address = tidy(address)
    store = open_store(address)
    try:
        return patiently(address, lambda: store.cat_file(address))
    except FileNotFoundError:
        raise ValueError(f"{address}: does not exist; check the spelling") from None


def download(
    objects: Sequence[StoredObject], place: Callable[[StoredObject], Path], what: str
) -> None:
    """Downloads objects, several at once, each to the file that `place` names.

    A file appears complete or not at all. `what` stands at the progress bar. Raises `ValueError`,
    one line that names the address, for an object that cannot be read, that changes meanwhile or
    that comes with another size or checksum than the store says.
    """
    sizes = [each.size for each in objects]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    stop = threading.Event()
    with ReadingBar(what, total) as bar, ThreadPoolExecutor(_READERS) as readers:
        progress = _Progress(bar)
        # Objects have threads of their own, which wait for their pieces in those of `readers`.
        with ThreadPoolExecutor(_READERS) as each:
            jobs = [each.submit(_get, one, place(one), readers, progress, stop) for one in objects]
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            if any(job.exception() for job in done):
                stop.set()
                each.shutdown(cancel_futures=True)
        errors = [error for job in jobs if not job.cancelled() and (error := job.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, _StoppedError)):
            raise error


class _StoppedError(Exception):
    """Another object could not be read."""


class _Progress:
    """Adds up what the threads have read."""

    def __init__(self, bar: ReadingBar) -> None:
        self._bar, self._done, self._lock = bar, 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._bar.move(self._done)


def _get(
    one: StoredObject,
    target: Path,
    readers: ThreadPoolExecutor,
    progress: _Progress,
    stop: threading.Event,
) -> None:
    store = open_store(one.address)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        at_once = one.size is None or one.whole
        if at_once or not _get_pieces(one, beside, store, readers, progress, stop):
            patiently(one.address, lambda: store.get_file(one.address, str(beside)))
        _check(one, beside, store)
        os.replace(beside, target)
    except FileNotFoundError:
        raise ValueError(f"{one.address}: does not exist any more; run it again") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"cache_dir={target.parent}: cannot be written ({why})") from None
    finally:
        beside.unlink(missing_ok=True)


def _get_pieces(
    one: StoredObject,
    beside: Path,
    store: Any,
    readers: ThreadPoolExecutor,
    progress: _Progress,
    stop: threading.Event,
) -> bool:
    """Reads an object in pieces, several at once; False if the store knows no pieces."""
    size = one.size or 0
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def get(start: int) -> bool:
        end = min(start + _PIECE, size)
        if stop.is_set():
            raise _StoppedError
        span = {} if (start, end) == (0, size) else {"start": start, "end": end}
        piece = patiently(one.address, lambda: store.cat_file(one.address, **span))
        if len(piece) != end - start:
            return False
        if os.pwrite(handle, piece, start) != len(piece):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        progress.add(len(piece))
        return True

    try:
        jobs = [readers.submit(get, start) for start in range(0, size, _PIECE)]
        try:
            return all([job.result() for job in jobs])
        finally:
            for job in jobs:
                job.cancel()
            wait(jobs)  # they write to the handle
    finally:
        os.close(handle)


def _check(one: StoredObject, file: Path, store: Any) -> None:
    hint = "leave data alone while it is read, and run the same command again"
    size = file.stat().st_size
    good = one.size is None or size == one.size
    require(good, f"{one.address}: {size} bytes came instead of {one.size}; {hint}")
    kind, wanted = one.digest
    if wanted:
        summed = hashlib.new("sha1" if kind == "git" else kind)
        if kind == "git":
            summed.update(f"blob {size}\0".encode())
        with open(file, "rb") as opened:
            found = file_digest(opened, lambda: summed).hexdigest()
        name = "hash" if kind == "git" else kind.upper()
        good = found == wanted
        require(good, f"{one.address}: came damaged (its {name} is another); run it again")
    now = _described(one.address, one.name, patiently(one.address, lambda: store.info(one.address)))
    require(now.key == one.key, f"{one.address}: changed while it was read; {hint}")
    # Caches know a file by its time of change as well: make it that of this version.
    seconds = int(one.key[:7], 16)
    os.utime(file, (seconds, seconds))
