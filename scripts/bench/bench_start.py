"""What a command costs before it does anything: one JSON object per command.

    python scripts/bench/bench_start.py --repeats 3

Tiny models on a CPU, each command in a process of its own: processor seconds (of all its threads)
and wall-clock seconds, the least of `--repeats`. `cold` is with an empty cache of compiled
programs, `second` the same command again. Of `train`, `first_step` is the time until the line of
its first step. The row `from_pretrained` is the call alone, in PyTorch, without imports.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPES = ["megabyte_tiny", "lfbyte_tiny", "blt_tiny --patcher word", "bytropix_tiny"]

LOAD = """
import sys, time
from bytelm_torch import from_pretrained
before = time.process_time()
from_pretrained(sys.argv[1])
print(time.process_time() - before)
assert "torch._dynamo" not in sys.modules
"""


def timed(command: list[str], cache: Path) -> dict[str, float]:
    """Seconds of one process: of processors, of the clock, and until it names its first step."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    found = {}
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cache),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(
        command, env=environment, **streams, text=True, errors="replace", cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/"):
                found["first_step"] = time.perf_counter() - start
    assert process.returncode == 0, command
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processor": used, "wall": time.perf_counter() - start, **found}


def least(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The least of each figure."""
    return {name: round(min(each[name] for each in rounds), 2) for name in rounds[0]}


def measure(command: Callable[[Path], list[str]], repeats: int) -> dict[str, dict[str, float]]:
    """A command's figures, `cold` and `second`; `command(folder)` may write to that new folder."""
    found: dict[str, list[dict[str, float]]] = {"cold": [], "second": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as name:
            for kind, rounds in found.items():
                folder = Path(name, kind)
                folder.mkdir()
                rounds.append(timed(command(folder), Path(name, "cache")))
    return {kind: least(rounds) for kind, rounds in found.items()}


def bytelm(*argv: str) -> list[str]:
    """A command line of `bytelm`."""
    return [sys.executable, "-m", "bytelm_jax", *argv]


def train(recipe: str, folder: Path) -> list[str]:
    """The command that trains for one step."""
    return bytelm("train", *recipe.split(), "--steps", "1", "--run-dir", str(folder / "run"))


def rows(folder: Path, repeats: int) -> Any:
    """Name and figures of each command."""
    run, export = folder / "run", folder / "export"
    timed(train(RECIPES[0], folder), folder)
    timed(bytelm("export", str(run), "--out", str(export)), folder)
    text = ["--prompt", "def ", "--max-new-bytes", "64"]
    yield "generate", measure(lambda _: bytelm("generate", str(run), *text), repeats)
    yield "eval", measure(lambda _: bytelm("eval", str(run), "--data", "README.md"), repeats)
    loads = []
    for _ in range(repeats):
        command = [sys.executable, "-c", LOAD, str(export)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        loads.append({"processor": float(done.stdout)})
    yield "from_pretrained", {"cold": least(loads)}
    for recipe in RECIPES:
        yield f"train {recipe}", measure(lambda new, recipe=recipe: train(recipe, new), repeats)


def main() -> None:
    """Prints one object per command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    about = {name: version(name) for name in ("jax", "torch")}
    about |= {"cores": str(os.cpu_count()), "date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as name:
        for command, figures in rows(Path(name), repeats):
            load = {"load": round(os.getloadavg()[0], 1)}
            print(json.dumps({"command": command, **figures, **load, **about}), flush=True)


if __name__ == "__main__":
    main()
