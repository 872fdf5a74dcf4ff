"""The lock of a run on a store: an object with the holder's name, renewed while the holder lives.

Whoever finds it unchanged for a minute takes it over. Every write names the version that it
replaces, so of two that try only one succeeds, and a holder that was paused learns that it lost.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import NamedTuple

from bytelm.config import require
from bytelm.storage.conditions import Version, conditional
from bytelm.storage.stores import patiently


class Timing(NamedTuple):
    """Seconds: between renewals, until a lock counts as dead, between looks while waiting."""

    renew: float = 10.0
    dead: float = 60.0
    look: float = 2.0


TIMING = Timing()
"""That of every run."""

WAITING, TAKEN, REFUSED = range(3)
"""Results of `StoreLock.attempt`."""


class LockLostError(ValueError):
    """Another process holds the run; the message names the run folder."""


def job_id() -> str:
    """What this job is called, by which a restart of it takes over at once; "" if unknown.

    `BYTELM_JOB_ID`, or the job and step of SLURM, which a requeued job keeps.
    """
    named = os.environ.get("BYTELM_JOB_ID", "")
    slurm, step = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_STEP_ID", "0")
    return named or (f"slurm {slurm}.{step}" if slurm else "")


class StoreLock:
    """The lock of the run at `run`; a thread renews it until `release`."""

    def __init__(self, run: str, timing: Timing | None = None) -> None:
        self._run, self._timing = run, timing or TIMING
        self._object = conditional(f"{run}/lock.json")
        self._me = {"job": job_id(), "process": secrets.token_hex(8)}
        self._me |= {"host": socket.gethostname(), "pid": str(os.getpid())}
        self._beats, self._tag = 0, ""
        self._seen, self._begun = "", 0.0
        self._changed = self._looked = 0.0
        self._mutex, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self.lost = False
        """Whether another process has taken the lock."""

    @property
    def waiting(self) -> bool:
        """Whether `attempt` was called."""
        return bool(self._begun)

    # ---- taking it --------------------------------------------------------------------------

    def check_store(self) -> None:
        """Raises `ValueError` for a store that ignores preconditions."""
        address = f"{self._run}/lock-{self._me['process']}.probe"
        probe = conditional(address)

        def honoured() -> bool:
            first = probe.write(b"a", None)
            if first is None:  # a retry after an answer that was lost
                first = (probe.read() or Version(b"", "")).tag
            again, wrong = probe.write(b"b", None), None
            if again is None:
                probe.write(b"c", first)
                wrong = probe.write(b"d", first)
            return again is None and wrong is None

        try:
            good = patiently(address, honoured)
        finally:
            probe.remove()
        hint = "take another store, or --no-lock if nothing else ever writes there"
        require(
            good, f"run_dir={self._run}: its store ignores preconditions (If-None-Match); {hint}"
        )

    def attempt(self) -> int:
        """One look at the lock, after a pause if it is not the first: `TAKEN`, `WAITING` or
        `REFUSED`, the last after the time in which a dead holder would have been found out.
        """
        if self._begun:
            time.sleep(self._timing.look)
        found = patiently(self._object_address, self._object.read)
        now = time.monotonic()
        self._begun = self._begun or now
        holder = _parse(found)
        free = found is None or holder.get("released") or self._is_this_job(holder)
        # A store that was away says nothing about a holder that could not renew meanwhile.
        if found and (found.tag != self._seen or now - self._looked > self._timing.renew):
            self._seen, self._changed = found.tag, now
        self._looked = now
        if free or now - self._changed > self._timing.dead:
            if patiently(self._object_address, lambda: self._write(found.tag if found else None)):
                self._thread.start()
                if now > self._begun:
                    self._say(f"taken after {now - self._begun:.0f} s")
                return TAKEN
            return WAITING
        alive = now - self._changed < 2 * self._timing.renew
        if now - self._begun > self._timing.dead and alive:
            return REFUSED
        if now == self._begun:
            who = f"host {holder.get('host', '?')}, pid {holder.get('pid', '?')}"
            wait = f"waiting up to {self._timing.dead:.0f} s for its end"
            self._say(f"held by another process ({who}); {wait}")
        return WAITING

    def _is_this_job(self, holder: dict[str, str]) -> bool:
        return bool(self._me["job"]) and holder.get("job") == self._me["job"]

    def _say(self, what: str) -> None:
        print(f"{self._run}: {what}", file=sys.stderr, flush=True)

    # ---- holding it -------------------------------------------------------------------------

    def check(self) -> None:
        """Renews the lock; raises `LockLostError` if another process has it."""
        with self._mutex:
            if not self.lost:
                self.lost = not patiently(self._object_address, lambda: self._write(self._tag))
        if self.lost:
            hint = "nothing more was saved here; the run goes on there"
            raise LockLostError(f"run_dir={self._run}: another process has taken it over; {hint}")

    def release(self) -> None:
        """Ends the renewals, and leaves the lock to the next process."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._mutex:
            if self._tag and not self.lost:
                # Not removed: S3 cannot remove only what we wrote.
                patiently(self._object_address, lambda: self._write(self._tag, released=True))

    @property
    def _object_address(self) -> str:
        return f"{self._run}/lock.json"

    def _write(self, tag: str | None, released: bool = False) -> bool:
        """Writes this process as the holder over version `tag`; False if there is another."""
        self._beats += 1
        entry = self._me | {"beat": self._beats} | ({"released": True} if released else {})
        new = self._object.write(json.dumps(entry).encode(), tag)
        if new is None:  # ours nevertheless if only the answer to an earlier attempt was lost
            found = self._object.read()
            ours = found is not None and _parse(found).get("process") == self._me["process"]
            if found is None or not ours:
                return False
            self._tag = found.tag
            return True
        self._tag = new
        return True

    def _renew(self) -> None:
        while not self._done.wait(self._timing.renew):
            with self._mutex:
                if self.lost:
                    return
                try:
                    self.lost = not self._write(self._tag)
                except Exception:  # it is tried again, and `check` says what is wrong
                    continue


def _parse(found: Version | None) -> dict:
    try:
        entry = json.loads(found.data) if found else {}
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
