"""What the processes of a run agree on before it begins, with real processes over loopback.

    python scripts/check/processes.py [--late SECONDS]

Starts runs of two processes of which the second differs in one thing: recipe, seed, data, mesh, the
version of a package, the library's own code. Both must end with status 2 within 30 seconds of
having joined and name the process and the field, and nothing may have been written. Then a run
whose second process starts 60 seconds late: it must join and train to the end. Then a mesh in which
the devices of both processes alternate, as a TPU's wires may ask for: rows with their dropout keys
must be those of one device. Then a run of three processes under `scripts/launch/local --elastic`,
one of which is killed: it must go on with two, and its losses be those of one device. Prints a line
for each; exit code 1 if one is wrong. Four minutes.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bytelm.metrics import read_metrics
from bytelm.tolerances import DEVICES_AFTER_5_STEPS

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 30.0
"""Seconds for all processes to notice, once all have joined."""

STARTING = 120.0
"""Seconds for them to join, which a busy machine needs for imports."""

RUN = [
    *("megabyte_tiny", "--model.patch-size", "4", "--model.global-dim", "32"),
    *("--model.local-dim", "32", "--model.global-layers", "1", "--model.local-layers", "1"),
    *("--model.global-heads", "2", "--model.local-heads", "2", "--model.max-length", "64"),
    *("--sequence-length", "64", "--batch-size", "8", "--steps", "4", "--eval-windows", "16"),
]
PLAIN = "import sys; from bytelm_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
OTHER_JAX = """
import importlib.metadata as m
known = m.version
m.version = lambda name: "0.0.1" if name == "flax" else known(name)
"""
OTHER_CODE = """
from pathlib import Path
known = Path.read_bytes
Path.read_bytes = lambda path: known(path) + b"#" * (path.name == "step.py")
"""
ALTERNATING = """
from bytelm_jax.training import topology
topology.arrange = lambda devices, sizes: topology._in_order(
    sorted(devices, key=lambda d: (d.id % 4, d.process_index)), sizes
)
"""


class Case(NamedTuple):
    """How the second process differs, and the beginning of the line that both must print."""

    name: str
    options: list[str]
    before: str
    says: str


class Process:
    """A process of `bytelm train` with four simulated devices, which first runs `before`."""

    def __init__(self, run_dir: Path, options: list[str], joining: list[str], before: str = ""):
        flags = "--xla_force_host_platform_device_count=4"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", before + PLAIN, "train", *RUN, *options, *joining]
        self._log = run_dir.with_name(f"{run_dir.name}{joining[-1:]}.txt")
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(
                [*command, "--run-dir", str(run_dir)],
                env=environment | {"XLA_FLAGS": flags}, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def text(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def finish(self, seconds: float) -> int | None:
        """Its status; None if it had to be killed."""
        try:
            return self._process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None


def joining() -> list[list[str]]:
    """The options by which each of two processes joins the other."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--coordinator", where, "--num-processes", "2", "--process-id"]
    return [[*options, str(index)] for index in (0, 1)]


def disagreeing(case: Case, folder: Path, data: list[str]) -> tuple[bool, str]:
    """Whether both processes end in time, with the right line, and nothing written."""
    ways, run_dir = joining(), folder / "run"
    both = (
        Process(run_dir, data, ways[0]),
        Process(run_dir, data + case.options, ways[1], case.before),
    )
    late = time.monotonic() + STARTING
    while "2 processes, 8 devices" not in both[0].text() and time.monotonic() < late:
        time.sleep(0.05)
    began = time.monotonic()
    ends = [each.finish(began + DEADLINE - time.monotonic()) for each in both]
    took = time.monotonic() - began
    start = f"bytelm train: {case.says}"
    lines = [[x for x in each.text().splitlines() if x.startswith(start)] for each in both]
    good = ends == [2, 2] and all(len(found) == 1 for found in lines) and not run_dir.exists()
    return good, f"{took:.1f} s: " + (lines[0][0] if good else _account(ends, both))


def late(folder: Path, data: list[str], seconds: float) -> tuple[bool, str]:
    """Whether a run whose second process comes late trains to its end."""
    ways, run_dir = joining(), folder / "run"
    first = Process(run_dir, data, ways[0])
    time.sleep(seconds)
    waited, began = first.runs(), time.monotonic()
    both = first, Process(run_dir, data, ways[1])
    ends = [each.finish(STARTING) for each in both]
    good = waited and ends == [0, 0] and (run_dir / "checkpoints" / "4").exists()
    says = "joined and trained" if good else _account(ends, both)
    return good, f"{time.monotonic() - began:.1f} s after {seconds:g} s: {says}"


def alternating(folder: Path, data: list[str]) -> tuple[bool, str]:
    """Whether a mesh that alternates between processes trains as one device does."""
    options = ["--model.dropout", "0.1", "--log-every", "1", *data]
    one = Process(folder / "one", [*options, "--devices", "1"], [])
    if ended := one.finish(STARTING):
        return False, _account([ended], (one,))
    worst = 0.0
    for form in ("jit", "shard_map"):
        ours = [*options, "--fsdp", "2", "--parallel", form]
        both = tuple(Process(folder / form, ours, way, ALTERNATING) for way in joining())
        ends = [each.finish(STARTING) for each in both]
        if ends != [0, 0]:
            return False, _account(ends, both)
        losses = [_losses(path) for path in (folder / form, folder / "one")]
        worst = max([worst, *(abs(a - b) / b for a, b in zip(*losses, strict=True))])
    return worst <= DEVICES_AFTER_5_STEPS, f"losses of 4 steps, both forms, to {worst:.1e}"


def elastic(folder: Path, data: list[str]) -> tuple[bool, str]:
    """Whether a run that loses one of three processes ends as it would have on one device."""
    options = [*RUN, *data, "--batch-size", "12", "--steps", "60", "--log-every", "1"]
    options += ["--eval-every", "0", "--checkpoint-every", "10"]
    one = Process(folder / "one", [*options[len(RUN) :], "--devices", "1"], [])
    if ended := one.finish(STARTING):
        return False, _account([ended], (one,))
    command = [sys.executable, str(ROOT / "scripts/launch/local"), "3", "--cpu-devices", "1"]
    command += ["--elastic", "--", *options, "--run-dir", str(folder / "three")]
    launcher = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log, late = folder / "three" / "metrics.jsonl", time.monotonic() + STARTING
    while not (log.exists() and len(log.read_bytes().splitlines()) > 15):
        if time.monotonic() > late or launcher.poll() is not None:
            launcher.terminate()
            return False, f"never trained: {launcher.communicate()[1][-300:]}"
        time.sleep(0.05)
    started = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(started[-1]), signal.SIGKILL)
    try:
        said = launcher.communicate(timeout=2 * STARTING)[1].strip()
    except subprocess.TimeoutExpired:
        launcher.terminate()
        return False, "did not end"
    ours, theirs = (_losses(folder / name) for name in ("three", "one"))
    if launcher.returncode or len(ours) != len(theirs):
        return False, f"{launcher.returncode}, {len(ours)} steps: {said[-300:]}"
    worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    return worst <= DEVICES_AFTER_5_STEPS, f"{said}; losses of 60 steps to {worst:.1e}"


def _account(ends: list[int | None], started: tuple[Process, ...]) -> str:
    """What went wrong: statuses and the last that each process said."""
    return f"{ends}, {[each.text()[-300:] for each in started]}"


def _losses(run_dir: Path) -> list[float]:
    return [
        record["loss"] for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record
    ]


def main() -> int:
    """Runs all cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--late", type=float, default=60, help="seconds (default 60)")
    seconds, wrong = parser.parse_args().late, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("text", "other"):
            (folder / name).write_bytes(f"{name} of a few words, again and again. ".encode() * 2000)
        data = ["--data", str(folder / "text")]
        cases = [
            Case("recipe", ["--lr", "0.5"], "", "optimizer.learning_rate=0.5 in process 1, "),
            Case("seed", ["--seed", "1"], "", "train.seed=1 in process 1, 0 in process 0"),
            Case("data", ["--data", str(folder / "other")], "", "data="),
            Case("order", ["--shuffle-seed", "7"], "", "data.shuffle_seed=7 in process 1, 0 in"),
            Case("mesh", ["--fsdp", "4"], "", "train.fsdp=4 in process 1, 1 in process 0"),
            Case("version", [], OTHER_JAX, 'flax="0.0.1" in process 1, '),
            Case("code", [], OTHER_CODE, "code="),
        ]
        checks = [(c.name, lambda at, c=c: disagreeing(c, at, data)) for c in cases]
        checks += [("alternating mesh", lambda at: alternating(at, data))]
        checks += [("elastic", lambda at: elastic(at, data))]
        checks += [("late process", lambda at: late(at, data, seconds))]
        for name, check in checks:
            at = folder / name
            at.mkdir()
            good, says = check(at)
            wrong += not good
            print(f"{'good ' if good else 'WRONG'} {name:16} {says}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
