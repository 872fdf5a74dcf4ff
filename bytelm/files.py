"""Files that are read with one-line errors and replaced whole."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bytelm.config import require

JSON_LIMIT = 2**24
"""Bytes of the largest JSON file that is read: an index of 100,000 tensors is smaller."""


def read_text(file: Path) -> str:
    """The text of a file in UTF-8; opens nothing but a plain file of limited size."""
    require_plain_file(file)
    size, kind = file.stat().st_size, file.suffix[1:].upper() or "JSON"
    require(size <= JSON_LIMIT, f"{size} bytes; a {kind} file of at most {JSON_LIMIT} was expected")
    return file.read_text("utf-8")


def read_json(file: Path) -> Any:
    """The contents of a JSON file, read as `read_text` does."""
    text = read_text(file)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None
    except ValueError as error:
        long = "digits" in str(error) and not isinstance(error, json.JSONDecodeError)
        raise ValueError("holds a number of thousands of digits") if long else error from None


def read_json_lines(file: Path) -> list[Any]:
    """The JSON documents of a file, one a line; lines that a kill cut short are left out."""
    documents = []
    for line in file.read_text("utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            documents.append(json.loads(line))
    return documents


def require_plain_file(file: Path) -> None:
    """Raises `OSError` for a pipe, a device or a folder: reading a pipe would wait forever."""
    mode = file.stat().st_mode
    if stat.S_ISDIR(mode):
        raise OSError(0, "is a folder, not a file", str(file))
    if not stat.S_ISREG(mode):
        raise OSError(0, "not a plain file", str(file))


def require_replaceable(path: Path, named: str) -> None:
    """Raises `ValueError`, which calls it `named`, for what no file may take the place of.

    That is a folder, a pipe or a device. A file in the place of a device ends it, /dev/null for
    everybody if root writes there.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    require(not stat.S_ISDIR(mode), f"{named}: is a folder; name a file")
    require(stat.S_ISREG(mode), f"{named}: is a pipe or a device; name a plain file")


def require_file_to_write(path: Path, named: str) -> None:
    """Raises `ValueError`, which calls it `named`, where no plain file can be made or replaced."""
    usable = path.absolute().parent.is_dir() and not path.is_dir()
    require(usable, f"{named}: name a file in a folder that exists")
    require_replaceable(path, named)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the place of `path` at the end.

    At any moment `path` has either the old or the new content; an error leaves the old. A link
    stays one, and the file at its end is replaced: /dev/stdout is a link to what may be a file.
    """
    require_replaceable(path, str(path))
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with _open_new(beside, path) as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _open_new(beside: Path, path: Path) -> BinaryIO:
    """Opens `beside`; an error names `path`, which is the one that the user knows."""
    try:
        return open(beside, "w+b")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file so that at any moment it has either the old or the new content."""
    with replacing(path) as sink:
        sink.write(data)


def write_synced(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file and waits until it is on the disk."""
    with open(path, "wb") as sink:
        write(sink)
        sink.flush()
        os.fsync(sink.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the entries of `folder` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FileError(ValueError):
    """An error of reading a file, whose text names that file."""


@contextmanager
def errors_about(path: Path, hint: str) -> Iterator[None]:
    """Turns any error of reading `path` into a one-line `ValueError` that names it.

    Of several such contexts the innermost names its file, and no other does.
    """
    from safetensors import SafetensorError

    try:
        yield
    except FileError:
        raise
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise FileError(f"{path}: cannot be read ({why}); {hint}") from None
    except json.JSONDecodeError as error:
        raise FileError(f"{path}: not JSON ({one_line(error)}); {hint}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise FileError(f"{path}: {one_line(error)}") from None


def error_line(error: BaseException) -> str:
    """An error of a command as one line: of one of the system, the file and the reason."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return one_line(f"{where}{error.strerror}", limit=10_000)
    return one_line(error, limit=10_000)


def one_line(error: object, limit: int = 300) -> str:
    """The text of an error as one line of at most `limit` characters.

    Characters that a terminal would obey are escaped: names in a file may hold any.
    """
    text = " ".join(str(error).split())
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
    return text if len(text) <= limit else text[: limit - 1] + "…"
