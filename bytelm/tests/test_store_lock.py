"""The lock of a run on a store, its metrics, and what a holder that lost it may do: nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bytelm import runs
from bytelm.recipes import get
from bytelm.remote.folder import RemoteFolder
from bytelm.remote.pieces import MetricsPieces
from bytelm.remote.run import RemoteRun
from bytelm.storage import lock as locks
from bytelm.storage.conditions import conditional
from bytelm.storage.lock import REFUSED, TAKEN, WAITING, LockLostError, StoreLock, Timing
from parity_tests import servers

QUICK = Timing(renew=0.2, dead=0.8, look=0.05)


@pytest.fixture(scope="module", autouse=True)
def _stores() -> Iterator[None]:
    with servers.stores():
        yield


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(locks, "TIMING", QUICK)


def answer(lock: StoreLock) -> int:
    while (state := lock.attempt()) == WAITING:
        pass
    return state


def kill(lock: StoreLock) -> None:
    """What `kill -9` and SIGSTOP do to it: no renewal comes any more."""
    lock._done.set()
    lock._thread.join()


@pytest.mark.parametrize("protocol", ["gs", "s3"])
def test_one_holder_at_a_time(protocol: str, capfd: pytest.CaptureFixture[str]) -> None:
    run = f"{protocol}://{servers.BUCKET}/lock"
    first, second = StoreLock(run), StoreLock(run)
    first.check_store()
    assert first.attempt() == TAKEN
    first.check()
    assert answer(second) == REFUSED  # the first one is alive
    assert "held by another process" in capfd.readouterr().err
    kill(first)
    third = StoreLock(run)
    assert answer(third) == TAKEN
    with pytest.raises(LockLostError, match=rf"^run_dir={run}: another process has taken it"):
        first.check()  # though it did not notice by itself
    third.release()
    assert StoreLock(run).attempt() == TAKEN  # at once


def test_a_restarted_job_takes_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"gs://{servers.BUCKET}/job"
    monkeypatch.setenv("BYTELM_JOB_ID", "seven")
    first, again = StoreLock(run), StoreLock(run)
    assert (first.attempt(), again.attempt()) == (TAKEN, TAKEN)
    with pytest.raises(LockLostError):
        first.check()
    again.release()


def test_a_store_without_preconditions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"gs://{servers.BUCKET}/plain"
    kind = type(conditional(f"{run}/x"))
    write = kind.write

    def ignores(self: Any, data: bytes, tag: str | None) -> str | None:
        found = kind.read(self)
        return write(self, data, found.tag if found else None)

    monkeypatch.setattr(kind, "write", ignores)
    with pytest.raises(ValueError, match=rf"^run_dir={run}: its store ignores .* or --no-lock if"):
        StoreLock(run).check_store()
    with pytest.raises(ValueError, match=r"^run_dir=hf://a/b: runs live on disks, gs:// and s3://"):
        runs.open_run(Path("hf://a/b"))


def test_a_holder_that_lost_its_run_commits_nothing() -> None:
    address = f"s3://{servers.BUCKET}/paused"
    with RemoteRun(address) as first:
        assert first.take(first.local)
        first.save_recipe(get("megabyte_tiny"))
        step = first.local / "checkpoints" / "3"
        step.mkdir(parents=True)
        for name in ("array", "commit_success.txt"):
            (step / name).write_text(name)
        first.commit(3)
        step.rename(step.with_name("6"))
        assert first._lock
        kill(first._lock)  # paused in mid-save
        with RemoteRun(address) as second:
            assert second.take(second.local)
            assert second.steps() == [3]
            with pytest.raises(LockLostError):
                first.commit(6)
            with pytest.raises(LockLostError):
                first.check()
            assert second.steps() == [3]
    assert not any((step.parents[2]).iterdir())  # nothing is left here


def test_metrics_are_what_the_file_is(tmp_path: Path) -> None:
    folder = RemoteFolder(f"gs://{servers.BUCKET}/metrics")
    file = tmp_path / "metrics.jsonl"

    def line(step: int) -> bytes:
        return json.dumps({"step": step}).encode() + b"\n"

    def stored() -> bytes:
        return b"".join(folder.read(name) or b"" for name in sorted(folder.names("metrics")))

    for steps, resumed in ((range(4), range(3)), (range(6), range(2)), (range(2), range(1))):
        for text in (b"".join(map(line, steps)), b"".join(map(line, resumed))):
            file.write_bytes(text + b'{"step": 7')  # a line that is not whole yet
            pieces = MetricsPieces(folder, file)
            pieces.flush()
            assert stored() == text
            file.write_bytes(text + line(9))
            pieces.flush()
            assert stored() == text + line(9)
