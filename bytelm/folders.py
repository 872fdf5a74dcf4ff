"""Folders that are written whole: one that is there already is replaced in one step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
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
