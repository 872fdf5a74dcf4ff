"""`bytelm doctor`: what is well, and a fault of each kind that it has to find."""

import importlib.metadata
import shutil
import socket
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm_jax.cli import main as cli
from bytelm_jax.tools import doctor
from bytelm_jax.tools.doctor import SickError
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps


@pytest.fixture(scope="module")
def mesh():
    return meshes.make_mesh(4, 2)


def test_a_machine_that_is_well(tmp_path, mesh, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_gradients", lambda mesh: "left to another test")
    (tmp_path / "text").write_text("twelve bytes")
    runs = tmp_path / "new" / "runs"
    (tmp_path / "a.jsonl").write_text('{"prompt": "one?", "completion": "two"}\n')
    options = ["--run-dir", str(runs), "--devices", "4", "--fsdp", "2"]
    options += ["--data", f"web={tmp_path}/text", "--valid", f"{tmp_path}/a.jsonl"]
    options += ["--prompt-field", "prompt", "--completion-field", "completion"]
    assert cli.main(["doctor", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "ok   versions", "ok   devices", "ok   mesh", "ok   precision", "ok   gradients",
        "ok   checkpoints", "ok   data",
    ]  # fmt: skip
    assert "data 2 x fsdp 2; this process feeds part 1 of 1" in lines[2]
    said = "web: 12 bytes in 1 documents; valid: 7 bytes in 1 documents (3 counted)"
    assert lines[6] == f"ok   data: {said}"
    assert not (tmp_path / "new").exists()  # left as it was


def test_gradients_of_many_devices_are_those_of_one(mesh):
    message = doctor.check_gradients(mesh)
    assert "4 devices are those of one: jit to" in message and "shard_map to" in message


def test_gradients_summed_once_too_often_are_found(mesh, monkeypatch):
    """The bug that AdamW hides: as many times too large as there are devices."""
    right = steps._over_micro_batches

    def wrong(*args):
        result, gradients = right(*args)
        return result, jax.tree.map(lambda g: 4 * g, gradients)

    monkeypatch.setattr(steps, "_over_micro_batches", wrong)
    with pytest.raises(SickError, match="jit over 4 devices makes them 4 times as long"):
        doctor.check_gradients(mesh)


def test_a_device_that_computes_wrongly_is_found(monkeypatch):
    right = doctor._product
    bad = jax.local_devices()[3]

    def product(a, b):
        return right(a, b) * (1.01 if a.devices() == {bad} else 1)

    monkeypatch.setattr(doctor, "_product", product)
    with pytest.raises(SickError, match=r"3\S*: a product in float32 is off by 1.0e-02"):
        doctor.check_precision()


def test_bfloat16_that_is_none_is_found(monkeypatch):
    def product(a, b):
        return np.asarray(a).astype(np.float64) @ np.asarray(b).astype(np.float64)

    monkeypatch.setattr(doctor, "_product", product)
    with pytest.raises(SickError, match=r"bfloat16 is off by 0.0e"):
        doctor.check_precision()


def test_x64_is_found(x64):
    with pytest.raises(SickError, match="JAX_ENABLE_X64"):
        doctor.check_precision()


def test_a_package_that_is_too_old_is_found(monkeypatch):
    right = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["optax>=0.2.8"])
    assert "optax" in doctor.check_versions()
    old = {"optax": "0.2.5"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or right(name))
    with pytest.raises(SickError, match=r"optax 0.2.5: pip install 'optax>=0.2.8'"):
        doctor.check_versions()
    old = {"jaxlib": "99.0"}
    with pytest.raises(SickError, match=r"jaxlib 99.0 is newer than jax"):
        doctor.check_versions()


def test_devices_of_two_kinds_are_found(monkeypatch):
    Device = namedtuple("Device", ["device_kind"])
    both = [Device("H100"), Device("A100")]
    monkeypatch.setattr(jax, "devices", lambda: both)
    with pytest.raises(SickError, match="A100, H100: different kinds of devices cannot be mixed"):
        doctor.check_devices()


def test_a_coordinator_that_is_not_there_is_found():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(SickError, match=f"127.0.0.1:{port}: Connection refused; is process 0"):
            doctor.check_coordinator("127.0.0.1", port, is_coordinator=False, patience=0.0)
        taken.listen()
        assert "answers" in doctor.check_coordinator("127.0.0.1", port, is_coordinator=False)
        with pytest.raises(SickError, match=r"cannot be listened on .*Address already in use"):
            doctor.check_coordinator("127.0.0.1", port, is_coordinator=True)
    assert "free" in doctor.check_coordinator("127.0.0.1", port, is_coordinator=True)
    with pytest.raises(SickError, match=r"nowhere.invalid: no such host"):
        doctor.check_coordinator("nowhere.invalid", 1234, is_coordinator=False)


def test_without_its_coordinator_nothing_else_is_looked_at(monkeypatch, capsys):
    where = ["--coordinator", "nowhere.invalid:1", "--num-processes", "2", "--process-id", "1"]
    assert cli.main(["doctor", *where]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL coordinator: nowhere.invalid: no such host")


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/proc/runs", "/proc/runs.*name a folder that can be written with --run-dir"),
        ("file/runs", "Not a directory; name a folder"),
    ],
)
def test_a_folder_that_cannot_be_written_is_found(tmp_path, mesh, folder, expected):
    (tmp_path / "file").write_text("")
    with pytest.raises(SickError, match=expected):
        doctor.check_checkpoints(tmp_path / folder, mesh)


def test_a_disk_that_forgets_or_is_full_is_found(tmp_path, mesh, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(SickError, match=r"0.00 GiB free; free some space"):
        doctor.check_checkpoints(tmp_path, mesh)
    monkeypatch.setattr(jnp, "array_equal", lambda a, b: False)
    with pytest.raises(SickError, match="arrays come back changed"):
        doctor.check_checkpoints(tmp_path, mesh)
    write = doctor.replace_file
    monkeypatch.setattr(doctor, "replace_file", lambda path, data: write(path, b"other"))
    with pytest.raises(SickError, match="returns different bytes"):
        doctor.check_checkpoints(tmp_path, mesh)
    monkeypatch.setattr(doctor, "replace_file", lambda path, data: None)
    with pytest.raises(SickError, match="not the folder that process 0 sees"):
        doctor.check_checkpoints(tmp_path, mesh)
    assert not list(tmp_path.iterdir())


def test_each_fault_is_a_line_and_the_other_checks_are_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_precision", lambda: 1 / 0)
    options = ["--run-dir", str(tmp_path), "--fsdp", "3", "--data", str(tmp_path / "none")]
    assert cli.main(["doctor", *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["ok  ", "ok  ", "FAIL", "FAIL", "FAIL"]
    assert "fsdp=3: must divide" in lines[2]
    assert "FAIL precision: ZeroDivisionError" in lines[3]
    assert "none: does not exist" in lines[4]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--fsdp", "0"], "--fsdp 0: must be at least 1"),
        (["--tensor", "0"], "--tensor 0: must be at least 1"),
        (["--devices", "many"], "devices"),
        (["--num-processes", "2"], "need --coordinator"),
        (["--coordinator", "here"], "--coordinator here: must be HOST:PORT"),
        (["--coordinator", "here:1"], "needs --num-processes N and --process-id I"),
    ],
)
def test_bad_input_is_one_line(options, expected, capsys):
    assert cli.main(["doctor", *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
