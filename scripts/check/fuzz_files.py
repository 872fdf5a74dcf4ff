"""Hostile files: seeded damage to exports, which must end in one clear error or be harmless.

    python scripts/check/fuzz_files.py 10000  # trials; prints a line for each failure, and a table

A trial damages config.json, model.safetensors or the shard index of a small model once and loads
the folder, in PyTorch (`from_pretrained`) and in JAX (what `bytelm import` does; every 25th by the
command itself). Good are a `ValueError` of one line (exit code 2 of the command) and a model equal
to the original, byte for byte. Everything else is a failure, and so are 20 seconds or 256 MiB.
As many trials damage run folders: configuration, metadata, arrays, metrics.jsonl, training.pt.
"""

import contextlib
import functools
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import bytelm_torch
from bytelm.config import Recipe, to_dict
from bytelm.metrics import METRIC, MetricsLog, read_metrics
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert, formats
from bytelm_jax.interop import hf_blt as convert_blt
from bytelm_jax.models import abstract_params
from bytelm_jax.training import checkpoint
from bytelm_torch.training import checkpoint as torch_checkpoint
from parity_tests.damage import (
    MODELS,
    VALUES,
    damage_bytes,
    damage_folder,
    damage_json,
    make_folders,
)

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


# ---- run folders ----------------------------------------------------------------------------


def make_run(run: Path) -> dict[str, Path]:
    """Run folders of JAX and of PyTorch, as far as reading goes: checkpoints and metrics."""
    recipe = Recipe(name="fuzz", model=MODELS["megabyte"])
    draw, leaves = np.random.default_rng(0), abstract_params(recipe.model).items()
    params = {k: jnp.asarray(draw.standard_normal(v.shape), jnp.float32) for k, v in leaves}
    checkpoint.create_run(run / "jax", recipe, params)
    with closing(MetricsLog(run / "jax" / "metrics.jsonl", 0)) as log:
        for step in range(1, 9):
            log.write({"step": step, "loss": 1 / step, METRIC: step})
    step = run / "torch" / "checkpoints" / "1"
    step.mkdir(parents=True)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {"step": 1, "data": "x", "metrics": {METRIC: 2.0}, "optimizer": optimizer.state_dict()}
    torch.save(state, step / "training.pt")
    return {"jax": run / "jax", "torch": run / "torch"}


def load_run(folder: Path) -> Any:
    """Everything that is read of a run folder."""
    if (folder / "checkpoints" / "1").exists():
        state = torch_checkpoint.read_training(folder, 1, checksums=True)
        return str(state)
    recipe, params, step = checkpoint.load_run(folder)
    read_metrics(folder / "metrics.jsonl")
    return fingerprint(recipe.model, params) | {"step": step}


def damage_run(folder: Path, draw: random.Random) -> str:
    """Damages one file somewhere in a run folder; says which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    likely = [p for p in files if p.name in ("metadata", "config.json", "metrics.jsonl")]
    file = draw.choice(likely if likely and draw.randrange(3) else files)
    data = file.read_bytes()
    if draw.randrange(25) == 0:
        file.unlink()
        draw.choice([os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])(file)
    elif file.name in ("metadata", "config.json"):
        file.write_bytes(damage_json(data, draw, VALUES))
    else:
        file.write_bytes(damage_bytes(data, draw))
    return f"run: {file.name if file in likely or file.suffix == '.pt' else 'arrays'}"


def fuzz_runs(trials: int, seed: int, root: Path) -> tuple[Counter[tuple[str, str]], list[str]]:
    """The same as `fuzz` for run folders; a change of what is not compared counts as equal."""
    counts, failures = Counter[tuple[str, str]](), list[str]()
    folders = make_run(root / "runs")
    originals = {name: load_run(folder) for name, folder in folders.items()}
    signal.signal(signal.SIGALRM, late)
    for trial in range(trials):
        draw = random.Random(seed * 10**9 + trial)
        name, work = draw.choice(["jax", "torch"]), root / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folders[name], work)
        what = damage_run(work, draw)
        signal.alarm(SECONDS)
        verdict = outcome(load_run, work, originals[name])
        signal.alarm(0)
        counts[what, verdict if verdict in ("error", "equal") else "FAILURE"] += 1
        if verdict not in ("error", "equal"):
            failures.append(f"trial {trial}, {name}, {what}: {verdict}")
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
        more, others = fuzz_runs(trials, seed, Path(folder))
        counts, failures = counts + more, failures + others
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
