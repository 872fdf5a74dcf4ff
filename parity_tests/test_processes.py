"""Real processes over loopback: their run equals that of one device, also when resumed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bytelm import tolerances
from bytelm.metrics import comparable, read_metrics
from bytelm_jax.cli import main as cli
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import checkpoint
from bytelm_jax.training.processes import HUNG

LAUNCH = Path(__file__).parents[1] / "scripts" / "launch" / "local"
DEADLINE = 240
STEPS = 20
RUN = [
    *("megabyte_tiny", "--model.patch-size", "4", "--model.global-dim", "32"),
    *("--model.local-dim", "32", "--model.global-layers", "1", "--model.local-layers", "1"),
    *("--model.global-heads", "2", "--model.local-heads", "2", "--model.max-length", "64"),
    *("--model.dropout", "0.1", "--sequence-length", "64", "--batch-size", "8"),
    # Plain SGD: it shows a gradient that is N times too large, which AdamW would hide.
    *("--optimizer.name", "sgd", "--lr", "0.1", "--warmup-steps", "2", "--log-every", "1"),
    *("--eval-every", "10", "--eval-windows", "16", "--checkpoint-every", "10"),
    *("--steps", str(STEPS)),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    source = np.random.default_rng(3)
    words = [bytes(source.integers(97, 123, size)) for size in source.integers(2, 8, 60)]
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_bytes(b" ".join(words[j] for j in source.integers(0, 60, 300)))
    return folder


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, text):
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    command = ["train", *RUN, "--data", str(text), "--devices", "1", "--run-dir", str(run_dir)]
    assert cli.main(command) == 0
    return run_dir


def two_processes(run_dir, text, *options):
    """Two processes with four simulated devices each."""
    command = [sys.executable, str(LAUNCH), "2", "--cpu-devices", "4", "--", *RUN, *options]
    return subprocess.Popen(
        [*command, "--data", str(text), "--run-dir", str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(started):
    try:
        out, _ = started.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGKILL)
        out, _ = started.communicate()
        pytest.fail(f"past its deadline: {out}")
    assert started.returncode == 0, out
    return out


def assert_equal_runs(ours, theirs):
    actual, expected = (
        [r for r in read_metrics(run / "metrics.jsonl") if "loss" in r] for run in (ours, theirs)
    )
    assert [r["step"] for r in actual] == [r["step"] for r in expected] == list(range(1, STEPS + 1))
    for record, other in zip(actual, expected, strict=True):
        for name in ("loss", "grad_norm"):
            error = abs(record[name] - other[name]) / other[name]
            assert error <= tolerances.DEVICES_AFTER_5_STEPS, (name, record, other)
    validations = [
        [
            r["validation_loss"]
            for r in comparable(read_metrics(run / "metrics.jsonl"))
            if "loss" not in r
        ]
        for run in (ours, theirs)
    ]
    assert len(validations[0]) == len(validations[1]) == 2
    error = relative_error(np.array(validations[0]), np.array(validations[1]))
    assert error <= tolerances.DEVICES_AFTER_5_STEPS
    params, other = (checkpoint.load_run(run)[1] for run in (ours, theirs))
    for name, value in params.items():
        error = relative_error(np.asarray(value), np.asarray(other[name]))
        assert error <= tolerances.DEVICES_AFTER_5_STEPS, name


@pytest.mark.slow
def test_eight_devices_of_one_process_train_as_one(one_device, text, tmp_path):
    """Over 2 x 4 devices, by the other form of the step."""
    command = ["train", *RUN, "--data", str(text), "--run-dir", str(tmp_path / "run")]
    command += ["--fsdp", "4", "--parallel", "shard_map"]
    assert cli.main(command) == 0
    assert_equal_runs(tmp_path / "run", one_device)


def test_two_processes_stopped_by_a_signal_to_one_and_gone_on_with(one_device, text, tmp_path):
    """SIGTERM to the second: both save the same step, and the same command continues.

    Parameters are cut over groups of devices that reach across both processes.
    """
    run_dir = tmp_path / "run"
    started = two_processes(run_dir, text, "--fsdp", "8")
    log = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + DEADLINE
    while not (log.exists() and any(r["step"] >= 3 for r in read_metrics(log))):
        assert started.poll() is None and time.monotonic() < deadline, finish(started)
        time.sleep(0.01)
    os.kill(process_of(started.pid, 1), signal.SIGTERM)
    out = finish(started)
    stopped = re.search(r"stopped: step (\d+) is saved in", out)
    assert stopped
    step = int(stopped[1])
    assert 3 <= step < STEPS
    assert checkpoint.load_run(run_dir)[2] == step
    out = finish(two_processes(run_dir, text))
    assert f"resuming megabyte_tiny in {run_dir}, step {step}" in out
    assert out.count("is saved in") == 1  # one process speaks for both
    assert_equal_runs(run_dir, one_device)


@pytest.mark.slow
def test_a_process_that_loses_the_first_says_so_and_asks_to_be_started_again(text, tmp_path):
    started = two_processes(tmp_path / "run", text, "--steps", "100000", "--checkpoint-every", "1")
    deadline = time.monotonic() + DEADLINE
    while not (tmp_path / "run" / "checkpoints" / "2").exists():
        assert started.poll() is None and time.monotonic() < deadline, finish(started)
        time.sleep(0.01)
    first, second = (process_of(started.pid, index) for index in (0, 1))
    os.kill(started.pid, signal.SIGSTOP)  # so that nobody else asks for the second one's status
    os.kill(first, signal.SIGKILL)
    while (status := status_of(second)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGCONT)
    out, _ = started.communicate(timeout=DEADLINE)
    assert status == HUNG << 8, out
    assert re.search(r"^\[1\] bytelm train: process 1 lost contact with another one", out, re.M)


def status_of(process):
    """How a process that nobody has waited for has ended, None while it runs."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[-1]) if fields[0] == "Z" else None


def test_processes_that_disagree_end_before_anything_is_written(text, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "bytelm_jax.cli", "train", *RUN, "--data", str(text)]
    command += ["--run-dir", str(tmp_path / "run"), "--coordinator", where, "--num-processes", "2"]
    started = [
        subprocess.Popen(
            [*command, "--process-id", str(index), "--seed", str(index), "--batch-size", "16"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    for process in started:
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 2
        assert "bytelm train: train.seed=1 in process 1, 0 in process 0: start all" in err
    assert not (tmp_path / "run").exists()


def process_of(launcher, index):
    """The process id of one of the processes that `scripts/launch/local` started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == launcher and words[-3:-1] == [b"--process-id", b"%d" % index]:
            return int(folder.name)
    raise AssertionError(f"process {index} is not there")
