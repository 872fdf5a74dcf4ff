"""The scripts that start runs on clusters, with stand-ins for the clusters' own commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bytelm import elastic, recipes
from bytelm.config import TrainConfig
from bytelm.config.serialize import recipe_text
from bytelm.elastic import layout_on, next_layout
from bytelm.train_options import run_folder

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


SRUN = 'while [[ "$1" == --* ]]; do shift; done; "$@"'
JOB = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_NODELIST": "[a-b]",
}  # fmt: skip


def environment(tmp_path, **more):
    """With the stand-ins, and this interpreter as `python`, first on the PATH."""
    path = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return dict(os.environ) | {"PATH": path, "PYTHONPATH": str(LAUNCH.parent.parent)} | more


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
    stand_in("srun", SRUN)
    stand_in("scontrol", "")
    stand_in("sinfo", 'printf "a alloc\\nb mix\\n"')
    stand_in("bytelm", f'if [ "$1" = train ]; then {ends}; fi')
    (tmp_path / "bin" / "activate").write_text("")
    process = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "megabyte_tiny", "--steps", "9"],
        env=environment(
            tmp_path, VENV=str(tmp_path), RUN_DIR=f"{tmp_path}/run",
            SLURM_RESTART_COUNT=restarts, **JOB,
        ),
        capture_output=True, timeout=30,
    )  # fmt: skip
    assert process.returncode == status, process.stderr
    commands = [call for call in calls(tmp_path) if call.split()[0] in ("bytelm", "scontrol")]
    where = f"--distributed --run-dir {tmp_path}/run"
    assert commands[:2] == [
        f"bytelm doctor {where}", f"bytelm train megabyte_tiny --steps 9 {where}",
    ]  # fmt: skip
    assert commands[2:] == (["scontrol requeue 7"] if again else [])


def test_slurm_goes_on_with_the_nodes_that_are_left(tmp_path, stand_in):
    """Node b of three fails; of two nodes with 4 processes each, 12 rows each take 3 at a time."""
    run = tmp_path / "run"
    fails = f"[ -e {tmp_path}/lost ] || {{ touch {tmp_path}/lost; exit 1; }}"
    stand_in("srun", SRUN)
    stand_in("sinfo", 'printf "a alloc\\na alloc\\nb down*\\nc mix\\n"')
    stand_in("bytelm", f'if [ "$1" = train ]; then {fails}; echo "done: step 9"; fi')
    (tmp_path / "bin" / "activate").write_text("")
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"train": TRAIN | {"batch_size": 96}}))
    job = JOB | {"SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "[a-c]"}
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "megabyte_tiny"],
        env=environment(tmp_path, VENV=str(tmp_path), RUN_DIR=str(run), **job),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    where = f"--distributed --run-dir {run}"
    srun, two = "srun --kill-on-bad-exit=0", "--nodes=2 --ntasks=8 --nodelist=a,c"
    assert [call for call in calls(tmp_path) if call.startswith("srun")] == [
        f"{srun} bytelm doctor {where}", f"{srun} bytelm train megabyte_tiny {where}",
        f"{srun} {two} bytelm train megabyte_tiny --accumulation-steps 2 {where}",
    ]  # fmt: skip
    assert "2 of 3 nodes are left: starting again on 2, 2 micro-batches" in done.stdout


def test_nothing_is_started_on_a_cluster_that_is_not_well(tmp_path, stand_in):
    stand_in("srun", SRUN)
    stand_in("bytelm", "exit 1")
    (tmp_path / "bin" / "activate").write_text("")
    where = JOB | {"VENV": str(tmp_path), "RUN_DIR": f"{tmp_path}/run"}
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
        "*state*) echo READY;; *acceleratorType*) echo v5litepod-16;; esac",
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
    assert [call for call in calls(tmp_path) if " ssh " in call] == [
        f"{on_hosts} doctor {where}", trains, trains,
    ]  # fmt: skip


def test_a_tpu_run_whose_slice_is_lost_goes_on_with_the_next(tmp_path, stand_in):
    """A v5e of 16 chips is preempted: on the 8 of a v4-16, two micro-batches take the rows."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"train": TRAIN | {"batch_size": 64}}))
    stand_in("sleep", "")
    stand_in("python", f'exec {sys.executable} "$@"')
    stand_in("bytelm", "")
    stand_in(
        "gcloud",
        f"""case "$*" in
        *"describe big"*state*) [ -e {tmp_path}/lost ] && echo PREEMPTED || echo READY;;
        *"describe small"*state*) echo READY;;
        *"describe big"*) echo v5litepod-16;;
        *"describe small"*) echo v4-16;;
        *"ssh big"*train*) touch {tmp_path}/lost; exit 255;;
        *ssh*) for word; do case $word in --command=*) bash -c "${{word#--command=}}";; esac; done;;
        esac""",
    )
    done = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh", "megabyte_tiny"],
        env=environment(tmp_path, TPU="big small", ZONE="here", RUN_DIR=str(run), VENV=".")
        | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
        cwd=tmp_path, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [call for call in calls(tmp_path) if call.startswith("bytelm train")] == [
        f"bytelm train megabyte_tiny --accumulation-steps 2 --distributed --run-dir {run}"
    ]


def jobset_container():
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {each["name"]: each.get("value", "first") for each in container["env"]}
    name, subdomain = jobset["metadata"]["name"], jobset["spec"]["network"]["subdomain"]
    assert (variables["HOSTS"], variables["SERVICE"]) == (f"{name}-{workers['name']}-0-", subdomain)
    assert job["parallelism"] == job["completions"] == int(variables["PODS"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    return container, variables


def pod_process(tmp_path, index, **more):
    """One pod of the jobset; the run folder is in `tmp_path`."""
    container, variables = jobset_container()
    own = variables | {"JOB_COMPLETION_INDEX": str(index), "RUN_DIR": f"{tmp_path}/run"}
    return subprocess.Popen(
        [*container["command"], *container["args"]], env=environment(tmp_path, **own | more)
    )


def test_a_pod_that_is_told_to_stop_says_that_it_is_unfinished(tmp_path, stand_in):
    stand_in(
        "bytelm",
        f'[ "$1" = doctor ] && exit 0\ntrap "touch {tmp_path}/saved; exit 0" TERM\n'
        f"touch {tmp_path}/training\nfor i in $(seq 300); do sleep 0.1; done",
    )
    process = pod_process(tmp_path, 0, PODS="1")
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "training").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    finally:
        process.kill()
    assert (tmp_path / "saved").exists()
    processes = "--coordinator bytelm-workers-0-0.bytelm:8476 --num-processes 1 --process-id 0"
    assert calls(tmp_path) == [
        f"bytelm doctor {processes} --run-dir {tmp_path}/run",
        f"bytelm train megabyte_132m --batch-size 1024 --run-dir {tmp_path}/run {processes}",
    ]


@pytest.mark.parametrize("status", [0, 2])
def test_a_pod_ends_as_its_run_does(tmp_path, stand_in, status):
    stand_in("bytelm", f'[ "$1" = doctor ] || exit {status}')
    assert pod_process(tmp_path, 0, PODS="1").wait(30) == status


def test_pods_go_on_without_one_that_stays_away(tmp_path, stand_in):
    """Of three pods, number 0 is missing; one that comes later makes all start again."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"train": TRAIN | {"batch_size": 48}}))
    stand_in("bytelm", "")
    sizes = {"PODS": "3", "GPUS": "2", "WAIT": "2"}
    started = [pod_process(tmp_path, index, **sizes) for index in (1, 2)]
    assert [process.wait(60) for process in started] == [0, 0]
    assert pod_process(tmp_path, 0, **sizes).wait(60) == 75
    processes = "--coordinator bytelm-workers-0-1.bytelm:8476 --num-processes 2 --process-id {}"
    trains = f"bytelm train megabyte_132m --batch-size 1024 --run-dir {tmp_path}/run "
    found = sorted(call for call in calls(tmp_path) if call.startswith("bytelm train"))
    assert found == [trains + f"--accumulation-steps 2 {processes.format(i)}" for i in (0, 1)]


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
    train = TrainConfig(**TRAIN | changes)
    assert layout_on(left, devices, train, rows, train.accumulation_steps) == expected


def test_a_layout_is_found_for_runs_of_earlier_versions(tmp_path):
    """They lack fields, which have their defaults."""
    (tmp_path / "config.json").write_text('{"train": {"batch_size": 12}}')
    assert next_layout(tmp_path, before=3, left=2) == (2, 2)


@pytest.mark.parametrize(
    ("config", "record", "options", "says"),
    [
        (None, None, [], "config.json: is not there; the run has not begun"),
        ("{", None, [], "config.json: not JSON ("),
        ("[]", None, [], "config.json: is no recipe"),
        ('{"train": {"batch_size": 0}}', None, [], "batch_size=0: must be at least 1"),
        ("{}", "{}", [], "config.json: is no recipe"),
        ('{"train": {}}', "{}", [], "elastic.json: is no record of a layout; remove it"),
        ('{"train": {}}', None, ["--before", "0"], "before=0: must be at least 1"),
        ('{"train": {}}', None, ["--devices", "0"], "devices=0: must be at least 1"),
    ],
)
def test_what_gives_no_layout_is_one_line(tmp_path, capsys, config, record, options, says):
    for name, text in (("config.json", config), ("elastic.json", record)):
        if text is not None:
            (tmp_path / name).write_text(text)
    asked = ["layout", str(tmp_path), "--before", "3", "--left", "2", *options]
    assert elastic.main(asked) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("elastic: ") and says in line


def test_pods_whose_numbers_do_not_fit_do_not_meet(tmp_path, capsys):
    for index, total, seconds in ((2, 2, "1"), (-1, 2, "1"), (0, 1, "nan")):
        asked = ["meet", str(tmp_path / "m"), f"--index={index}", "--total", str(total)]
        assert elastic.main([*asked, "--host", "a", "--seconds", seconds]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_the_folder_of_an_elastic_run_is_the_one_that_it_trains_in(tmp_path):
    (tmp_path / "first" / "checkpoints").mkdir(parents=True)
    (tmp_path / "first" / "config.json").write_bytes(recipe_text(recipes.get("megabyte_tiny")))
    (tmp_path / "mine.json").write_text('{"base": "megabyte_tiny", "name": "mine"}')
    for options, folder in [
        (["megabyte_tiny"], "runs/megabyte_tiny"),
        (["megabyte_tiny", "--run_dir=there"], "there"),
        ([str(tmp_path / "first")], f"{tmp_path}/first"),
        ([str(tmp_path / "mine.json")], "runs/mine"),
        (["--branch-from", "x@3", "--save_path", "there"], "there"),
    ]:
        assert run_folder(options) == Path(folder)


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        (["megabyte_tiny", "--run-dir", "gs://bucket/run"], "run_dir=gs://bucket/run: fewer"),
        (["megabyte_tiny", "--run-dir"], "--run-dir: needs a value"),
    ],
)
def test_an_elastic_run_that_cannot_be_is_refused(rest, says, tmp_path):
    command = [sys.executable, LAUNCH / "local", "2", "--elastic", "--", *rest]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert says in line


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
        command, cwd=tmp_path, 
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{LAUNCH.parent.parent}"},
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
