"""Which files the given paths mean: files, folders, globs, lists, data sets of `datasets`."""

from __future__ import annotations

import glob
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bytelm.config import require
from bytelm.storage.fetch import find_addresses, has_magic, read_bytes
from bytelm.storage.stores import is_address, tidy

STANDARD_INPUT = "-"
_NOT_LIBRARY = ["__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"]
_STATE, _SPLITS = "state.json", "dataset_dict.json"
"""What `datasets` writes beside the shards of a data set, and above those of several splits."""


_NAMED = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)=(.*)", re.DOTALL)


def named_paths(paths: Sequence[str], field: str) -> dict[str, list[str]]:
    """The paths of each source, from entries NAME=PATH of the configuration's `field`.

    Entries of one name add up. Without names, all paths are those of the source "". A path or glob
    that exists as it stands is a path, whatever characters are in it. Raises `ValueError` if some
    entries have a name and others do not.
    """
    sources: dict[str, list[str]] = {}
    for entry in paths:
        matched = None if _exists(entry) else _NAMED.fullmatch(entry)
        name, path = matched.groups() if matched else ("", entry)
        require(path != "", f"{field}={entry}: names no path; write NAME=PATH")
        sources.setdefault(name, []).append(path)
    named = [name for name in sources if name]
    if named and "" in sources:
        hint = f"but {named[0]} has; write NAME=PATH for all of them or for none"
        require(False, f"{field}={sources[''][0]}: has no name, {hint}")
    return sources


def _exists(entry: str) -> bool:
    if os.path.lexists(entry):
        return True
    return glob.has_magic(entry) and next(glob.iglob(entry, recursive=True), None) is not None


_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""What Hugging Face calls a data set: OWNER/NAME."""


class Listed(NamedTuple):
    """A file: its name relative to the given path, and its location."""

    name: str
    path: str


def expand_paths(paths: Sequence[str | Path]) -> list[str]:
    """`paths` with globs and `@LIST` files replaced by the paths that they stand for.

    A path that exists is taken literally. A list has one path a line, relative to the working
    directory. Addresses on stores are looked up only where they are globs. Raises `ValueError` for
    a glob without matches and for a list that cannot be read.
    """
    single = isinstance(paths, (str, os.PathLike))  # a string is a sequence of strings
    require(not single, f"paths={str(paths)!r}: give a list of paths")
    expanded: list[str] = []
    for path in map(str, paths):
        if os.path.lexists(path) or path == STANDARD_INPUT:
            expanded.append(path)
        elif is_address(path):
            expanded += find_addresses(path) if has_magic(tidy(path)) else [tidy(path)]
        elif path.startswith("@"):
            expanded += expand_paths(_listed_paths(path[1:]))
        elif glob.has_magic(path):
            matches = sorted(glob.glob(path, recursive=True))
            require(bool(matches), f"{path}: matches no file; check the spelling")
            expanded += matches
        else:
            owner = path.partition("/")[0]
            hub = bool(_HUB_NAME.fullmatch(path)) and not os.path.isdir(owner)
            hint = f", or write hf://datasets/{path} for the data set on Hugging Face"
            require(False, f"{path}: does not exist; check the spelling{hint * hub}")
    return expanded


def _listed_paths(path: str) -> list[str]:
    try:
        text = read_bytes(path) if is_address(path) else Path(path).read_bytes()
        lines = text.decode("utf-8").splitlines()
    except OSError as error:
        raise ValueError(unreadable(f"@{path}", error)) from None
    except UnicodeDecodeError:
        raise ValueError(f"@{path}: is not UTF-8; give a text file with one path a line") from None
    stripped = [line.strip() for line in lines]
    listed = [line for line in stripped if line]
    require(bool(listed), f"@{path}: names no path; write one a line")
    nested = next((line for line in listed if line.startswith("@")), None)
    require(nested is None, f"@{path}: names another list, {nested}; write its paths instead")
    return listed


def list_files(path: str) -> list[Listed]:
    """The file at `path`, or every visible file in that folder in the order of relative names."""
    if os.path.isdir(path):
        return _walk(path, ())
    return [Listed(os.path.basename(path), path)]


def library_files() -> tuple[str, list[Listed]]:
    """The running interpreter's library folder, and the `.py` files in it without its tests."""
    library = sysconfig.get_paths()["stdlib"]
    installed = ("_sysconfigdata", "config-")  # differs from machine to machine
    files = [each for each in _walk(library, _NOT_LIBRARY) if each.name.endswith(".py")]
    return library, [each for each in files if not each.name.startswith(installed)]


def _walk(root: str, left_out: Sequence[str]) -> list[Listed]:
    seen = {os.path.realpath(root)}

    def enters(folder: str, name: str) -> bool:
        if name.startswith(".") or name in left_out:
            return False
        parent, target = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
        if (
            target in seen or os.path.commonpath((parent, target)) == target
        ):  # already visited, or a loop
            return False
        seen.add(target)
        return True

    def fail(error: OSError) -> None:
        raise ValueError(unreadable(str(error.filename), error))

    found: list[tuple[str, Listed]] = []  # with the name to sort by

    def add(folder: str, names: Iterable[str], order: str = "{name}") -> None:
        for index, name in enumerate(names):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            place = os.path.relpath(os.path.join(folder, order), root).replace(os.sep, "/")
            found.append((place.format(name=name, index=index), Listed(relative, path)))

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        shards = _dataset_shards(folder, files)
        if shards:
            folders.clear()
            add(folder, shards, "{index:09}")
            continue
        folders[:] = [name for name in sorted(folders) if enters(folder, name)]
        add(folder, (name for name in files if not name.startswith(".")))
    return [listed for _, listed in sorted(found)]


def _dataset_shards(folder: str, files: Sequence[str]) -> list[str]:
    """The Arrow files of a data set that `datasets.save_to_disk` wrote, in its order."""
    if _SPLITS in files:
        splits = _read_json(os.path.join(folder, _SPLITS)).get("splits")
        if isinstance(splits, list):
            named = ", ".join(f"{folder}/{name}" for name in splits)
            raise ValueError(f"{folder}: holds several splits of a data set; name one: {named}")
    if _STATE not in files:
        return []
    state = os.path.join(folder, _STATE)
    entries = _read_json(state).get("_data_files")
    if entries is None:  # another program's state.json
        return []
    entries = entries if isinstance(entries, list) else [None]
    shards = [each.get("filename") if isinstance(each, dict) else None for each in entries]
    known = bool(shards) and all(isinstance(name, str) for name in shards)
    require(known, f"{state}: names no Arrow files; write the data set again")
    missing = [name for name in shards if name not in files]
    require(not missing, f"{state}: {missing[:1]} is missing beside it; copy the whole data set")
    return [str(name) for name in shards]


def _read_json(path: str) -> dict:
    try:
        value = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class SeenFiles:
    """The files that were met so far, known by what they are on disk and not by their names."""

    def __init__(self) -> None:
        self.identities: dict[tuple[int, int], str] = {}
        """Device and inode of each file, and the path by which it was met first."""
        self._again: list[str] = []

    def repeats(self, path: str) -> bool:
        """Whether the file at `path` was met before, as a hard link or by the same path."""
        if path == STANDARD_INPUT:
            identity = (-1, -1)
        else:
            try:
                status = os.stat(path)
            except OSError:  # whoever reads it says why it cannot be read
                return False
            identity = status.st_dev, status.st_ino
        first = self.identities.get(identity)
        if first is None:
            self.identities[identity] = path
            return False
        self._again.append(f"{path}: is the same file as {first}")
        return True

    def notes(self) -> tuple[str, ...]:
        """A line about the files that were met again."""
        if not self._again:
            return ()
        more = f", and {len(self._again) - 1} more are like it" if len(self._again) > 1 else ""
        return (f"{self._again[0]}{more}; each is read once",)


def unreadable(path: str, error: OSError) -> str:
    """What to say of a file or folder that the operating system does not let us read."""
    return f"{path}: cannot be read ({error.strerror or error}); fix it or leave it out"


def without_bytes(path: str) -> str:
    """What to say of a given path that holds nothing to read."""
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        return f"{path}: is a pipe or a device; send its bytes to standard input, and give -"
    return f"{path}: holds no bytes; give a file or folder with visible content"
