"""Fault-injection runs: two processes, killed or damaged, resumed, and compared with a whole run.

    python scripts/check/fault_runs.py --trials 50 --workers 2

A trial starts `bytelm train` as two processes with two simulated devices each, waits for a phase
(compile, step, save, evaluation), and kills one process or both, sends SIGTERM to one, freezes one,
fills the disk, or cuts the newest checkpoint short. The same command then has to continue from
the newest undamaged checkpoint, with the same layout to the same bits, with another to 1e-5. Prints
one line per trial; the status is 1 if one failed. Trial i depends on --seed and i alone.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bytelm.metrics import WALL_CLOCK, read_metrics
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import checkpoint
from bytelm_jax.training.processes import HUNG

LAUNCH = Path(__file__).parents[1] / "launch" / "local"
DEADLINE, TIMEOUT, STEPS, EVERY, EVALUATES = 400.0, 40, 40, 5, 20
PHASES = ("compile", "step", "save", "evaluation")
FAULTS = ("kill one", "kill all", "stop one", "freeze one", "full disk", "truncate")
RUN = (
    "megabyte_tiny --model.patch-size 4 --model.global-dim 16 --model.local-dim 16 "
    "--model.global-layers 1 --model.local-layers 1 --model.global-heads 2 --model.local-heads 2 "
    "--model.max-length 64 --model.dropout 0.1 --sequence-length 64 --batch-size 8 "
    f"--warmup-steps 5 --log-every 1 --steps {STEPS} --checkpoint-every {EVERY} "
    f"--eval-every {EVALUATES} --eval-windows 256 --step-timeout {TIMEOUT}"
).split()


class Run:
    """`bytelm train` over `processes` processes of `devices` devices each."""

    def __init__(self, run_dir: Path, data: Path, processes: int, devices: int) -> None:
        self.run_dir, self.log = run_dir, run_dir.with_suffix(".log")
        command = [sys.executable, str(LAUNCH), str(processes), "--cpu-devices", str(devices)]
        command += ["--", *RUN, "--data", str(data), "--run-dir", str(run_dir)]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def workers(self) -> list[int]:
        """The process ids of the run, in order."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return sorted(map(int, path.read_text().split())) if path.exists() else []

    def finish(self) -> int:
        """The status; a run that hangs is killed, with status -9."""
        try:
            return self.process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            for worker in self.workers():
                os.kill(worker, signal.SIGKILL)
            self.process.wait()
            return -9

    def wait_for(self, phase: str, mark: int, chance: random.Random) -> None:
        """Until the run is in `phase`, which for all but the first comes after step `mark`."""
        log, checkpoints = self.run_dir / "metrics.jsonl", self.run_dir / "checkpoints"
        if phase == "evaluation":
            mark = EVALUATES
        deadline = time.monotonic() + DEADLINE
        while self.process.poll() is None and time.monotonic() < deadline:
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
    if fault == "full disk":
        for worker in workers:  # no file may grow beyond this: writes fail as on a full disk
            resource.prlimit(worker, resource.RLIMIT_FSIZE, (4096, 4096))
        return
    number = {"stop one": signal.SIGTERM, "freeze one": signal.SIGSTOP}.get(fault, signal.SIGKILL)
    alone = fault in ("kill one", "stop one", "freeze one")
    for worker in [chance.choice(workers)] if alone and workers else workers:
        os.kill(worker, number)


def outcome(run_dir: Path) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Parameters and metrics of a finished run, wall-clock fields left out."""
    _, params, step = checkpoint.load_run(run_dir)
    assert step == STEPS, f"ended at step {step}"
    records = read_metrics(run_dir / "metrics.jsonl")
    comparable = [{k: v for k, v in r.items() if k not in WALL_CLOCK} for r in records]
    return {k: np.asarray(v) for k, v in params.items()}, comparable


def compare(run_dir: Path, intact: Path, same_layout: bool) -> str:
    """What differs, or nothing."""
    (ours, records), (theirs, expected) = outcome(run_dir), outcome(intact)
    if same_layout:
        bits = all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
        return ("" if bits else "other bits; ") + ("" if records == expected else "other metrics; ")
    worst = max(relative_error(ours[name], theirs[name]) for name in theirs)
    return "" if worst <= 1e-5 else f"off by {worst:.1e}; "


def trial(index: int, seed: int, folder: Path, data: Path, intact: Path) -> dict[str, Any]:
    """One run, with its fault, resumed; "wrong" says what was."""
    chance, begun = random.Random(f"{seed} {index}"), time.monotonic()
    fault = FAULTS[index % len(FAULTS)]
    phase = "step" if fault in ("freeze one", "truncate") else chance.choice(PHASES)
    mark, run_dir = chance.randint(2 * EVERY + 1, STEPS - 8), folder / f"trial{index}"
    run = Run(run_dir, data, 2, 2)
    run.wait_for(phase, mark, chance)
    inject(run, fault, chance)
    status = run.finish()
    log, wrong, whole = run.log.read_text(), "", steps_on_disk(run_dir)
    early = re.search(r"done: step", log)  # the fault came when all was over
    expected = (0,) if fault == "stop one" or early else tuple(range(1, 256))
    if status not in expected:
        wrong += f"status {status}; "
    if fault == "freeze one" and not early and not (
        status == HUNG and re.search(r"no progress for .*: process [01] \(host .*\) last", log)
    ):  # fmt: skip
        wrong += "the frozen process was not named; "
    newest = whole[-1] if whole else 0
    if fault == "truncate" and len(whole) > 1:
        files = [p for p in (run_dir / "checkpoints" / str(newest)).rglob("*") if p.is_file()]
        victim = max(files, key=lambda path: path.stat().st_size)
        os.truncate(victim, victim.stat().st_size // 2)
        newest = whole[-2]
    same = chance.random() < 0.7
    again = Run(run_dir, data, *((2, 2) if same else chance.choice(((1, 4), (1, 1), (2, 1)))))
    if again.finish():
        wrong += "could not go on; "
    else:
        second_log = again.log.read_text()[len(log) :]
        resumed = re.search(r"(?:resuming|training) \S+ in .*, step (\d+)", second_log)
        if not resumed or int(resumed[1]) != newest:
            wrong += f"continued from {resumed and resumed[1]}, not {newest}; "
        if fault == "truncate" and "is now" not in second_log:
            wrong += "the damaged checkpoint was not reported; "
        wrong += compare(run_dir, intact, same)
    return {
        "trial": index, "fault": fault, "phase": phase, "status": status, "goes on from": newest,
        "layout": "same" if same else "other", "seconds": round(time.monotonic() - begun),
        "wrong": wrong,
    }  # fmt: skip


def main() -> int:
    """Prints one line per trial and the sum."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1, help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", metavar="TRIAL", help="of all the trials")
    options = parser.parse_args()
    # Small programs that run for seconds: most of a trial would be their optimisation.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    good, chosen = 0, options.only or range(options.trials)
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.workers) as pool:
        folder, source = Path(place), random.Random(5)
        words = ["".join(source.choices("abcdefgh", k=source.randint(2, 7))) for _ in range(50)]
        data = folder / "text.txt"
        data.write_text(" ".join(source.choices(words, k=30_000)))
        intact = Run(folder / "intact", data, 2, 2)
        assert intact.finish() == 0, intact.log.read_text()
        jobs = [
            pool.submit(trial, i, options.seed, folder, data, folder / "intact") for i in chosen
        ]
        for job in jobs:
            trial_report = job.result()
            good += not trial_report["wrong"]
            print(json.dumps(trial_report), flush=True)
            if trial_report["wrong"]:
                print(
                    (folder / f"trial{trial_report['trial']}.log").read_text()[-3000:],
                    file=sys.stderr,
                )
    print(f"{good} of {len(chosen)} as they should be")
    return 0 if good == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
