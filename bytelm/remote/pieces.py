"""`metrics.jsonl` of a run on a store: objects that follow each other, as none can be appended to.

They are `metrics/00000000.jsonl` and so on. The last one is written anew as it grows, so that there
are few of them.
"""

from __future__ import annotations

import threading
from pathlib import Path

from bytelm.remote.folder import RemoteFolder

_FULL = 1 << 18
"""Bytes of a piece after which another one begins."""


class MetricsPieces:
    """Sends the lines of a local file to a store, every `seconds` and when asked.

    The first `flush` makes the store hold what the file does: pieces that say otherwise, since
    the run was resumed before their steps, are written anew or removed.
    """

    def __init__(self, folder: RemoteFolder, file: Path, seconds: float = 10.0) -> None:
        self._folder, self._file, self._seconds = folder, file, seconds
        self._number, self._begin, self._end = 0, 0, -1
        self._mutex, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Starts to send lines."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what was not flushed stays unsent."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def flush(self) -> None:
        """Sends all whole lines of the file; raises `ValueError` if the store does not answer."""
        with self._mutex:
            text = self._file.read_bytes() if self._file.exists() else b""
            text = text[: text.rfind(b"\n") + 1]
            if self._end < 0:
                self._align(text)
            if len(text) > self._end:
                self._folder.write(_piece(self._number), text[self._begin :])
                self._end = len(text)
            if self._end - self._begin > _FULL:
                self._number, self._begin = self._number + 1, self._end

    def _align(self, text: bytes) -> None:
        """Finds the pieces that the file begins with, and replaces the others."""
        names = sorted(self._folder.names("metrics"))
        at, kept = 0, 0
        for name in names:
            piece = self._folder.read(name) or b""
            if name != _piece(kept) or not piece or not text.startswith(piece, at):
                break
            at, kept = at + len(piece), kept + 1
        self._number, self._begin, self._end = kept, at, at
        if len(text) > at and kept < len(names):
            self._folder.write(_piece(kept), text[at:])
            self._end = len(text)
        stays = {_piece(number) for number in range(kept + (self._end > at))}
        for name in reversed([name for name in names if name not in stays]):
            self._folder.remove(name)

    def _run(self) -> None:
        while not self._done.wait(self._seconds):
            try:
                self.flush()
            except Exception:  # it is tried again, and a checkpoint says what is wrong
                continue


def _piece(number: int) -> str:
    return f"metrics/{number:08}.jsonl"
