"""Joining, stopping and the watchdog of a run's processes, without other processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import jax
import pytest

from bytelm import recipes
from bytelm.run_data import open_windows
from bytelm_jax.training import processes
from bytelm_jax.training.batches import order_digest
from bytelm_jax.training.loop import train
from bytelm_jax.training.mesh import describe, make_mesh
from bytelm_jax.training.processes import HUNG, StopSignal, Watchdog


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (("10.0.0.1",), "coordinator=10.0.0.1: must be HOST:PORT"),
        ((":1234",), "coordinator=:1234: must be HOST:PORT"),
        (("host:65536", 2, 0), "coordinator=host:65536: must be HOST:PORT"),
        (("host:1", 2**31, 0), "num_processes=2147483648, process_id=0: a coordinator needs both"),
        (("host:1", 0, 0), "num_processes=0, process_id=0: a coordinator needs both"),
        (("host:1", 2, None), "num_processes=2, process_id=None: a coordinator needs both"),
        (("host:1", 2, 2), "num_processes=2, process_id=2: a coordinator needs both"),
    ],
)
def test_what_cannot_be_joined_is_refused(where, says):
    with pytest.raises(ValueError, match=says):
        processes.join(*where)


def test_several_tasks_of_a_launcher_are_not_one_run_by_accident(monkeypatch):
    processes.check_alone()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.check_alone()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match=r"SLURM_STEP_NUM_TASKS=4: .* add --distributed"):
        processes.check_alone()


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"data": '"a"'}, ""),
        ({"data": '"b"'}, r'^data="b" in process 1, "a" in process 0: start all'),
        ({"lr": "1", "data": '"a"'}, "^lr=1 in process 1, nothing in process 0: start all"),
        ({"error": "text.txt: is gone"}, "^process 1: text.txt: is gone$"),
    ],
)
def test_processes_go_on_only_if_they_agree(others, says, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_exchange", lambda found: [found, others])
    refused = pytest.raises(ValueError, match=says) if says else contextlib.nullcontext()
    with refused, processes.agreement() as found:
        found["data"] = "a"


def test_what_a_run_is_is_compared_before_anything_is_written(tmp_path, monkeypatch):
    found = {}

    @contextlib.contextmanager
    def agreement():
        yield found
        raise ValueError("compared")

    (tmp_path / "text").write_bytes(b"some text " * 200)
    recipe = recipes.get("megabyte_tiny")
    recipe = replace(recipe, data=replace(recipe.data, paths=(str(tmp_path / "text"),)))
    monkeypatch.setattr(processes, "agreement", agreement)
    with pytest.raises(ValueError, match=r"^compared$"):
        train(recipe, tmp_path / "run")
    assert found["optimizer.learning_rate"] == 3e-3 and found["train.seed"] == 0
    assert {"code", "jax", "flax", "bytelm", "run_dir", "train.batch_size"} < found.keys()
    windows = open_windows(recipe).windows
    assert found["data"] == open_windows(recipe).identity
    assert found["mesh"] == describe(make_mesh(8)) != describe(make_mesh(8, 2))
    orders = [order_digest(windows, seed, "exact") for seed in (recipe.data.shuffle_seed, 1)]
    assert found["rows"] == orders[0] != orders[1]
    assert not (tmp_path / "run").exists()
    known = found["code"]
    with monkeypatch.context() as patch:  # other code
        patch.setattr(processes.Path, "read_bytes", lambda _: b"")
        assert processes.installation()["code"] != known
    with monkeypatch.context() as patch:
        patch.setattr(processes, "version", lambda name: f"{name} 1")
        assert processes.installation()["libtpu"] == "libtpu 1"


def test_a_process_whose_number_is_taken_ends_at_once():
    """JAX aborts it, by a signal; the others wait until their time is over."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    program = "import sys; from bytelm_jax.training.processes import join; "
    program += f"join({where!r}, 3, int(sys.argv[1]))"
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(i)], stderr=subprocess.PIPE, text=True)
        for i in (0, 1, 1)
    ]
    try:
        deadline = time.monotonic() + 240
        while all(process.poll() is None for process in started):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (ended,) = (process for process in started if process.poll() is not None)
        assert ended.stderr and ended.returncode == 2
        line = "bytelm train: process_id=1: could not join; give each process another process_id\n"
        assert ended.stderr.read().endswith(line)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_a_process_tells_the_others_of_its_error_and_raises_it(monkeypatch):
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_exchange", told.append)
    with pytest.raises(OSError, match="no such disk"), processes.agreement():
        raise OSError("no such disk")
    assert told == [{"error": "no such disk"}]


def test_a_signal_is_heard_when_it_is_asked_for():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.agreed() and not stop
        assert list(stop.until(iter("ab"))) == ["a", "b"]
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop  # until everybody has been asked
        assert list(stop.until(iter("ab"))) == []
        assert stop
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_processes_stop_at_the_turn_that_they_agreed_on(monkeypatch):
    turns = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils,
        "reached_preemption_sync_point",
        lambda turn: turns.append(turn) or turn == 3,
    )
    stop = StopSignal()
    assert [stop.agreed() for _ in range(5)] == [False, False, True, True, True]
    assert turns == [1, 2, 3]  # nobody asks any more, once it is settled


SAID = {"count": 7, "doing": "the steps after 12", "host": "node1", "pid": 41}


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (None, "process 1 has never reported"),
        ({"age": 30, "count": 7}, "process 1 (host node1, pid 41) last answered 30 s ago"),
        ({"age": 0, "count": 5}, "process 1 (host node1, pid 41) is behind the others, in the st"),
        ({"age": 0, "count": 7}, "all processes are stuck there: a collective hangs"),
    ],
)
def test_the_process_that_the_others_wait_for_is_named(other, names, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    now = time.time()
    report = SAID | {"time": now, "count": 7}
    (tmp_path / "process-0.json").write_text(json.dumps(report))
    if other:
        other_report = SAID | {"time": now - other["age"], "count": other["count"]}
        (tmp_path / "process-1.json").write_text(json.dumps(other_report))
    line = Watchdog(tmp_path, 40)._diagnose(report)
    assert line.startswith("bytelm train: no progress for 40 s in the steps after 12: ")
    assert names in line and line.count("\n") == 0


def test_a_process_that_hangs_leaves_with_its_own_status(tmp_path):
    """Its main thread never comes back, as in a collective whose other side is gone."""
    code = (
        "import sys, pathlib, threading\n"
        "from bytelm_jax.training.processes import Watchdog\n"
        "with Watchdog(pathlib.Path(sys.argv[1]), 1) as dog:\n"
        "    dog.progress('the steps after 3')\n"
        "    threading.Event().wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == HUNG, done.stderr
    assert "no progress for 1 s in the steps after 3: start the run again" in done.stderr


def test_a_run_says_how_far_it_is_while_it_lasts(tmp_path):
    file = tmp_path / "progress" / "process-0.json"
    with Watchdog(tmp_path / "progress", 600) as dog:
        assert list(dog.over("abc", "the evaluation of step 3")) == list("abc")
        while not file.exists():
            time.sleep(0.01)
    assert not file.exists()


def test_the_coordinator_listens_where_it_was_told_to(monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: asked.update(options))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"coordinator={used}: the port is in use; choose"):
            processes.join(used, 2, 0)
        assert not asked
    processes.join(used, 2, 0)  # free by now
    assert asked == {"coordinator_bind_address": used}
    processes.join("192.0.2.1:1234", 2, 0)  # an address that this machine does not have itself
    assert asked == {"coordinator_bind_address": None}
