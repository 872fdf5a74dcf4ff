"""Folders that appear whole, and what stopped processes leave of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bytelm.folders import new_folder

_STOPPED = """
import os, sys, threading, time
from pathlib import Path
from bytelm.folders import new_folder

def write(folder):
    time.sleep(0.1)
    folder.mkdir(exist_ok=True)
    (folder / "late").touch()

with new_folder(Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    threading.Thread(target=write, args=(folder,)).start()
    sys.exit(143) if sys.argv[2] == "exit" else os.kill(os.getpid(), 9)
"""


def test_a_stopped_process_leaves_nothing_or_the_next_one_removes_it(tmp_path: Path) -> None:
    """Threads that still write after the exception included; nothing can be done at a kill -9."""
    out = tmp_path / "run"
    for how, status, left in (("exit", 143, 0), ("kill", -9, 1)):
        command = [sys.executable, "-c", _STOPPED, str(out), how]
        assert subprocess.run(command, check=False).returncode == status
        assert len(list(tmp_path.iterdir())) == left
    with new_folder(out) as folder:
        (folder / "whole").touch()
    assert [each.name for each in tmp_path.rglob("*")] == ["run", "whole"]


def test_nothing_of_a_process_that_still_writes_is_removed(tmp_path: Path) -> None:
    """Known by its id, or, of another machine or container, by its lock; nor anything else's."""
    out, gone = tmp_path / "run", 2**30
    others = [f".run.{os.getppid()}.partial", ".run.x.partial", f".other.{gone}.partial"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / f".run.{gone}.partial").mkdir()
    elsewhere = tmp_path / f".run.{gone + 1}.partial"
    with pytest.raises(KeyboardInterrupt), new_folder(out) as folder:
        folder.rename(elsewhere)  # its lock goes with it
        with pytest.raises(OSError, match="empty"), new_folder(out) as second:
            assert {each.name for each in tmp_path.iterdir()} == {
                *others, elsewhere.name, second.name
            }  # fmt: skip
            out.mkdir()
            (out / "file").touch()
        raise KeyboardInterrupt
    assert {each.name for each in tmp_path.iterdir()} == {*others, elsewhere.name, "run"}
