"""Hostile files: seeded damage to exports, which must end in one clear error or be harmless.

    python scripts/check/fuzz_files.py 10000  # trials; prints a line for each failure, and a table

A trial damages config.json, model.safetensors or the shard index of a small model once and loads
the folder, in PyTorch (`from_pretrained`) and in JAX (what `bytelm import` does; every 25th by the
command itself). Good are a `ValueError` of one line (exit code 2 of the command) and a model equal
to the original, byte for byte. Everything else is a failure, and so are 20 seconds or 256 MiB.
"""

import contextlib
import functools
import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import bytelm_torch
from bytelm.config import to_dict
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert, formats
from bytelm_jax.interop import hf_blt as convert_blt
from bytelm_jax.models import abstract_params
from bytelm_jax.training import checkpoint
from parity_tests.damage import damage_folder, make_folders

SECONDS, MEMORY = 20, 2**28


class Late(BaseException):
    """A trial took too long."""


def fingerprint(config: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """What two models must share to be equal."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    held = {k: (v.dtype.name, v.shape, v.tobytes()) for k, v in arrays.items()}
    return {"config": to_dict(config), **held}


def load_torch(folder: Path) -> dict[str, Any]:
    """The model as PyTorch reads it."""
    model = bytelm_torch.from_pretrained(folder)
    return fingerprint(model.config, {k: v.numpy() for k, v in model.state_dict().items()})


def load_jax(folder: Path) -> dict[str, Any]:
    """The model as `bytelm import` reads it."""
    return fingerprint(*formats.import_any(folder))


def load_by_command(folder: Path) -> dict[str, Any]:
    """The same by the command, and out of the run folder that it makes."""
    out, stderr = folder.parent / "run", io.StringIO()
    shutil.rmtree(out, ignore_errors=True)
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["import", str(folder), "--out", str(out)])
    if code == 2:
        assert not out.exists(), "a refused import left a run folder"
        raise ValueError(stderr.getvalue().removesuffix("\n"))
    assert code == 0, f"exit code {code}"
    recipe, params, _ = checkpoint.load_run(out)
    return fingerprint(recipe.model, params)


def outcome(load: Callable[[Path], Any], folder: Path, original: Any) -> str:
    """ "error", "equal", or what went wrong."""
    try:
        loaded = load(folder)
    except ValueError as error:
        clear = str(error).strip() and "\n" not in str(error) and len(str(error)) < 1000
        return "error" if clear else f"unclear: {error!s:.300}"
    except Late:
        return f"hung for {SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.300}"
    return "equal" if loaded == original else "DIFFERENT"


def fuzz(
    trials: int, seed: int, root: Path, folders: dict[str, Path]
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Counts by (file, outcome), and a line for each failure."""
    counts, failures = Counter[tuple[str, str]](), list[str]()
    cached = functools.cache(abstract_params)  # what a loader traces for shapes, once a config
    convert.abstract_params = convert_blt.abstract_params = cached
    signal.signal(signal.SIGALRM, late)
    loaders = {name: [load_jax, load_torch] for name in folders}
    for name in ("hf-blt", "shards"):
        loaders[name] = [load_jax]
    originals = {(n, load): load(folders[n]) for n in folders for load in loaders[n]}
    for trial in range(trials):
        draw = random.Random(seed * 10**9 + trial)
        name, work = draw.choice([*sorted(folders), "shards", "shards"]), root / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        shutil.copytree(folders[name], work / "model")
        what = damage_folder(work / "model", draw)
        for load in [*loaders[name], *[load_by_command] * (trial % 25 == 0)]:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.alarm(SECONDS)
            original = originals[name, load_jax if load is load_by_command else load]
            verdict = outcome(load, work / "model", original)
            signal.alarm(0)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            if grown * 1024 > MEMORY:
                verdict += f", {grown // 1024} MiB"
            counts[what, verdict if verdict in ("error", "equal") else "FAILURE"] += 1
            if verdict not in ("error", "equal"):
                failures.append(f"trial {trial}, {name}, {what}, {load.__name__}: {verdict}")
    return counts, failures


def late(*_: object) -> None:
    """The handler of the alarm."""
    raise Late


def main(trials: int, seed: int = 0) -> int:
    """Runs and prints; under a limit, so that a blow-up is a failure and not the machine's end."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**33, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        folders = make_folders(Path(folder) / "whole")
        counts, failures = fuzz(trials, seed, Path(folder), folders)
    print(*failures, sep="\n")
    for (what, verdict), count in sorted(counts.items()):
        print(f"{what:40} {verdict:8} {count:6}")
    total = Counter[str]()
    for (_, verdict), count in counts.items():
        total[verdict] += count
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    spent = f"{time.process_time():.0f} CPU-seconds, {memory} MiB at most"
    print(f"{trials} trials, seed {seed}, {sum(total.values())} loads: {dict(total)}; {spent}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
