"""Run folders that change while somebody reads or trains in them."""

import shutil
from pathlib import Path

import pytest

from bytelm import runs


def test_an_export_that_training_removes_while_it_is_read(tmp_path: Path) -> None:
    for step in (3, 12):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "model.safetensors").touch()

    def read(folder: Path) -> str:
        if folder.name == "3":  # a newer one is there, and this one is pruned
            shutil.rmtree(folder)
            raise ValueError("damaged")
        return folder.name

    assert runs.read_export(tmp_path, "latest", read) == "12"
    with pytest.raises(ValueError, match=r"^checkpoint=3: was removed .* one of \[12\]$"):
        runs.read_export(tmp_path, 3, read)

    def damaged(_: Path) -> str:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match=r"^damaged$"):
        runs.read_export(tmp_path, "latest", damaged)


def test_a_lock_tells_its_folder_from_another_and_the_config_from_a_stranger_s(
    tmp_path: Path,
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    with runs.RunLock() as lock:
        assert lock.take(run)
        lock.check()
        run.rename(elsewhere)
        with pytest.raises(ValueError, match=r"run: was moved or replaced during the run; noth"):
            lock.check()
        run.mkdir()
        with pytest.raises(ValueError, match=r"run: was moved or replaced during the run; noth"):
            lock.check()
        run.rmdir()
        run.symlink_to(elsewhere)  # the same folder by another way
        lock.check()
        with runs.RunLock() as second:
            assert not second.take(run)
