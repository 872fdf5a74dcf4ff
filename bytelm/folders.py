"""Folders that are written whole: they appear in one step, which replaces what was there."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from bytelm.config import require
from bytelm.files import one_line, sync_folder, write_synced
from bytelm.storage.stores import require_local

Writer = Callable[[BinaryIO], Any]
"""Writes a file's content."""


def check_replaceable(out: Path, may_replace: Callable[[str], bool]) -> None:
    """Raises `ValueError` unless `out` is free, or a folder of files that may be replaced."""
    require_local(out, "out")
    try:
        require(not out.exists() or out.is_dir(), f"{out}: is a file; name a folder")
        require(not out.is_symlink(), f"{out}: is a link; name the folder itself")
        for above in out.absolute().parents:
            require(not above.exists() or above.is_dir(), f"{out}: {above.name} is no folder")
        present = sorted(os.scandir(out), key=lambda entry: entry.name) if out.exists() else []
    except OSError as error:
        raise ValueError(f"{out}: cannot be read ({error.strerror}); name another folder") from None
    foreign = [each.name for each in present if each.is_dir() or not may_replace(each.name)]
    if foreign:
        hint = "name a new folder, so that nothing of yours is lost"
        raise ValueError(f"{out}: holds {foreign[0]}, which an export does not write; {hint}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out`, which must be free or empty, that takes its place at the end.

    An error leaves neither, and what killed processes have left of the same kind is removed.
    """
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    new = out.with_name(f".{out.name}.{os.getpid()}.partial")
    new.mkdir()
    try:
        with _locked(new):
            yield new
            os.replace(new, out)
    except BaseException:
        # Threads that an exception in this one did not stop may write until the process ends.
        atexit.register(shutil.rmtree, new, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder meanwhile; gives whether there is one to hold."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:  # another process holds it, or a network file system cannot lock
        held = False
    try:
        yield held
    finally:
        os.close(handle)


def _remove_leftovers(out: Path) -> None:
    """Removes the folders that processes left that were killed while they wrote `out`.

    A process that still writes is known by its id, or on another machine by its lock. The id alone
    would not do: it may be that of another process by now, or of one in another container.
    """
    prefix, suffix = f".{out.name}.", ".partial"
    for entry in os.scandir(out.parent):
        owner = entry.name.removeprefix(prefix).removesuffix(suffix)
        if entry.name != f"{prefix}{owner}{suffix}" or not owner.isdecimal():
            continue
        if entry.is_dir(follow_symlinks=False) and not _runs_beside(int(owner)):
            with suppress(FileNotFoundError), _locked(Path(entry.path)) as held:
                if held:
                    shutil.rmtree(entry.path, ignore_errors=True)


def _runs_beside(number: int) -> bool:
    """Whether another process of this machine has that id."""
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return number != os.getpid()


def replace_folder(
    out: Path,
    files: Mapping[str, Writer],
    may_replace: Callable[[str], bool],
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes all files of `out` or none; what was there before goes as a whole.

    They are written into a folder beside it, which takes its place after `finish` has seen it.
    Raises `ValueError` as `check_replaceable` does, and if `out` cannot be written.
    """
    check_replaceable(out, may_replace)
    out = Path(os.path.abspath(out))
    new = out.with_name(f".{out.name}.{os.getpid()}.partial")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
        for name, write in files.items():
            write_synced(new / name, write)
        finish(new)
        sync_folder(new)
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(new, out)
        except BaseException:
            if old.exists():
                os.replace(old, out)
            raise
        sync_folder(out.parent)  # the renames themselves must survive a power cut
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        why = f"cannot be written ({error.strerror or one_line(error)})"
        raise ValueError(f"{out}: {why}; choose another place or free space") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
