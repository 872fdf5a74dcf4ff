"""Data on stores: objects become files in the cache, and are read from there as any others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bytelm.data.objects import cached, linked
from bytelm.data.sources import Listed, list_files
from bytelm.storage.fetch import StoredObject, list_objects
from bytelm.storage.stores import is_address, protocol_of


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
    listed = {path: _without_card(path, *list_objects(path)) for path in paths}
    objects = [one for found, _ in listed.values() for one in found]
    called = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    place = cached(objects, called, cache_dir)
    local = {}
    for path, (found, is_folder) in listed.items():
        addresses |= {str(place(one)): one.address for one in found}
        local[path] = str(linked(found, place, cache_dir) if is_folder else place(found[0]))
        addresses[local[path]] = path
    return local


def _without_card(
    path: str, found: list[StoredObject], is_folder: bool
) -> tuple[list[StoredObject], bool]:
    """The objects without the README.md that tells about a data set of Hugging Face."""
    about = protocol_of(path) == "hf" and is_folder
    return [one for one in found if not (about and one.name == "README.md")], is_folder
