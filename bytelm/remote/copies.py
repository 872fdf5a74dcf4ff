"""Copies of run folders and exports that lie on object stores, for everything that only reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bytelm.config import require
from bytelm.data.objects import Place, cached, linked
from bytelm.files import replace_file
from bytelm.generation.draft_table import TABLE_FILE
from bytelm.metrics import score
from bytelm.storage.fetch import StoredObject, list_objects
from bytelm.storage.stores import is_remote, protocol_of, tidy

COMMITTED = "commit_success.txt"
"""The object that is written last, once a checkpoint is whole."""

NO_ARRAYS = "none"
"""What `local_copy` takes as a checkpoint where nothing but small files is wanted."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
ARRAYS = ("params", "optimizer", "average")
_SMALL = "_METADATA"


@contextmanager
def local_copy(
    folder: str | os.PathLike[str], checkpoint: str | int = "latest", everything: bool = False
) -> Iterator[Path]:
    """A folder of this machine with what `folder` holds: that itself, or a copy of an address.

    The copy of a run has the arrays of the checkpoint that `checkpoint` names alone, and without
    `everything` only its parameters. Errors inside name the address. Raises `ValueError` if there
    is nothing.
    """
    if not is_remote(folder):
        yield Path(folder)
        return
    address = tidy(folder)
    known = protocol_of(address) in ("gs", "s3", "hf")
    require(known, f"{address}: run folders and exports are read from gs://, s3:// and hf://")
    copy = _copy(address, checkpoint, everything)
    with naming(address, copy):
        yield copy


@contextmanager
def naming(address: str, copy: Path) -> Iterator[None]:
    """Errors of the block name `address` where they would name its copy."""
    try:
        yield
    except ValueError as error:
        if str(copy) not in str(error):
            raise
        text = str(error).replace(str(copy), address)
        raise type(error)(text).with_traceback(error.__traceback__) from error.__cause__


def _copy(address: str, checkpoint: str | int, everything: bool) -> Path:
    for attempt in range(3):
        objects, is_folder = list_objects(address)
        require(is_folder, f"{address}: is an object; give a run folder or an export")
        try:
            return _copy_of(address, objects, str(checkpoint), everything)
        except ValueError:  # a trainer may have removed a checkpoint meanwhile
            now, _ = list_objects(address)
            if attempt == 2 or saved_steps(now) == saved_steps(objects):
                raise
    raise AssertionError


def _copy_of(
    address: str, objects: Sequence[StoredObject], checkpoint: str, everything: bool
) -> Path:
    steps = saved_steps(objects)
    if not any(one.name.startswith("checkpoints/") for one in objects):  # an export
        wanted = [one for one in objects if "/" not in one.name]
    else:
        wanted = [one for one in objects if _is_small(one, steps)]
        place = cached(wanted, address, "")
        chosen = _choose(wanted, place, steps, checkpoint)
        unneeded = () if everything else ("optimizer",)
        prefix, small = f"checkpoints/{chosen}/", set(wanted)
        of_step = (one for one in objects if one.name.startswith(prefix) and one not in small)
        wanted += [one for one in of_step if one.name.split("/")[2] not in unneeded]
    place = cached(wanted, address, "")
    copy = linked([one for one in wanted if not one.name.startswith("metrics/")], place, "")
    metrics = (one for one in wanted if one.name.startswith("metrics/"))
    pieces = sorted(metrics, key=lambda one: one.name)
    if pieces:
        joined = b"".join(place(one).read_bytes() for one in pieces)
        replace_file(copy / "metrics.jsonl", joined)
    return copy


def saved_steps(objects: Sequence[StoredObject]) -> list[int]:
    """The steps of which a run's objects hold a whole checkpoint, in increasing order."""
    steps = set()
    for one in objects:
        parts = one.name.split("/")
        if len(parts) == 3 and parts[0] == "checkpoints" and parts[1].isdecimal():
            steps |= {int(parts[1])} if parts[2] in (COMMITTED, *_WEIGHTS) else set()
    return sorted(steps)


def _is_small(one: StoredObject, steps: Sequence[int]) -> bool:
    """Whether an object belongs to every copy: all but arrays and what is not whole."""
    parts = one.name.split("/")
    if parts[0] != "checkpoints":
        return (
            one.name in ("config.json", TABLE_FILE)
            or (parts[0] == "metrics" and len(parts) == 2)
            or (one.name == "metrics.jsonl")
        )
    if len(parts) < 3 or not parts[1].isdecimal() or int(parts[1]) not in steps:
        return False
    if parts[2] in ARRAYS:
        return parts[3:] == [_SMALL]
    return parts[2] not in _WEIGHTS and not parts[2].endswith((".safetensors", ".pt"))


def _choose(
    small: Sequence[StoredObject], place: Place, steps: Sequence[int], checkpoint: str
) -> int | None:
    """The step whose arrays are needed; None if there is none, and whoever reads it says so."""
    if checkpoint == NO_ARRAYS:
        return None
    if checkpoint.isdecimal():
        return int(checkpoint)
    if checkpoint != "best":
        return steps[-1] if steps else None
    scores: dict[int, float] = {}
    for one in small:
        parts = one.name.split("/")
        if parts[2:] == ["metadata", "metadata"]:
            with suppress(ValueError, AttributeError, TypeError):
                value = score(json.loads(place(one).read_bytes()).get("metrics"))
                scores |= {} if value is None else {int(parts[1]): value}
        elif parts[0] in ("metrics", "metrics.jsonl"):
            for line in place(one).read_bytes().splitlines():
                with suppress(ValueError, AttributeError, TypeError):
                    record = json.loads(line)
                    value = score(record)
                    if value is not None and record["step"] in steps:
                        scores.setdefault(record["step"], value)
    return min(scores, key=lambda step: (scores[step], step)) if scores else None
