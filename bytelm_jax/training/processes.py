"""Processes: joining those of a run, agreeing on when to stop, and leaving when one hangs.

A run of several processes has one coordinator, process 0, which also writes everything that is not
a checkpoint; checkpoints are written by all processes, so the run folder has to be on a shared file
system. A run of one process needs none of this, and every function here works without it.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

import bytelm
from bytelm import progress
from bytelm.config.base import LARGEST_INTEGER
from bytelm.files import one_line, read_json
from bytelm.runs import require_same, short_json

T = TypeVar("T")

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)

HUNG = 75
"""Exit status of a process that gave up waiting: EX_TEMPFAIL, start again."""

_EXCHANGED = 2**16
"""Bytes that each process tells the others when they compare what they have."""

_ERROR = "error"
"""The entry that stands for all others where a process has failed."""

_COMPUTING = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
"""Packages of which all processes of a run must have the same version."""

_COMPILING = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
"""The same, where one is installed: two compilers would make two programs."""

_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
"""Variables in which launchers that JAX knows give the number of processes they started."""


def join(coordinator: str = "", processes: int = 0, index: int | None = None) -> None:
    """Joins the processes of one run; must precede any other use of JAX.

    `coordinator` is HOST:PORT of process 0; without it JAX asks SLURM, Open MPI or the TPU pod, and
    if there is none of them this process stays alone. Raises `ValueError` for an invalid address
    and if the other processes do not come.
    """
    if coordinator:
        if address(coordinator) is None:
            raise ValueError(f"coordinator={coordinator}: must be HOST:PORT, such as 10.0.0.1:1234")
        if not 1 <= processes <= LARGEST_INTEGER or index is None or not 0 <= index < processes:
            raise ValueError(
                f"num_processes={processes}, process_id={index}: a coordinator needs both, the "
                f"first at most {LARGEST_INTEGER}, the second from 0 to one less than the first"
            )
    listens = _listening_address(coordinator) if coordinator and index == 0 else None
    if coordinator:
        _on_abort(2, f"process_id={index}: could not join; give each process another process_id")
    try:
        jax.distributed.initialize(
            coordinator or None, processes or None, index, coordinator_bind_address=listens
        )
    except ValueError:  # no coordinator given, and no cluster that JAX knows
        if coordinator:
            raise
    except RuntimeError as error:
        where = coordinator or "the coordinator that the cluster named"
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"{where}: the processes did not come together ({line})") from error
    if jax.process_count() > 1:
        _on_abort(
            HUNG,
            f"process {jax.process_index()} lost contact with another one; run the same command to "
            "continue from the last checkpoint",
        )


def _on_abort(status: int, line: str) -> None:
    """Ends this process with `status` and a line where JAX would end it by SIGABRT.

    JAX's own thread aborts when a process cannot join or another one has died. Python's handlers
    run in the main thread, which waits for the others and returns no more; so this one is C's.
    """

    def end(_: int) -> None:
        os.write(2, f"bytelm train: {line}\n".encode())
        os._exit(status)

    _on_abort.handler = _Handler(end)  # pyright: ignore[reportFunctionMemberAccess]  # kept alive
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, _Handler), ctypes.c_void_p
    libc.signal(signal.SIGABRT, _on_abort.handler)  # pyright: ignore[reportFunctionMemberAccess]


def _listening_address(coordinator: str) -> str | None:
    """Where process 0 listens: on the coordinator's own address if this machine has it.

    JAX would listen on all interfaces, and a port in use would end the process with a signal.
    Raises `ValueError` for such a port. None, all interfaces, stands for an address that others
    know this machine by, such as that of a container's host.
    """
    host, port = address(coordinator) or ("", 0)
    try:
        with socket.create_server((host.strip("[]"), port), family=_family(host)):
            return coordinator
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "the port is in use; choose another one for all processes"
            raise ValueError(f"coordinator={coordinator}: {why}") from None
        return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def address(coordinator: str) -> tuple[str, int] | None:
    """Host and port of "HOST:PORT", None for anything else."""
    host, _, port = coordinator.rpartition(":")
    number = int(port) if len(port) <= 5 and port.isdecimal() else 0
    return (host, number) if host and 0 < number < 2**16 else None


def check_alone() -> None:
    """Raises `ValueError` if a launcher started several processes but none was to be joined."""
    for name in _TASKS:
        if int(os.environ.get(name) or 1) > 1:
            raise ValueError(
                f"{name}={os.environ[name]}: that many processes would write to one run folder; "
                "add --distributed to make them one run, or start one process"
            )


def is_first() -> bool:
    """Whether this process writes what is to be written only once."""
    return jax.process_index() == 0


@contextlib.contextmanager
def agreement() -> Iterator[dict[str, Any]]:
    """A block after which the processes go on only if all of them found the same.

    What is compared are the entries of the dictionary that the block fills, of JSON values. Raises
    `ValueError` in all processes where an entry differs, and where one of them left the block with
    an error, which that process raises itself. With one process nothing is done.
    """
    found: dict[str, Any] = {}
    try:
        yield found
    except (ValueError, OSError) as error:
        if jax.process_count() > 1:
            _exchange({_ERROR: one_line(error)})
        raise
    if jax.process_count() == 1:
        return
    everyone = _exchange({name: short_json(value) for name, value in found.items()})
    for index, theirs in enumerate(everyone):
        if _ERROR in theirs:
            raise ValueError(f"process {index}: {theirs[_ERROR]}")
    require_same(everyone)


def installation() -> dict[str, str]:
    """What computes: versions, and a digest of this library's own source files."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for path in sorted(p for name in ("bytelm", "bytelm_jax") for p in (root / name).rglob("*.py")):
        digest.update(path.read_bytes())
    versions = {"python": platform.python_version(), "bytelm": bytelm.__version__}
    versions |= {name: version(name) for name in _COMPUTING}
    for name in _COMPILING:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {**versions, "code": digest.hexdigest()[:12]}


def _exchange(found: dict[str, str]) -> list[dict[str, str]]:
    """The dictionaries of all processes, in their order."""
    text = json.dumps(found).encode()
    assert len(text) <= _EXCHANGED, f"{len(text)} bytes"
    padded = np.frombuffer(text.ljust(_EXCHANGED), np.uint8)
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def all_agree(yes: bool) -> bool:
    """Whether every process says yes; all processes must call it."""
    if jax.process_count() == 1:
        return yes
    return bool(multihost_utils.process_allgather(np.asarray(yes)).all())


def from_first(numbers: list[int], capacity: int) -> list[int]:
    """The first `capacity` of the first process's `numbers` (0 and above), in every process."""
    padded = np.full(capacity, -1, np.int32)
    padded[: len(numbers)] = numbers[:capacity]
    if jax.process_count() > 1:
        padded = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return [int(number) for number in padded if number >= 0]


def as_first_says(value: bool) -> bool:
    """The first process's `value`, in every process."""
    return bool(from_first([int(value)], 1)[0])


def wait_for_all(where: str) -> None:
    """Returns when every process has arrived here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


class StopSignal(progress.StopSignal):
    """Whether SIGINT or SIGTERM asked this run to end; a second signal ends the process at once.

    With several processes a signal to one of them stops all at the same call of `agreed`: the
    coordinator collects how often each has called and names a count that none has passed yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stopped, self._sync_point = False, 0
        if jax.process_count() > 1:  # SIGTERM belongs to JAX, which tells the coordinator of it
            self.signals = (signal.SIGINT,)

    def agreed(self) -> bool:
        """Whether to stop now; all processes must call it equally often and get the same answer."""
        if jax.process_count() == 1:
            self._stopped = self.seen
        elif not self._stopped:
            self._sync_point += 1
            self._stopped = multihost_utils.reached_preemption_sync_point(self._sync_point)
        return self._stopped

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """`items`, cut short if the run is to stop."""
        for item in items:
            if self.agreed():
                return
            yield item

    def __bool__(self) -> bool:
        """The last result of `agreed`."""
        return self._stopped

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Passes the first signal on to the coordinator; ends the process at the second."""
        super().handle(number, frame)
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


class Watchdog:
    """Ends this process, with status `HUNG`, if it makes no progress for `seconds` (0: never).

    Every process writes its progress to a small file in `folder`; a process that gives up reads all
    of them and names the one that the others wait for. A thread does both, because the main thread
    of a process that waits for a collective does not return.
    """

    def __init__(self, folder: Path, seconds: int):
        self._folder, self._seconds = folder, seconds
        self._count, self._doing, self._since = 0, "starting", time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file(jax.process_index()).unlink(missing_ok=True)  # a pipe would block
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
            with contextlib.suppress(OSError):
                self._file(jax.process_index()).unlink(missing_ok=True)

    def progress(self, doing: str) -> None:
        """Records that something was finished and `doing` is next; the same in every process."""
        self._count, self._doing, self._since = self._count + 1, doing, time.monotonic()

    def over(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """`items`, each of which counts as progress."""
        for item in items:
            self.progress(doing)
            yield item

    def _file(self, index: int) -> Path:
        return self._folder / f"process-{index}.json"

    def _watch(self) -> None:
        pause = min(5.0, self._seconds / 4)
        index, me = jax.process_index(), {"host": socket.gethostname(), "pid": os.getpid()}
        while True:
            report = {"count": self._count, "doing": self._doing, "time": time.time(), **me}
            with contextlib.suppress(OSError):  # a full disk is no reason to end a run
                self._file(index).write_text(json.dumps(report))
            if self._done.wait(pause):
                return
            if time.monotonic() - self._since > self._seconds:
                print(self._diagnose(report), file=sys.stderr, flush=True)
                # Nothing milder ends a process whose main thread waits in a collective.
                os._exit(HUNG)

    def _diagnose(self, own_report: dict[str, Any]) -> str:
        """One line that says which process is behind."""
        line = f"bytelm train: no progress for {self._seconds} s in {own_report['doing']}: "
        reports = {index: self._read(index) for index in range(jax.process_count())}
        silent = [index for index, report in reports.items() if report is None]
        if silent:
            return line + f"process {silent[0]} has never reported; start the run again"
        now, known = time.time(), {i: report for i, report in reports.items() if report}
        late = min(known, key=lambda i: (known[i]["count"], known[i]["time"]))
        report = known[late]
        name = f"process {late} (host {report['host']}, pid {report['pid']})"
        if now - report["time"] > self._seconds / 2:
            seen = f"last answered {now - report['time']:.0f} s ago, in {report['doing']}"
        elif report["count"] < max(other["count"] for other in known.values()):
            seen = f"is behind the others, in {report['doing']}"
        elif len(known) == 1:
            return line + "start the run again; it continues from its last checkpoint"
        else:
            return line + "all processes are stuck there: a collective hangs; start the run again"
        return line + f"{name} {seen}; start the run again"

    def _read(self, index: int) -> dict[str, Any] | None:
        try:
            report = read_json(self._file(index))
        except (OSError, ValueError, RecursionError):
            return None
        kinds = {"count": int, "doing": str, "time": float, "host": str, "pid": int}
        good = isinstance(report, dict) and all(
            type(report.get(name)) is kind for name, kind in kinds.items()
        )
        return report if good else None
