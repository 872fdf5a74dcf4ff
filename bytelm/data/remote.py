"""Data on stores: objects become files in the cache, and are read from there as any others."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path

from bytelm.config import require
from bytelm.data.cache import alone, cache_folder
from bytelm.data.sources import Listed, list_files
from bytelm.storage.fetch import StoredObject, download, list_objects
from bytelm.storage.stores import is_address


class Listings:
    """The files that paths mean, those of addresses downloaded into the cache.

    `pairs` are each path given and its files.
    """

    def __init__(self, paths: Sequence[str], cache_dir: str) -> None:
        self.pairs: list[tuple[str, Sequence[Listed]]] = []
        self._addresses: dict[str, str] = {}  # of local files
        wanted = [path for path in paths if not os.path.lexists(path) and is_address(path)]
        local = _download(list(dict.fromkeys(wanted)), cache_dir, self._addresses)
        for path in paths:
            self.pairs.append((path, list_files(local.get(path, path))))

    @contextmanager
    def naming_addresses(self) -> Iterator[None]:
        """Errors of the block name addresses where they would name files in the cache."""
        try:
            yield
        except ValueError as error:
            text = self.named(str(error))
            if text == str(error):
                raise
            raise ValueError(text) from None

    def named(self, text: str) -> str:
        """The text with addresses in place of the names of files in the cache."""
        for file in sorted(self._addresses, key=len, reverse=True):
            text = text.replace(file, self._addresses[file]) if file in text else text
        return text


def _download(paths: list[str], cache_dir: str, addresses: dict[str, str]) -> dict[str, str]:
    """For each path the file or folder here that is its copy; `addresses` gets those of all files.

    The objects of all paths are downloaded together.
    """
    if not paths:
        return {}
    folder = cache_folder(cache_dir) / "objects"
    listed = {path: list_objects(path) for path in paths}
    objects = {one.key: one for found, _ in listed.values() for one in found}

    def place(one: StoredObject) -> Path:
        return folder / one.key / one.name.rpartition("/")[2]

    def missing() -> list[StoredObject]:
        return [one for one in objects.values() if not place(one).exists()]

    if missing():
        folder.mkdir(parents=True, exist_ok=True)
        called = paths[0] if len(paths) == 1 else f"{len(paths)} addresses"
        with alone(folder / _digest(sorted(paths)), called):
            for one in missing():
                _remove_rest(place(one).parent)
            download(missing(), place, f"downloading {called}")
    local = {}
    for path, (found, is_folder) in listed.items():
        addresses |= {str(place(one)): one.address for one in found}
        local[path] = str(_tree(folder, found, place)) if is_folder else str(place(found[0]))
        addresses[local[path]] = path
    return local


def _tree(
    folder: Path, found: Sequence[StoredObject], place: Callable[[StoredObject], Path]
) -> Path:
    """A folder of links to these objects' files, laid out as their names are."""
    tree = folder / "trees" / _digest([(one.name, one.key) for one in found])
    if tree.is_dir():
        return tree
    tree.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".", dir=tree.parent))
    try:
        for one in found:
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
