"""Checkpoints of runs on object stores: where Orbax writes them, and what commits one."""

import asyncio
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.path import atomicity

from bytelm.config import require
from bytelm.remote.run import RemoteRun
from bytelm.runs import RunLock
from bytelm.storage.lock import LockLostError


def remote_of(lock: RunLock | RemoteRun) -> RemoteRun | None:
    """The run, if it lives on a store."""
    return lock if isinstance(lock, RemoteRun) else None


def require_one_process(lock: RunLock | RemoteRun) -> None:
    """Raises `ValueError` for several processes whose checkpoint would lie on several machines."""
    one = jax.process_count() == 1 or not (isinstance(lock, RemoteRun) and lock.staged)
    require(
        one, f"run_dir={lock.name}: s3:// takes a run of one process; use gs:// or a shared disk"
    )


def checkpoint_folder(run_dir: Path, remote: RemoteRun | None) -> Any:
    """What Orbax takes for the folder of the checkpoints of a run."""
    if remote is None or remote.staged:
        return run_dir.absolute() / "checkpoints"
    return store_path(remote.checkpoints)


def store_path(address: str) -> Any:
    """An address on `gs://` as Orbax takes it."""
    import fsspec.config
    from etils import epath

    # Otherwise it would go by listings of before, when another process may have been at work.
    for protocol in ("gs", "gcs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    return epath.Path(address)


def committing(remote: RemoteRun | None) -> Any:
    """How Orbax makes a checkpoint of a run on a store count as whole; None for its own way."""
    if remote is None:
        return None

    class OnStore(atomicity.CommitFileTemporaryPath):
        """Looks at the lock before the last object is written."""

        async def finalize(self) -> None:
            if _is_step(self.get_final()):
                await asyncio.to_thread(remote.guard)
            await super().finalize()

    class Staged(atomicity.AtomicRenameTemporaryPath):
        """Uploads what was written here."""

        async def finalize(self) -> None:
            await super().finalize()
            if _is_step(self.get_final()):
                await asyncio.to_thread(remote.commit, int(self.get_final().name))

    return Staged if remote.staged else OnStore


def _is_step(path: Any) -> bool:
    """Whether this is a whole checkpoint, not an item of one."""
    return path.parent.name == "checkpoints" and path.name.isdecimal()


def raise_if_lost(error: BaseException | None) -> None:
    """Raises the `LockLostError` that `error` came from, if it did."""
    while error is not None:
        if isinstance(error, LockLostError):
            raise error
        error = error.__cause__ or error.__context__
