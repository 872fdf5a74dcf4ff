"""The scripts that start runs on clusters, with stand-ins for the clusters' own commands."""

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parent.parent.parent / "scripts" / "launch"


@pytest.fixture
def stand_in(tmp_path):
    """Puts a shell script on the PATH under a name; each call adds its arguments to `calls`."""

    def make(name: str, body: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{tmp_path}/calls\n{body}\n')
        path.chmod(0o755)

    return make


def environment(tmp_path, **more):
    return dict(os.environ) | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | more


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("ends", "restarts", "status", "again"),
    [
        ("echo 'done: step 9'; exit 0", "0", 0, False),
        ("echo 'stopped: step 5'; exit 0", "0", 0, True),
        ("exit 75", "3", 75, True),
        ("exit 75", "20", 75, False),
        ("kill -9 $$", "0", 137, True),
        ("exit 2", "0", 2, False),
    ],
)
def test_slurm_queues_a_run_again_that_is_unfinished(
    tmp_path, stand_in, ends, restarts, status, again
):
    stand_in("srun", 'shift; "$@"')
    stand_in("scontrol", "")
    stand_in("bytelm", f'if [ "$1" = train ]; then {ends}; fi')
    (tmp_path / "bin" / "activate").write_text("")
    process = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "megabyte_tiny", "--steps", "9"],
        env=environment(
            tmp_path, VENV=str(tmp_path), RUN_DIR=f"{tmp_path}/run", SLURM_JOB_ID="7",
            SLURM_RESTART_COUNT=restarts,
        ),
        capture_output=True, timeout=30,
    )  # fmt: skip
    assert process.returncode == status, process.stderr
    commands = [call for call in calls(tmp_path) if not call.startswith("srun")]
    where = f"--distributed --run-dir {tmp_path}/run"
    assert commands[:2] == [
        f"bytelm doctor {where}", f"bytelm train megabyte_tiny --steps 9 {where}",
    ]  # fmt: skip
    assert commands[2:] == (["scontrol requeue 7"] if again else [])


def test_nothing_is_started_on_a_cluster_that_is_not_well(tmp_path, stand_in):
    stand_in("srun", 'shift; "$@"')
    stand_in("bytelm", "exit 1")
    (tmp_path / "bin" / "activate").write_text("")
    where = {"VENV": str(tmp_path), "RUN_DIR": f"{tmp_path}/run", "SLURM_JOB_ID": "7"}
    process = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "megabyte_tiny"],
        env=environment(tmp_path, **where), timeout=30, check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert not any("train" in call for call in calls(tmp_path))


def test_a_tpu_pod_starts_again_after_a_hang_and_keeps_words_whole(tmp_path, stand_in):
    stand_in("sleep", "")
    stand_in(
        "gcloud",
        f'case "$*" in *train*) [ -e {tmp_path}/once ] || {{ touch {tmp_path}/once; exit 75; }};; '
        "esac",
    )
    process = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "megabyte_tiny", "--data", "my books"],
        env=environment(tmp_path, TPU="pod", ZONE="here"), timeout=30, capture_output=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    on_hosts = (
        "gcloud compute tpus tpu-vm ssh pod --zone=here --worker=all --command=venv/bin/bytelm"
    )
    where = "--distributed --run-dir /mnt/shared/runs/pod"
    trains = rf"{on_hosts} train megabyte_tiny --data my\ books {where}"
    assert [call for call in calls(tmp_path) if call.startswith("gcloud")] == [
        f"{on_hosts} doctor {where}", trains, trains,
    ]  # fmt: skip


def jobset_container():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    host = f"{name}-{workers['name']}-0-0.{subdomain}"
    assert variables["COORDINATOR"].split(":")[0] == host
    assert job["parallelism"] == job["completions"] == int(variables["PODS"])
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    return container, variables


def test_a_pod_that_is_told_to_stop_says_that_it_is_unfinished(tmp_path, stand_in):
    container, variables = jobset_container()
    stand_in(
        "bytelm",
        f'[ "$1" = doctor ] && exit 0\ntrap "touch {tmp_path}/saved; exit 0" TERM\n'
        f"touch {tmp_path}/training\nfor i in $(seq 300); do sleep 0.1; done",
    )
    process = subprocess.Popen(
        [*container["command"], *container["args"]],
        env=environment(tmp_path, JOB_COMPLETION_INDEX="2", **variables),
    )
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "training").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        process.kill()
    assert (tmp_path / "saved").exists()
    processes = f"--coordinator {variables['COORDINATOR']} --num-processes 4 --process-id 2"
    assert calls(tmp_path) == [
        f"bytelm doctor {processes} --run-dir {variables['RUN_DIR']}",
        f"bytelm train megabyte_132m --batch-size 1024 --run-dir {variables['RUN_DIR']} "
        + processes,
    ]


@pytest.mark.parametrize("status", [0, 2, 75])
def test_a_pod_ends_as_its_run_does(tmp_path, stand_in, status):
    container, variables = jobset_container()
    stand_in("bytelm", f'[ "$1" = doctor ] || exit {status}')
    process = subprocess.run(
        [*container["command"], *container["args"]], timeout=30, check=False,
        env=environment(tmp_path, JOB_COMPLETION_INDEX="0", **variables),
    )  # fmt: skip
    assert process.returncode == status


def local_launcher():
    loader = importlib.machinery.SourceFileLoader("local", str(LAUNCH / "local"))
    spec = importlib.util.spec_from_loader("local", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


TRAIN = {"batch_size": 12, "accumulation_steps": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("left", "devices", "changes", "rows", "expected"),
    [
        (2, 1, {}, 4, (2, 2)),  # of three with 4 rows each
        (3, 1, {}, 3, (3, 2)),  # of four with 3 rows each
        (5, 1, {}, 2, (4, 3)),  # 12 rows do not divide among 5
        (3, 4, {"fsdp": 4}, 1, (3, 1)),
        (3, 4, {"fsdp": 8, "batch_size": 32}, 2, (2, 2)),
        (1, 4, {"tensor": 2, "accumulation_steps": 2}, 2, (1, 3)),
        (1, 2, {"fsdp": 4}, 9, None),
        (1, 8, {"batch_size": 12}, 9, None),
    ],
)
def test_fewer_processes_keep_the_batch_and_the_rows_of_a_device(
    left, devices, changes, rows, expected
):
    assert local_launcher().layout_on(left, devices, TRAIN | changes, rows) == expected


STAND_IN = """
import os, signal, sys, time
from pathlib import Path
folder, words = Path(sys.argv[sys.argv.index("--run-dir") + 1]), sys.argv[2:]
index = words[words.index("--process-id") + 1]
with open(folder / f"calls-{index}", "a") as file:
    file.write(" ".join(word for word in words if "127.0.0.1" not in word) + "\\n")
if words[words.index("--num-processes") + 1] == "3":
    if index == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(75)
"""


@pytest.mark.parametrize("elastic", [True, False])
def test_a_run_goes_on_with_the_processes_that_are_left(tmp_path, elastic):
    (tmp_path / "bytelm_jax").mkdir()
    (tmp_path / "bytelm_jax" / "__init__.py").write_text("")
    (tmp_path / "bytelm_jax" / "cli.py").write_text(STAND_IN)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"train": TRAIN}))
    command = [sys.executable, LAUNCH / "local", "3", "--cpu-devices", "1"]
    command += ["--elastic"] * elastic + ["--", "megabyte_tiny", "--run-dir", run]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    joining = "--coordinator --num-processes {} --process-id {}"
    options = f"megabyte_tiny --run-dir {run}"
    first = [f"{options} {joining.format(3, index)}" for index in range(3)]
    again = [f"{options} --accumulation-steps 2 {joining.format(2, index)}" for index in range(2)]
    calls = [(run / f"calls-{index}").read_text().splitlines() for index in range(3)]
    if elastic:
        assert done.returncode == 0, done.stderr
        assert calls == [[first[0], again[0]], [first[1], again[1]], [first[2]]]
        assert "1 of 3 processes were lost; starting again with 2, 2 micro" in done.stderr
    else:
        assert done.returncode in (9, 75) and calls == [[line] for line in first]
