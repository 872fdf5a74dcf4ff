"""How a run continues when some of its processes are gone: the launch scripts ask here.

    python -m bytelm.elastic layout RUN --before 32 --left 24     # prints "24 2"
    python -m bytelm.elastic meet FOLDER --index 2 --total 4 --host NAME    # "NAME-0 2 4"

The batch of a step stays what it is, and so does the order of data. A device takes no more rows at
once than before: gradients are accumulated over more micro-batches.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from bytelm.config import TrainConfig, from_dict, require
from bytelm.export import CONFIG_FILE
from bytelm.files import errors_about, read_json, replace_file
from bytelm.storage.stores import called, is_remote

RECORD = "elastic.json"
"""The file of a run folder that says what a device took at once before processes were lost."""


def layout_on(
    left: int, devices: int, train: TrainConfig, rows: float, fewest: int
) -> tuple[int, int] | None:
    """(processes, micro-batches of a step) for at most `left` processes of `devices` each.

    The most processes among which the batch divides, and the fewest micro-batches, at least
    `fewest`, with at most `rows` rows on a device; None if there are none.
    """
    batch = train.batch_size
    for count in range(left, 0, -1):
        places, uneven = divmod(count * devices, train.tensor)
        if uneven or places % train.fsdp or batch % places:
            continue
        for parts in range(fewest, batch // places + 1):
            if batch % (places * parts) == 0 and batch // (places * parts) <= rows:
                return count, parts
    return None


def require_disk(run: Path) -> None:
    """Raises `ValueError` for a run on an object store: only one on a disk keeps the record."""
    require(
        not is_remote(run),
        f"run_dir={called(run)}: fewer processes cannot continue it; give a run folder on a disk "
        "that all of them share",
    )


def next_layout(run: Path, before: int, left: int, devices: int = 1) -> tuple[int, int] | None:
    """`layout_on` for a run folder whose last attempt had `before` processes.

    The first time, what a device took at once is noted in the folder, so that a run that found its
    processes again is what it was. Raises `ValueError` if the folder has no run yet.
    """
    require(before >= 1, f"before={before}: must be at least 1")
    require(left >= 0, f"left={left}: must be at least 0")
    require(devices >= 1, f"devices={devices}: must be at least 1")
    require_disk(run)
    config, record = run / CONFIG_FILE, run / RECORD
    require(config.is_file(), f"{config}: is not there; the run has not begun")
    with errors_about(config, "restore it from a backup"):
        stored = read_json(config)
        require(isinstance(stored, dict) and isinstance(stored.get("train"), dict), "is no recipe")
        train = from_dict(TrainConfig, stored["train"])  # fields that an older run lacks: defaults
    batch, parts = train.batch_size, train.accumulation_steps
    known: dict[str, Any] = {}
    if record.is_file():
        with errors_about(record, "remove it, and start the run on all processes first"):
            known = read_json(record)
            whole = isinstance(known, dict) and {"rows", "accumulation_steps"} <= known.keys()
            require(whole, "is no record of a layout; remove it")
    if known.get("batch_size") != batch:
        rows = batch * train.tensor / (parts * devices * before)
        known = {"batch_size": batch, "rows": rows, "accumulation_steps": parts}
        replace_file(record, (json.dumps(known) + "\n").encode())
    return layout_on(left, devices, train, known["rows"], known["accumulation_steps"])


def meet(
    folder: Path, index: int, total: int, host: str, seconds: float
) -> tuple[str, int, int] | None:
    """(host of the first process, place of this one, their number) once all `total` are here.

    Those that are here after `seconds` go without the others. Each process calls this once for a
    `folder` that all of them see, new for each start of the run; None for one that came too late.
    Raises `ValueError` for numbers that do not fit together.
    """
    require(0 <= index < total, f"index={index}: must be from 0 to one less than total={total}")
    require(0 <= seconds < math.inf, f"seconds={seconds}: must be a number from 0 on")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / f"{index}.here", host.encode())
    decided, deadline = folder / "members.json", time.monotonic() + seconds
    while not decided.exists():
        here = {int(path.stem): path.read_text("utf-8") for path in folder.glob("*.here")}
        if len(here) == total or time.monotonic() > deadline:
            own = folder / f"{index}.proposed"
            replace_file(own, json.dumps(here).encode())
            with contextlib.suppress(FileExistsError):
                os.link(own, decided)  # whole, and only the first one's
            break
        time.sleep(0.1)
    members = {int(k): v for k, v in json.loads(decided.read_text("utf-8")).items()}
    order = sorted(members)
    return (members[order[0]], order.index(index), len(order)) if index in members else None


def main(argv: list[str] | None = None) -> int:
    """See the top of the file. Status 2 for bad input, 75 if there is nothing to start."""
    parser = argparse.ArgumentParser(prog="python -m bytelm.elastic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    layout = commands.add_parser("layout")
    layout.add_argument("run", type=Path)
    layout.add_argument("--before", type=int, required=True, help="processes of the last attempt")
    layout.add_argument("--left", type=int, required=True, help="processes that are left")
    layout.add_argument("--devices", type=int, default=1, help="devices of each process")
    meeting = commands.add_parser("meet")
    meeting.add_argument("folder", type=Path)
    meeting.add_argument("--index", type=int, required=True, help="number of this process")
    meeting.add_argument("--total", type=int, required=True, help="processes that are expected")
    meeting.add_argument("--host", required=True, help="where others reach this process")
    meeting.add_argument("--seconds", type=float, default=600.0, help="how long to wait for all")
    asked = parser.parse_args(argv)
    try:
        if asked.command == "layout":
            found = next_layout(asked.run, asked.before, asked.left, asked.devices)
        else:
            given = (asked.index, asked.total, asked.host, asked.seconds)
            found = meet(asked.folder, *given)
    except (ValueError, OSError) as error:
        print(f"elastic: {error}", file=sys.stderr)
        return 2
    if found is None:
        late = "the batch divides among none of those that are left"
        late = late if asked.command == "layout" else "the others went on without this process"
        print(f"elastic: {late}", file=sys.stderr)
        return 75
    print(*found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
