"""A run that lives on an object store, as its trainer sees it.

The trainer works in a scratch folder of this machine: `config.json` and `metrics.jsonl` lie there
as in any run folder, and are sent to the store. Checkpoints go to `gs://` directly; for `s3://`,
which Orbax does not write to, they are written to the scratch folder and uploaded, the object
`commit_success.txt` last.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from bytelm.config import Recipe
from bytelm.config.serialize import recipe_text
from bytelm.data.cache import cache_folder
from bytelm.export import CONFIG_FILE
from bytelm.remote.copies import ARRAYS, COMMITTED, naming, saved_steps
from bytelm.remote.folder import RemoteFolder
from bytelm.remote.pieces import MetricsPieces
from bytelm.storage.fetch import StoredObject, download, objects_under
from bytelm.storage.lock import REFUSED, TAKEN, StoreLock
from bytelm.storage.stores import protocol_of, tidy


class RemoteRun:
    """A context manager that holds the run at an address, as `RunLock` holds a local one.

    `local` is the scratch folder, which is removed at the end. Errors that leave the block name the
    address in its place. `locked=False` does without a lock.
    """

    def __init__(self, address: str | os.PathLike[str], cache_dir: str = "", locked: bool = True):
        self.name = tidy(address)
        self.staged = protocol_of(self.name) == "s3"
        """Whether checkpoints are written here and uploaded."""
        self._cache_dir, self._locked = cache_dir, locked
        self._config: bytes | None = None
        self._lock: StoreLock | None = None
        self._pieces: MetricsPieces | None = None
        self._handle = -1
        self._held = False

    # ---- entering and leaving ---------------------------------------------------------------

    def __enter__(self) -> RemoteRun:
        self._folder = RemoteFolder(self.name)
        if self._locked:
            self._lock = StoreLock(self.name)
        self.local = self._scratch()
        try:
            self._fetch_config()
        except BaseException:
            self._remove_scratch()
            raise
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._pieces:
                self._pieces.close()
                if not (self._lock and self._lock.lost):
                    with contextlib.suppress(Exception) if error else contextlib.nullcontext():
                        self._pieces.flush()
            if self.staged and self._held and not (error or self.lost) and self._config:
                self.guard()
                self.prune()
            if self._lock and self._held:
                with contextlib.suppress(Exception):  # it ends by itself
                    self._lock.release()
            if error is not None:
                with naming(self.name, self.local):
                    raise error
        finally:
            self._remove_scratch()

    def _scratch(self) -> Path:
        """A new folder in the cache; those of processes that were killed are removed."""
        runs = cache_folder(self._cache_dir) / "runs"
        runs.mkdir(exist_ok=True)
        for folder in runs.iterdir():
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue
            finally:
                os.close(handle)
        local = Path(tempfile.mkdtemp(dir=runs))
        self._handle = os.open(local, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a network file system that cannot
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return local

    def _remove_scratch(self) -> None:
        shutil.rmtree(self.local, ignore_errors=True)
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _fetch_config(self) -> None:
        config = self._folder.read(CONFIG_FILE)
        if config is not None:
            (self.local / CONFIG_FILE).write_bytes(config)

    # ---- the lock ---------------------------------------------------------------------------

    def look(self, _: Path) -> bool | None:
        """Whether this process holds the run now; None while it waits for the end of another.

        A start waits as long as a dead holder would hold it. Raises `ValueError` for a store
        without preconditions.
        """
        if self._lock:
            if not self._held and not self._lock.waiting:
                self._lock.check_store()
            state = self._lock.attempt()
            if state != TAKEN:
                return False if state == REFUSED else None
        self._held = True
        self._fetch_config()
        names = self._folder.names("metrics")
        text = b"".join(self._folder.read(name) or b"" for name in sorted(names))
        (self.local / "metrics.jsonl").write_bytes(text)
        if self.staged:
            self._fetch_small()
        return True

    def take(self, run_dir: Path) -> bool:
        """`look` until there is an answer."""
        while (taken := self.look(run_dir)) is None:
            pass
        return taken

    def guard(self) -> None:
        """Raises `LockLostError` if another process has taken the run over."""
        if self._lock:
            self._lock.check()

    def stop_if_lost(self) -> None:
        """Raises `LockLostError` if another process is known to have taken the run over."""
        if self.lost:
            self.guard()

    @property
    def lost(self) -> bool:
        """Whether another process is known to have taken the run over."""
        return self._lock is not None and self._lock.lost

    # ---- config.json and metrics ------------------------------------------------------------

    def save_recipe(self, recipe: Recipe) -> None:
        """Writes `config.json`, which `check` compares; it and metrics are sent from now on."""
        self.guard()
        self._config = recipe_text(recipe)
        (self.local / CONFIG_FILE).write_bytes(self._config)
        if self._folder.read(CONFIG_FILE) != self._config:
            self._folder.write(CONFIG_FILE, self._config)
        if self._pieces is None:
            self._pieces = MetricsPieces(self._folder, self.local / "metrics.jsonl")
            self._pieces.flush()
            self._pieces.start()

    def check(self) -> None:
        """Makes the store hold all metrics before a checkpoint.

        Raises `LockLostError` if another process has taken the run over, and `ValueError` if its
        `config.json` was changed; one that was deleted is written again.
        """
        self.guard()
        if self._config is not None:
            found = self._folder.read(CONFIG_FILE)
            if found is None:
                self._folder.write(CONFIG_FILE, self._config)
                line = f"warning: {self.name}/{CONFIG_FILE}: was deleted; written again"
                print(line, file=sys.stderr, flush=True)
            elif found != self._config:
                hint = "nothing more was saved; put it back and run the same command again"
                raise ValueError(f"{self.name}/{CONFIG_FILE}: was changed during the run; {hint}")
        if self._pieces:
            self._pieces.flush()

    # ---- checkpoints ------------------------------------------------------------------------

    @property
    def checkpoints(self) -> str:
        """The address of the folder of checkpoints."""
        return f"{self.name}/checkpoints"

    def steps(self) -> list[int]:
        """The steps of which the store holds a whole checkpoint."""
        return saved_steps(self._list())

    def _list(self) -> list[StoredObject]:
        return [
            replace(one, name=f"checkpoints/{one.name}") for one in objects_under(self.checkpoints)
        ]

    def _fetch_small(self) -> None:
        """Makes the scratch folder look as if it held the checkpoints, without their arrays."""
        objects = self._list()
        steps = set(saved_steps(objects))
        names = [(one, one.name.split("/")) for one in objects]
        whole = [one for one, parts in names if parts[1].isdecimal() and int(parts[1]) in steps]
        rest = [one.name for one, parts in names if one not in whole]
        if rest:  # of a save that was cut short
            self._folder.remove_all(rest)
        self._download([one for one in whole if one.name.split("/")[2] not in ARRAYS])

    def fetch(self, step: int) -> None:
        """Brings the arrays of a checkpoint into the scratch folder, if Orbax reads it there."""
        if not self.staged:
            return
        prefix = f"checkpoints/{step}/"
        self._download([one for one in self._list() if one.name.startswith(prefix)])

    def drop(self, step: int) -> None:
        """Removes the arrays of a checkpoint from the scratch folder."""
        for name in ARRAYS:
            shutil.rmtree(self.local / "checkpoints" / str(step) / name, ignore_errors=True)

    def _download(self, objects: list[StoredObject]) -> None:
        missing = [one for one in objects if not (self.local / one.name).exists()]
        if missing:
            download(missing, lambda one: self.local / one.name, f"downloading {self.name}")

    def commit(self, step: int) -> None:
        """Uploads a checkpoint from the scratch folder, and then what says that it is whole."""
        folder, under = self.local / "checkpoints" / str(step), f"checkpoints/{step}"
        self.guard()
        self.prune()
        self._folder.upload(folder, under, COMMITTED)
        self.guard()
        self._folder.write(f"{under}/{COMMITTED}", b"whole")
        self.drop(step)

    def prune(self) -> None:
        """Removes from the store the checkpoints that are not in the scratch folder any more."""
        here = self.local / "checkpoints"
        kept = {path.name for path in here.iterdir()} if here.is_dir() else set()
        gone = [one.name for one in self._list() if one.name.split("/")[1] not in kept]
        self._folder.remove_all(name for name in gone if name.endswith(f"/{COMMITTED}"))
        self._folder.remove_all(name for name in gone if not name.endswith(f"/{COMMITTED}"))

    def set_aside(self, step: int) -> str:
        """Moves a damaged checkpoint to the folder `damaged`; its new address."""
        self.guard()
        taken = {name.split("/")[1] for name in self._folder.names("damaged")}
        names = [str(step), *(f"{step}.{number}" for number in range(1, len(taken) + 1))]
        target = f"damaged/{next(name for name in names if name not in taken)}"
        self._folder.move(f"checkpoints/{step}", target, COMMITTED)
        shutil.rmtree(self.local / "checkpoints" / str(step), ignore_errors=True)
        return f"{self.name}/{target}"
