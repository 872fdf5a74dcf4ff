"""A folder on a store, written to: objects by their names in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from bytelm.storage.stores import open_store, patiently

T = TypeVar("T")

_WRITERS = 16
"""Objects that are written at once."""


class RemoteFolder:
    """The objects under an address; every method raises `ValueError` if the store is away."""

    def __init__(self, address: str) -> None:
        self.address, self._store = address, open_store(address)

    def read(self, name: str) -> bytes | None:
        """The contents of an object; None if there is none."""
        address = f"{self.address}/{name}"
        try:
            return bytes(patiently(address, lambda: self._store.cat_file(address)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Writes an object, whole or not at all."""
        address = f"{self.address}/{name}"
        patiently(address, lambda: self._store.pipe_file(address, data))

    def remove(self, name: str) -> None:
        """Removes an object, if it exists."""
        address = f"{self.address}/{name}"
        try:
            patiently(address, lambda: self._store.rm_file(address))
        except FileNotFoundError:
            return

    def names(self, under: str) -> list[str]:
        """The names of all objects under the folder `under`."""
        address = f"{self.address}/{under}".rstrip("/")
        try:
            found = patiently(address, lambda: self._store.find(address))
        except FileNotFoundError:
            return []
        root = self._store._strip_protocol(self.address).rstrip("/") + "/"
        return [str(path).removeprefix(root) for path in found]

    def upload(self, folder: Path, under: str, last: str) -> None:
        """Writes the files of a local folder as objects, but `last`."""

        def put(path: Path) -> None:
            address = f"{self.address}/{under}/{path.relative_to(folder).as_posix()}"
            patiently(address, lambda: self._store.put_file(os.fspath(path), address))

        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        self._each(put, [path for path in files if path != folder / last])

    def remove_all(self, names: Iterable[str]) -> None:
        """Removes objects."""
        self._each(self.remove, list(names))

    def move(self, source: str, target: str, last: str) -> None:
        """Moves all objects under a folder; `last` goes first, and comes last."""
        names = self.names(source)
        marks = [name for name in names if name == f"{source}/{last}"]

        def copy(name: str) -> None:
            there = f"{self.address}/{target}/{name.removeprefix(source + '/')}"
            here = f"{self.address}/{name}"
            patiently(there, lambda: self._store.cp_file(here, there))

        self._each(copy, [name for name in names if name not in marks])
        self._each(copy, marks)
        self.remove_all(marks)
        self.remove_all(name for name in names if name not in marks)

    def _each(self, work: Callable[[T], None], items: Iterable[T]) -> None:
        with ThreadPoolExecutor(_WRITERS) as writers:
            for done in [writers.submit(work, item) for item in items]:
                done.result()
