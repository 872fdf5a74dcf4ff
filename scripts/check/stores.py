"""Runs on object stores that fail: too slow for the suite. Prints one line per finding.

    python scripts/check/stores.py [gs] [s3]

Servers run on 127.0.0.1 (see `parity_tests/servers.py`), behind a proxy that answers 503 to a fifth
of the requests, or goes away for 20 seconds while a checkpoint is being written. Each run has to
end with the losses of a run on the disk. Then the lock, at the intervals of every run: a second
trainer, one after `kill -9` of the first, and a holder that was paused for longer than its lease.
No trainer outlives this script, however it ends.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from parity_tests import servers

RUN = (
    "megabyte_tiny --model.patch-size 4 --model.global-dim 16 --model.local-dim 16 "
    "--model.global-layers 1 --model.local-layers 1 --model.global-heads 2 --model.local-heads 2 "
    "--model.max-length 64 --sequence-length 64 --batch-size 4 --eval-windows 4 --log-every 1 "
    "--devices 1"
)
XLA = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
LONGEST = 600  # seconds of a run
AWAY = 20  # seconds
trainers: list["Trainer"] = []


class Trainer:
    """A process of `bytelm train`."""

    def __init__(self, folder: Path, run_dir: str | Path, steps: int, every: int) -> None:
        self.output = folder / f"output-{time.monotonic_ns()}"
        # The kernel ends it when we are killed, and a process that is stopped as well.
        command = ["setpriv", "--pdeathsig", "KILL", "--"]
        command += [sys.executable, "-m", "bytelm_jax", "train", *RUN.split()]
        command += ["--data", str(folder / "text"), "--run-dir", str(run_dir)]
        command += ["--steps", str(steps), "--checkpoint-every", str(every)]
        command += ["--eval-every", str(every)]
        environment = os.environ | {"XLA_FLAGS": XLA, "JAX_PLATFORMS": "cpu"}
        with open(self.output, "w") as sink:
            self.process = subprocess.Popen(
                command, env=environment, stdout=sink, stderr=subprocess.STDOUT
            )
        trainers.append(self)

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Returns when the output holds `text`."""
        deadline = time.monotonic() + LONGEST
        while text not in self.text():
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()
            time.sleep(0.05)

    def end(self) -> int:
        return self.process.wait(LONGEST)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def last_line(self) -> str:
        return self.text().strip().splitlines()[-1]


def losses(text: bytes) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in text.splitlines()]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def stored(address: str) -> list[tuple[int, float]]:
    from bytelm.remote.folder import RemoteFolder

    folder = RemoteFolder(address)
    return losses(b"".join(folder.read(name) or b"" for name in sorted(folder.names("metrics"))))


def say(protocol: str, good: bool, line: str) -> bool:
    print(f"{'ok  ' if good else 'FAIL'} {protocol}: {line}", flush=True)
    return good


def check_faults(protocol: str, flaky: servers.Flaky, folder: Path) -> bool:
    """A run with 503s that is killed and resumed, and one whose store goes away in mid-save."""
    local = Trainer(folder, folder / f"local-{protocol}", 8, 2)
    assert local.end() == 0, local.text()
    wanted = losses((folder / f"local-{protocol}" / "metrics.jsonl").read_bytes())
    address, good = f"{protocol}://{servers.BUCKET}/faults", True
    flaky.failing = 5
    first = Trainer(folder, address, 8, 2)
    first.wait_for("step 4: validation")
    first.kill()
    again = Trainer(folder, address, 8, 2)
    status = again.end()
    line = f"503 to a fifth ({flaky.failed} of {flaky.count} requests), killed and resumed: status"
    same = stored(address) == wanted
    good &= say(protocol, status == 0 and same, f"{line} {status}, losses equal: {same}")
    flaky.failing = 0
    if status:
        print(again.text()[-2000:])

    address = f"{protocol}://{servers.BUCKET}/away"
    run = Trainer(folder, address, 8, 2)
    left_at = flaky.leave_at("checkpoints/4/")  # as the first objects of that save are written
    assert left_at.wait(LONGEST), run.text()
    time.sleep(AWAY)
    flaky.away = False
    status = run.end()
    same = stored(address) == wanted
    line = f"away for {AWAY} s in mid-save ({flaky.refused} requests without an answer): "
    line += f"status {status}, losses equal: {same}"
    if status:
        print(run.text()[-2000:])
    return say(protocol, status == 0 and same, line) and good


def check_lock(protocol: str, folder: Path) -> bool:
    """Two trainers; a death; a holder that was paused."""
    from bytelm.remote.copies import saved_steps
    from bytelm.storage.fetch import objects_under

    address, good = f"{protocol}://{servers.BUCKET}/lock", True
    first = Trainer(folder, address, 10**6, 10**6)
    first.wait_for("step 1/")  # from now on it renews the lock only
    begun = time.monotonic()
    second = Trainer(folder, address, 10**6, 10**6)
    status = second.end()
    line = f"a second trainer: status {status} after {time.monotonic() - begun:.0f} s: "
    good &= say(protocol, status == 2, line + second.last_line())

    third = Trainer(folder, address, 10**6, 10**6)
    third.wait_for("held by another process")
    begun = time.monotonic()
    first.kill()
    third.wait_for(": taken after")
    seconds = time.monotonic() - begun
    third.wait_for("step 1/")
    line = f"another has the run {seconds:.0f} s after kill -9 of the first"
    line += f", and its first step at {time.monotonic() - begun:.0f} s"
    good &= say(protocol, seconds <= 70, line)

    third.process.send_signal(signal.SIGSTOP)
    fourth = Trainer(folder, address, 10**6, 10**6)
    fourth.wait_for("training megabyte_tiny")
    third.process.send_signal(signal.SIGCONT)
    third.process.send_signal(signal.SIGTERM)  # it would save now
    status = third.end()
    steps = saved_steps(objects_under(address))
    line = f"paused past its lease: status {status}, checkpoints {steps}: {third.last_line()}"
    good &= say(protocol, status == 2 and not steps, line)
    fourth.kill()
    return good


def main() -> int:
    good = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are ended
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        text = b"".join(b"line %d of a text\n" % (n * n % 977) for n in range(20000))
        (folder / "text").write_bytes(text)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for protocol in sys.argv[1:] or ["gs", "s3"]:
            try:
                with servers.stores() as flaky:
                    good &= check_faults(protocol, flaky[protocol], folder)
                with servers.stores():
                    good &= check_lock(protocol, folder)
            finally:
                for trainer in trainers:
                    trainer.kill()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
