"""Texts that cannot be mapped into memory, such as compressed ones: prepared once, and kept."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sys
from collections.abc import Iterator
from hashlib import blake2b, file_digest
from pathlib import Path

from bytelm.data.formats import read_documents, read_stream
from bytelm.data.prepared import write_prepared
from bytelm.data.records import Fields
from bytelm.data.sources import STANDARD_INPUT, unreadable
from bytelm.progress import ReadingBar

_VERSION = 1
"""Of what readers make of a file; a change leaves what older ones prepared unused."""

_SAMPLE = 1 << 16  # bytes from each end of a file by which it is known


def cache_folder(cache_dir: str) -> Path:
    """The folder of prepared copies, which is created; by default in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache_dir) if cache_dir else Path(base) / "bytelm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot be created ({error.strerror}); name another folder with --cache-dir"
        raise ValueError(f"cache_dir={folder}: {why}") from None
    return folder


def prepared_copy(path: str, name: str, fields: Fields, cache_dir: str) -> str:
    """A prepared file with the documents of a file, made now if it is not in the cache.

    Its key is the file's name without folders, size, time of change and both ends, and the field:
    not its place. Two processes that ask at once prepare it once.
    """
    folder = cache_folder(cache_dir)
    target = folder / f"{_key(path, fields)}.bytes"
    if not target.exists():
        with alone(target, name):
            if not target.exists():
                with ReadingBar(f"reading {name}", os.path.getsize(path)) as bar:
                    base = os.path.basename(path)
                    pieces = read_documents(path, base, fields, folder, bar.move)
                    write_prepared(target, pieces, str(target))
    return str(target)


@functools.cache
def prepared_input(fields: Fields, raw: bool, cache_dir: str) -> str:
    """A prepared file with the documents of standard input, which can be read but once.

    Its key is the digest of the file itself.
    """
    folder = cache_folder(cache_dir)
    new = folder / f"stdin-{os.getpid()}.bytes"
    write_prepared(new, input_pieces(fields, raw, folder), str(new))
    with open(new, "rb") as file:
        target = folder / f"{file_digest(file, 'blake2b').hexdigest()[:32]}.bytes"
    os.replace(new, target)
    return str(target)


def input_pieces(fields: Fields, raw: bool, scratch: Path) -> Iterator[bytes | None]:
    """The documents of standard input in pieces, as `read_documents` gives those of a file."""
    stream = sys.stdin.buffer
    with ReadingBar("reading standard input", None) as bar:
        if raw:
            yield from iter(lambda: stream.read(_SAMPLE) or None, None)
            yield None
        else:
            called = "standard input"
            yield from read_stream(stream, called, STANDARD_INPUT, fields, scratch, bar.move)


def _key(path: str, fields: Fields) -> str:
    try:
        status = os.stat(path)
        with open(path, "rb") as file:
            ends = file.read(_SAMPLE)
            file.seek(max(0, status.st_size - _SAMPLE))
            ends += file.read(_SAMPLE)
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None
    parts = (_VERSION, os.path.basename(path), status.st_size, status.st_mtime_ns)
    parts += (tuple(fields) if fields.masked else fields.text,)
    digest = blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=16)
    digest.update(ends)
    return digest.hexdigest()


@contextlib.contextmanager
def alone(target: Path, name: str) -> Iterator[None]:
    """Keeps other processes out meanwhile; where the file system cannot, both work and one wins."""
    lock = target.with_suffix(".lock")
    try:
        handle = _locked(lock, name)
    except OSError as error:
        why = f"cannot be written ({error.strerror}); name another folder with --cache-dir"
        raise ValueError(f"cache_dir={target.parent}: {why}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _locked(lock: Path, name: str) -> int:
    """A handle of the file `lock`, which this process alone has locked."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: another process is reading it; waiting", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a network file system that cannot
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                _remove_rest(lock)
                return handle
        os.close(handle)  # the process before us has removed it, and another may hold a new one


def _remove_rest(lock: Path) -> None:
    """Removes what a process that was killed while it wrote has left."""
    for rest in lock.parent.glob(f".{lock.stem}.*.partial"):
        rest.unlink(missing_ok=True)
