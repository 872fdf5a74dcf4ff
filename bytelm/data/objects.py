"""Objects on stores in the cache: downloaded once, linked into folders."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from bytelm.config import require
from bytelm.data.cache import alone, cache_folder
from bytelm.storage.fetch import StoredObject, download

Place = Callable[[StoredObject], Path]
"""Where the file of an object lies."""


def cached(objects: Sequence[StoredObject], called: str, cache_dir: str) -> Place:
    """Downloads those objects that are not in the cache; two processes that ask at once, once.

    `called` is what stands at the progress bar. Raises `ValueError` as `download` does.
    """
    folder = cache_folder(cache_dir) / "objects"

    def place(one: StoredObject) -> Path:
        return folder / one.key / one.name.rpartition("/")[2]

    def missing() -> list[StoredObject]:
        known = {one.key: one for one in objects}
        return [one for one in known.values() if not place(one).exists()]

    if missing():
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / _digest(called), called):
            for one in missing():
                _remove_rest(place(one).parent)
            download(missing(), place, f"downloading {called}")
    return place


def linked(objects: Sequence[StoredObject], place: Place, cache_dir: str) -> Path:
    """A folder of links to these objects' files, laid out as their names are."""
    digest = _digest([(one.name, one.key) for one in objects])
    tree = cache_folder(cache_dir) / "objects" / "trees" / digest
    if tree.is_dir():
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".", dir=tree.parent))
    try:
        for one in objects:
            link = beside / one.name
            plain = ".." not in Path(one.name).parts
            require(plain, f"{one.address}: no name for a file; leave it out")
            try:
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(place(one))
            except (FileExistsError, NotADirectoryError):
                why = "is the name of an object and of a folder of objects; rename one"
                raise ValueError(f"{one.address}: {why}") from None
        with suppress(OSError):  # another process was faster
            os.rename(beside, tree)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return tree


def _digest(of: object) -> str:
    text = repr(of).encode("utf-8", "surrogateescape")
    return blake2b(text, digest_size=16).hexdigest()


def _remove_rest(folder: Path) -> None:
    """Removes what a process that was killed an hour ago or more has left."""
    for rest in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):
            if rest.stat().st_mtime < time.time() - 3600:
                rest.unlink()
