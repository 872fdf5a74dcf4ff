"""A mixture on 1 to 8 devices, and killed ten times: the same bytes. Prints one line per finding.

    python scripts/check/mixture.py [--kills 10]

Each number of simulated devices trains the same mixture, and must have
the losses of one device to 1e-5. One more run is killed (SIGKILL) at steps drawn at random and
started again, on another number of devices each time; every process writes down what it feeds its
devices. Where a step was fed twice, since its first process died before a checkpoint, both must be
equal, and all steps must be those of the run on one device that was never killed: ids, in every
byte, and the source of every row. Its losses have to agree to 1e-5 as well.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

STEPS, EVERY = 120, 4
RUN = (
    "megabyte_tiny --model.patch-size 4 --model.global-dim 8 --model.local-dim 8 "
    "--model.global-layers 1 --model.local-layers 1 --model.global-heads 1 --model.local-heads 1 "
    "--model.max-length 32 --sequence-length 32 --batch-size 8 --eval-windows 8 --log-every 1 "
    f"--steps {STEPS} --checkpoint-every {EVERY} --eval-every 0 --keep-last 1 --keep-best 0"
)
DEVICES = (1, 2, 4, 8)
XLA = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
LONGEST = 900  # seconds of a run
BOUND = 1e-5


def watched(output: str, argv: list[str]) -> int:
    """What `bytelm` does with `argv`; each batch that is fed is written to `output` as well."""
    from bytelm_jax.cli.main import main as bytelm
    from bytelm_jax.training import loop

    real = loop.training_batches

    def training_batches(windows, batch_size, seed, start, *rest):
        for step, batch in enumerate(real(windows, batch_size, seed, start, *rest), start + 1):
            assert batch.sources is not None
            digest = hashlib.sha256(batch.ids.tobytes() + batch.sources.tobytes()).hexdigest()
            with open(output, "a") as file:
                file.write(f"{step} {digest}\n")
            yield batch

    loop.training_batches = training_batches
    return bytelm(argv)


def start(folder: Path, run: Path, devices: int) -> subprocess.Popen[bytes]:
    """A trainer of the mixture in the run folder `run`, which dies with this script."""
    argv = ["train", *RUN.split(), "--devices", str(devices), "--run-dir", str(run)]
    argv += ["--data", f"web={folder}/web.jsonl", f"code={folder}/code.jsonl.gz"]
    argv += ["--weights", "web=0.7", "code=0.3"]
    flags = f"{XLA} --xla_force_host_platform_device_count={devices}"
    command = ["setpriv", "--pdeathsig", "KILL", "--", sys.executable, __file__, "--watched"]
    with open(f"{run}.log", "ab") as log:
        return subprocess.Popen(
            [*command, f"{run}.fed", *argv],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=log,
            stderr=log,
        )


def losses(run: Path) -> dict[int, float]:
    """The loss of each step, and of each source in it."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def fed(run: Path) -> dict[int, set[str]]:
    """The digests of what was fed at each step."""
    steps: dict[int, set[str]] = {}
    for line in Path(f"{run}.fed").read_text().splitlines():
        step, digest = line.split()
        steps.setdefault(int(step), set()).add(digest)
    return {step: digests for step, digests in steps.items() if step <= STEPS}


def off(run: Path, other: Path) -> float:
    """The largest relative difference of the losses of two runs; infinite if a step is missing."""
    ours, theirs = losses(run), losses(other)
    if ours.keys() != theirs.keys() or len(ours) != STEPS:
        return float("inf")
    return max(abs(ours[step] - theirs[step]) / theirs[step] for step in ours)


def say(good: bool, line: str) -> bool:
    print(f"{'ok  ' if good else 'FAIL'} {line}", flush=True)
    return good


def kill_at(process: subprocess.Popen[bytes], run: Path, step: int) -> bool:
    """Kills a trainer once it has logged `step`; False if it ended before."""
    deadline = time.monotonic() + LONGEST
    while max(losses(run), default=0) < step:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, Path(f"{run}.log").read_text()[-2000:]
        time.sleep(0.02)
    process.kill()
    process.wait()
    return True


def main() -> int:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10, help="how often one run is killed")
    kills = parser.parse_args().kills
    good, draw = True, random.Random(0)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_data(folder)
        runs = {devices: folder / f"on-{devices}" for devices in DEVICES}
        for devices, run in runs.items():
            status = start(folder, run, devices).wait(LONGEST)
            assert status == 0, Path(f"{run}.log").read_text()[-2000:]
        wanted = fed(runs[1])
        for devices in DEVICES[1:]:
            same, error = fed(runs[devices]) == wanted, off(runs[devices], runs[1])
            line = f"{devices} devices: the bytes of {len(wanted)} steps equal: {same}, "
            good &= say(same and error <= BOUND, f"{line}losses off by {error:.1e}")
        run, places = folder / "killed", sorted(draw.sample(range(3, STEPS - 20), kills))
        used = []
        for place in places:
            used.append(draw.choice(DEVICES))
            killed = kill_at(start(folder, run, used[-1]), run, place)
            assert killed, Path(f"{run}.log").read_text()[-2000:]
        used.append(draw.choice(DEVICES))
        status = start(folder, run, used[-1]).wait(LONGEST)
        same, error = fed(run) == wanted, off(run, runs[1])
        times = len(Path(f"{run}.fed").read_text().splitlines()) - STEPS
        line = f"killed at steps {places}, on {used} devices, {times} batches fed again: status "
        line += f"{status}, bytes equal: {same}, losses off by {error:.1e}"
        good &= say(status == 0 and same and error <= BOUND, line)
    return 0 if good else 1


def write_data(folder: Path) -> None:
    """Two sources, one of which is exhausted during the run."""
    import gzip

    web = [json.dumps({"text": f"{n} pages say {n * n % 977}, " * 9}) + "\n" for n in range(400)]
    code = [json.dumps({"text": f"def f{n}(x): return x + {n}\n" * 5}) + "\n" for n in range(60)]
    (folder / "web.jsonl").write_text("".join(web))
    with gzip.open(folder / "code.jsonl.gz", "wt") as file:
        file.write("".join(code))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watched"]:
        sys.exit(watched(sys.argv[2], sys.argv[3:]))
    sys.exit(main())
