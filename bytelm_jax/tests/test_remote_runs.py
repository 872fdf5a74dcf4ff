"""Runs whose folder is an address: trained, resumed and read as those on a disk."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bytelm.generation.draft_table import load_table
from bytelm.metrics import comparable
from bytelm.remote.copies import local_copy
from bytelm.runs import load_recipe, open_run
from bytelm_jax.cli.main import main
from bytelm_jax.training.checkpoint import load_run
from parity_tests import servers
from parity_tests.cases import quick

TINY = (
    "megabyte_tiny --model.patch-size 4 --model.global-dim 8 --model.local-dim 8 "
    "--model.global-layers 1 --model.local-layers 1 --model.global-heads 1 --model.local-heads 1 "
    "--model.max-length 16 --sequence-length 16 --batch-size 8 --log-every 1 "
    "--checkpoint-every 2 --eval-every 2 --eval-windows 8 --keep-last 1 --keep-best 0 --devices 1"
)


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


def train(folder: Path, run_dir: str | Path, steps: int, *options: str) -> int:
    text = folder / "text"
    text.write_bytes(b"".join(b"%d is a number\n" % (n * n) for n in range(1000)))
    command = ["train", *TINY.split(), "--data", str(text), "--steps", str(steps), *options]
    return main([*command, "--run-dir", str(run_dir)])


def records(run_dir: str | Path) -> list[dict]:
    with local_copy(run_dir) as copy:
        lines = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    return comparable(lines)


@pytest.fixture(scope="module")
def local(folder):
    """Stopped at the same step: the rates of a learning rate schedule go by --steps."""
    assert train(folder, folder / "local", 2) == train(folder, folder / "local", 4) == 0
    return folder / "local"


@pytest.mark.parametrize("protocol", quick(["gs", "s3"], "s3"))
def test_a_run_at_an_address_is_that_run(protocol, local, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    address = f"{protocol}://{servers.BUCKET}/run"
    with servers.stores():
        assert train(folder, address, 2) == train(folder, address, 4) == 0
        said = capsys.readouterr()
        assert f"done: step 4 is saved in {address}" in said.out, said
        assert records(address) == records(local)
        assert load_recipe(Path(address)) == load_recipe(local)
        theirs, ours = load_run(Path(address))[1], load_run(local)[1]
        assert all((theirs[name] == ours[name]).all() for name in ours)
        assert main(["export", address, "--out", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "model.safetensors").exists()
        assert main(["draft-table", str(local)]) == main(["draft-table", address]) == 0
        assert f"wrote {address}/draft_table.npz" in capsys.readouterr().out
        with local_copy(address) as copy:
            tables = [load_table(place / "draft_table.npz") for place in (copy, local)]
        assert all(map(np.array_equal, *tables))
        with open_run(Path(address)) as lock:  # as `calibrate` writes what it found
            assert lock.take(lock.local)
            lock.save_recipe(replace(load_recipe(local), origin="calibrated"))
        assert load_recipe(Path(address)).origin == "calibrated"
        assert (load_run(Path(address))[2], records(address)) == (4, records(local))
        assert main(["plot", address]) == 2
        assert main(["export", address, "--out", f"{address}/x"]) == 2
        capsys.readouterr()
        assert main(["eval", address, "--data", str(folder / "text"), "--checkpoint", "7"]) == 2
        assert "checkpoint=7: choose latest, best or one of [4]" in capsys.readouterr().err
        assert not list((tmp_path / "cache" / "bytelm" / "runs").iterdir())
