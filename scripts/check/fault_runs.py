"""Fault-injection runs: processes killed, stopped, frozen, set against each other, files damaged.

    python scripts/check/fault_runs.py --trials 300 --workers 4

A trial starts `bytelm train` as one process or two, waits for a phase (compile, step, save,
evaluation) and does one of `FAULTS`: kills one process or all, sends SIGTERM or SIGINT, freezes
one, fills the disk, starts a second trainer on the same folder, or, once the run has been stopped,
damages a file of it. Where that ends a run, the same command has to continue from the newest
undamaged checkpoint, with the same layout to the same bits, with another to 1e-5. Two processes
that were started unlike each other have to refuse within 30 seconds and write nothing. No fault may
end in a traceback. Prints one line per trial; the status is 1 if one failed. Trial i depends on
--seed and i alone.

Processes are forked from one that has imported what they need, and share compiled programs; each
then calls what the command `bytelm` calls.
"""

import argparse
import atexit
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from bytelm.metrics import comparable, read_metrics
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import checkpoint
from bytelm_jax.training.processes import HUNG
from parity_tests.damage import VALUES, damage_bytes, damage_json

DEADLINE, GRACE, TIMEOUT, STEPS, EVERY, EVALUATES = 400.0, 150.0, 40, 40, 5, 20
REFUSAL = 30.0
"""Seconds within which a start that cannot be right has to end, on a quiet machine."""

PHASES = ("compile", "step", "save", "evaluation")
FAULTS = (
    "kill one", "kill all", "stop one", "freeze one", "full disk", "truncate",
    "kill", "stop", "full disk alone", "two writers", "disagree", "damage",
    "kill", "stop", "two writers", "disagree", "damage", "damage", "stop", "damage",
)  # fmt: skip
"""The first six hurt runs of two processes, the others of one."""

UNLIKE = ("--seed 1", "--lr 1e-3", "--batch-size 16", "--data OTHER", "--data NOWHERE", "--fsdp 2")
RUN = (
    "megabyte_tiny --model.patch-size 4 --model.global-dim 16 --model.local-dim 16 "
    "--model.global-layers 1 --model.local-layers 1 --model.global-heads 2 --model.local-heads 2 "
    "--model.max-length 64 --model.dropout 0.1 --sequence-length 64 --batch-size 8 "
    f"--warmup-steps 5 --log-every 1 --steps {STEPS} --checkpoint-every {EVERY} "
    f"--eval-every {EVALUATES} --eval-windows 256 --step-timeout {TIMEOUT}"
).split()

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["bytelm_jax.cli.main", "bytelm_jax.cli.run", "grain"])


def command(argv: list[str], devices: int, output: Path) -> None:
    """The body of a process of a run: what the command `bytelm` does."""
    pipe = os.open(output, os.O_WRONLY)
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, closefd=False)  # noqa: SIM115
    flags = f"--xla_force_host_platform_device_count={devices}"
    # Small programs that run for seconds: most of a trial would be their optimisation.
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    from bytelm_jax.cli import main as cli

    status = cli.main(argv)
    sys.stdout.flush()
    atexit._run_exitfuncs()  # multiprocessing leaves out what the interpreter does at its end
    os._exit(status)


class Run:
    """`bytelm train` over `processes` processes of `devices` devices each.

    `unlike` are options of the last process alone.
    """

    def __init__(
        self, run_dir: Path, data: Path, processes: int, devices: int, unlike: tuple[str, ...] = ()
    ) -> None:
        # A pipe, since the disk is to be full for the run and not for this script.
        self.run_dir, self.output = run_dir, b""
        pipe = Path(tempfile.mkdtemp(dir=run_dir.parent)) / "output"
        os.mkfifo(pipe)
        self._reader = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._reader.start()
        with socket.create_server(("127.0.0.1", 0)) as probe:
            where = f"127.0.0.1:{probe.getsockname()[1]}"
        self.processes = []
        for index in range(processes):
            argv = ["train", *RUN, "--data", str(data), "--run-dir", str(run_dir)]
            if index and index == processes - 1:
                argv = [*(["train", *RUN] if "--data" in unlike else argv), *unlike]
                argv += ["--run-dir", str(run_dir)] if "--data" in unlike else []
            if processes > 1:
                argv += ["--coordinator", where, "--num-processes", str(processes)]
                argv += ["--process-id", str(index)]
            self.processes.append(FORKS.Process(target=command, args=(argv, devices, pipe)))
            self.processes[-1].start()

    def _read(self, pipe: Path) -> None:
        with pipe.open("rb", buffering=0) as file:
            while piece := file.read(2**16):
                self.output += piece

    def text(self) -> str:
        """What it has printed."""
        return self.output.decode(errors="replace")

    def workers(self) -> list[int]:
        """The process ids of those that run, in order."""
        return [p.pid for p in self.processes if p.is_alive() and p.pid]

    def finish(self) -> list[int]:
        """The statuses; the processes of a run that hangs are killed, with status -9."""
        deadline, given = time.monotonic() + DEADLINE, False
        while self.workers() and time.monotonic() < deadline:
            if not given and any(p.exitcode for p in self.processes):
                # As launchers do: one process has failed, the others get a while to notice.
                deadline, given = time.monotonic() + GRACE, True
            time.sleep(0.05)
        late = [process for process in self.processes if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        self._reader.join(5)
        return [-signal.SIGKILL if p in late else p.exitcode or 0 for p in self.processes]

    def wait_for(self, phase: str, mark: int, chance: random.Random) -> None:
        """Until the run is in `phase`, which for all but the first comes after step `mark`."""
        log, checkpoints = self.run_dir / "metrics.jsonl", self.run_dir / "checkpoints"
        if phase == "evaluation":
            mark = EVALUATES
        deadline = time.monotonic() + DEADLINE
        while self.workers() and time.monotonic() < deadline:
            steps = [r["step"] for r in read_metrics(log)] if log.exists() else []
            if phase == "compile" and (self.run_dir / "config.json").exists():
                break
            late = any(step >= mark for step in steps) and phase != "compile"
            if late and (
                phase != "save" or any("tmp" in path.name for path in checkpoints.iterdir())
            ):
                break
            time.sleep(0.001)
        time.sleep(chance.random() * {"compile": 2.0, "evaluation": 0.3}.get(phase, 0.02))


def steps_on_disk(run_dir: Path) -> list[int]:
    """The checkpoints that stand there whole, in order."""
    checkpoints = run_dir / "checkpoints"
    paths = checkpoints.iterdir() if checkpoints.exists() else ()
    return sorted(int(path.name) for path in paths if path.name.isdigit())


def inject(run: Run, fault: str, chance: random.Random) -> None:
    """Does it."""
    workers = run.workers()
    if fault.startswith("full disk"):
        for worker in workers:  # no file may grow beyond this: writes fail as on a full disk
            resource.prlimit(worker, resource.RLIMIT_FSIZE, (4096, 4096))
        return
    number = {"stop one": signal.SIGTERM, "freeze one": signal.SIGSTOP}.get(fault, signal.SIGKILL)
    if fault in ("stop", "damage"):
        number = chance.choice((signal.SIGTERM, signal.SIGINT))
    alone = fault in ("kill one", "stop one", "freeze one")
    for worker in [chance.choice(workers)] if alone and workers else workers:
        os.kill(worker, number)


def damage(run_dir: Path, fault: str, chance: random.Random) -> str:
    """Damages one file of the run folder; says which."""
    newest = run_dir / "checkpoints" / str(steps_on_disk(run_dir)[-1])
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    if fault == "truncate":
        victim = max(files, key=lambda path: path.stat().st_size)
        os.truncate(victim, victim.stat().st_size // 2)
        return victim.name
    others = [run_dir / "config.json", run_dir / "metrics.jsonl"]
    victim = chance.choice([chance.choice(files), chance.choice(others)])
    data = victim.read_bytes()
    as_json = victim.suffix == ".json" and chance.random() < 0.5
    victim.write_bytes(damage_json(data, chance, VALUES) if as_json else damage_bytes(data, chance))
    return victim.name


def outcome(run_dir: Path) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Parameters and metrics of a finished run, wall-clock fields left out."""
    _, params, step = checkpoint.load_run(run_dir)
    assert step == STEPS, f"ended at step {step}"
    records = read_metrics(run_dir / "metrics.jsonl")
    return {k: np.asarray(v) for k, v in params.items()}, comparable(records)


def compare(run_dir: Path, intact: Path, same_layout: bool) -> str:
    """What differs, or nothing."""
    (ours, records), (theirs, expected) = outcome(run_dir), outcome(intact)
    if same_layout:
        bits = all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
        return ("" if bits else "other bits; ") + ("" if records == expected else "other metrics; ")
    worst = max(relative_error(ours[name], theirs[name]) for name in theirs)
    return "" if worst <= 1e-5 else f"off by {worst:.1e}; "


def refused(run: Run, statuses: list[int], seconds: float) -> str:
    """What is wrong with how a start was refused: status 2, one line a process, at once."""
    lines = [line for line in run.text().splitlines() if line.startswith("bytelm train: ")]
    lines = [line for line in lines if " processes, " not in line]
    wrong = "" if all(status == 2 for status in statuses) else f"statuses {statuses}; "
    wrong += "" if len(lines) == len(statuses) else f"{len(lines)} lines; "
    return wrong + ("" if seconds < REFUSAL else f"only after {seconds:.0f} s; ")


def disagreement(index: int, chance: random.Random, folder: Path, data: Path) -> dict[str, Any]:
    """Two processes that were started unlike each other."""
    begun, unlike = time.monotonic(), chance.choice(UNLIKE)
    words = unlike.replace("OTHER", str(folder / "other.txt")).replace("NOWHERE", "/nowhere")
    run = Run(folder / f"trial{index}", data, 2, 2, tuple(words.split()))
    statuses = run.finish()
    wrong = refused(run, statuses, time.monotonic() - begun)
    wrong += "wrote something; " if run.run_dir.exists() else ""
    return {"fault": "disagree", "what": unlike, "status": statuses, "wrong": wrong, "run": run}


def trial(index: int, seed: int, folder: Path, data: Path, intact: Path) -> dict[str, Any]:
    """One run, with its fault, resumed; "wrong" says what was."""
    chance, begun = random.Random(f"{seed} {index}"), time.monotonic()
    fault = FAULTS[index % len(FAULTS)]
    if fault == "disagree":
        report = disagreement(index, chance, folder, data)
    else:
        report = hurt(index, fault, chance, folder, data, intact)
    run = report.pop("run")
    report["wrong"] += "traceback; " if "Traceback (most" in run.text() else ""
    report["output"] = run.text()
    return {"trial": index, **report, "seconds": round(time.monotonic() - begun)}


def hurt(
    index: int, fault: str, chance: random.Random, folder: Path, data: Path, intact: Path
) -> dict[str, Any]:
    """A run that is hurt and then goes on."""
    layout = (2, 2) if FAULTS.index(fault) < FAULTS.index("kill") else (1, 4)
    phase = "step" if fault in ("freeze one", "truncate", "damage") else chance.choice(PHASES)
    phase = "step" if fault == "two writers" else phase
    mark, run_dir = chance.randint(2 * EVERY + 1, STEPS - 8), folder / f"trial{index}"
    run, wrong = Run(run_dir, data, *layout), ""
    run.wait_for(phase, mark, chance)
    if fault == "two writers":
        for worker in run.workers():  # or the second comes when all is over
            os.kill(worker, signal.SIGSTOP)
        second, now = Run(run_dir, data, *layout), time.monotonic()
        other, took = second.finish(), time.monotonic() - now
        for worker in run.workers():
            os.kill(worker, signal.SIGCONT)
        late = "done: step" in run.text()
        wrong += "" if late else refused(second, other, took)
        statuses = run.finish()
        wrong += "" if statuses == [0] else f"status {statuses}; "
        wrong += compare(run_dir, intact, False)
        what = "came too late" if late else f"refused after {took:.0f} s"
        return {"fault": fault, "what": what, "status": statuses, "wrong": wrong, "run": run}
    inject(run, fault, chance)
    statuses, whole, what = run.finish(), steps_on_disk(run_dir), ""
    early = "done: step" in run.text()  # the fault came when all was over
    wrong += judged(run, fault, statuses, early)
    newest = whole[-1] if whole else 0
    if fault in ("truncate", "damage") and len(whole) > 1:
        what = damage(run_dir, fault, chance)
        newest = whole[-2] if fault == "truncate" else -1
    same = chance.random() < 0.7
    other = chance.choice(((1, 4), (1, 1), (2, 1)) if layout == (2, 2) else ((1, 1), (2, 2)))
    again = Run(run_dir, data, *(layout if same else other))
    wrong += went_on(again, fault, what, newest, (run_dir, intact, same and layout == (2, 2)))
    run.output += again.output
    return {
        "fault": fault, "phase": phase, "status": statuses, "what": what, "goes on from": newest,
        "layout": "same" if same else "other", "wrong": wrong, "run": run,
    }  # fmt: skip


def judged(run: Run, fault: str, statuses: list[int], early: bool) -> str:
    """What is wrong with how the hurt run ended."""
    stopped = fault in ("stop one", "stop", "damage", "truncate") or early
    allowed = (0,) if stopped and fault != "truncate" else (0, 1, HUNG, -signal.SIGKILL)
    allowed = (*allowed, 2) if fault.startswith("full disk") else allowed
    wrong = "" if all(status in allowed for status in statuses) else f"status {statuses}; "
    if not stopped and not any(statuses):
        wrong += "status 0; "
    if fault == "freeze one" and not early and not (
        HUNG in statuses
        and re.search(r"no progress for .*: process [01] \(host .*\) last", run.text())
    ):  # fmt: skip
        wrong += "the frozen process was not named; "
    return wrong


def went_on(again: Run, fault: str, what: str, newest: int, runs: tuple[Path, Path, bool]) -> str:
    """What is wrong with the run that followed; newest is -1 where the damage decides."""
    run_dir, statuses = runs[0], again.finish()
    kept = steps_on_disk(run_dir)
    if fault == "damage" and set(statuses) == {2}:  # refused: all has to stand there as it was
        return refused(again, statuses, 0) + ("" if kept else "checkpoints are lost; ")
    if any(statuses):
        return f"could not go on: {statuses}; "
    text, wrong = again.text(), ""
    resumed = re.search(r"(?:resuming|training) \S+ in .*, step (\d+)", text)
    if newest >= 0 and (not resumed or int(resumed[1]) != newest):
        wrong += f"continued from {resumed and resumed[1]}, not {newest}; "
    if fault == "truncate" and what and "is now" not in text:
        wrong += "the damaged checkpoint was not reported; "
    # Lines of metrics that were damaged are kept aside, and are no longer among the others.
    return wrong + compare(run_dir, runs[1], runs[2] and fault != "damage")


def main() -> int:
    """Prints one line per trial and the sums."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1, help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="TRIAL", help="of all the trials")
    options = parser.parse_args()
    counts, chosen = Counter[tuple[str, bool]](), options.only or range(options.trials)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.workers) as pool:
        os.environ |= {
            "TMPDIR": place,
            "JAX_COMPILATION_CACHE_DIR": f"{place}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        folder, source = Path(place), random.Random(5)
        words = ["".join(source.choices("abcdefgh", k=source.randint(2, 7))) for _ in range(50)]
        for name in ("text.txt", "other.txt"):
            (folder / name).write_text(" ".join(source.choices(words, k=30_000)))
        data = folder / "text.txt"
        intact = Run(folder / "intact", data, 2, 2)
        assert intact.finish() == [0, 0], intact.text()
        jobs = [
            pool.submit(trial, i, options.seed, folder, data, folder / "intact") for i in chosen
        ]
        for job in jobs:
            report = job.result()
            output = report.pop("output")
            counts[report["fault"], not report["wrong"]] += 1
            print(json.dumps(report), flush=True)
            if report["wrong"]:
                print(output[-3000:], file=sys.stderr, flush=True)
    for (fault, good), count in sorted(counts.items()):
        print(f"{fault:16} {'as it should be' if good else 'WRONG':16} {count:4}")
    good = sum(count for (_, good), count in counts.items() if good)
    print(f"{good} of {len(chosen)} as they should be")
    return 0 if good == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
