"""Training speed of recipes, side by side in one run: one JSON line a row.

    python scripts/bench_train.py --rows megabyte_132m:32 megabyte_132m:128 blt_767m:8:2048:4

A row is RECIPE:BATCH[:LENGTH[:PATCH]]; bytes are random, windows as long as the recipe's if LENGTH
is left out, and PATCH gives a Byte Latent Transformer patches of so many bytes in the place of its
patcher. The compute dtype is bfloat16 on an accelerator. Every row has a process of its own; only
one at a time is on the device. The time of a step is the median over repeats of ten steps in a
row, each repeat waited for at its end, after warm-up. MFU counts the model's own operations (3 ×
forward, what is frozen once, causal attention half) against the chip's data sheet. `--profile N`
adds the N longest kernels of a step.
"""

import argparse
import fcntl
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

from bytelm_jax import parallel, recipes
from bytelm_jax.config import BLTConfig, Recipe, training_flops_per_byte
from bytelm_jax.metrics import peak_flops
from bytelm_jax.models import define_model
from bytelm_jax.optim import build_optimizer

STEPS = 10

_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ


def read_row(row: str) -> tuple[Recipe, int, int]:
    """The recipe, batch and length that a row names."""
    name, *numbers = row.split(":")
    batch, length, patch = (*map(int, numbers), *(0,) * (3 - len(numbers)))
    recipe = recipes.get(name)
    if patch and isinstance(recipe.model, BLTConfig):
        model = replace(
            recipe.model, patcher="fixed", patch_size=patch, whole_characters=False,
            bytes_per_patch=float(patch),
        )  # fmt: skip
        recipe = replace(recipe, model=model)
    return recipe, batch or 32, length or recipe.data.sequence_length


def longest_kernels(run: Callable[[], Any], steps: int, count: int, hlo: str) -> dict[str, float]:
    """Milliseconds a step of what takes longest, by place in the program, and of all together."""
    places = dict(re.findall(r"%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    total = Counter[str]()
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/device:") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                stats = dict(event.stats)
                name = str(stats.get("hlo_op", event.name))
                place = re.sub(r"[.]\d+|layers/\d+/", "", places.get(name, name))
                total[f"{re.sub(r'[._]?[0-9]+', '', name)} {place}"] += event.duration_ns / 1e6
    kernels = {name: round(ms / steps, 3) for name, ms in total.most_common(count)}
    return {"all kernels": round(sum(total.values()) / steps, 3)} | kernels


def measure(row: str, repeats: int, remat: bool, profile: int, lock: IO[Any]) -> dict[str, Any]:
    """One row: milliseconds a step, megabytes a second, MFU, memory, compile time."""
    recipe, batch, length = read_row(row)
    run = replace(recipe.train, batch_size=batch, remat=remat, eval_every=0)
    mesh = parallel.make_mesh(1)
    bind, init = define_model(recipe.model)
    frozen = recipe.model.frozen_prefixes
    optimizer = build_optimizer(recipe.optimizer, run.steps, frozen=frozen)
    jitted = parallel.make_train_step(bind, optimizer, run, recipe.model.vocab.pad_id, mesh, frozen)
    offset, source = recipe.model.vocab.offset, np.random.default_rng(0)
    batches = [
        parallel.put_batch(mesh, source.integers(offset, offset + 256, (batch, length), np.int32))
        for _ in range(4)
    ]
    report: dict[str, Any] = {}

    def some_steps() -> float:
        nonlocal state, report
        start = time.perf_counter()
        for i in range(STEPS):
            state, report = step(state, batches[i % len(batches)])
        jax.block_until_ready((state, report))
        return (time.perf_counter() - start) / STEPS

    start = time.perf_counter()
    state = jax.eval_shape(
        lambda: parallel.TrainState(jnp.zeros((), jnp.int32), init(0), optimizer.init(init(0)))
    )
    step = jitted.lower(state, batches[0]).compile()  # pyright: ignore[reportFunctionMemberAccess]
    seconds = time.perf_counter() - start
    fcntl.flock(lock, fcntl.LOCK_EX)  # the device is for one row at a time
    state = parallel.init_state(mesh, optimizer, lambda: init(run.seed))
    some_steps()
    times = [some_steps() for _ in range(repeats)]
    median = statistics.median(times)
    rate, peak = batch * length / median, peak_flops()
    memory = jax.local_devices()[0].memory_stats() or {}
    found: dict[str, Any] = {
        "row": row,
        "ms": round(1e3 * median, 2),
        "spread_ms": round(1e3 * (max(times) - min(times)), 2),
        "megabytes_per_second": round(rate / 1e6, 4),
        "mfu": peak and round(training_flops_per_byte(recipe.model, length) * rate / peak, 4),
        "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
        "compile_seconds": round(seconds, 1),
        "loss": round(float(report["loss"]), 4),
        "dtype": str(parallel.compute_dtype(run)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if profile:
        found["kernels"] = longest_kernels(some_steps, STEPS, profile, step.as_text())
    return found


def main() -> None:
    """Prints a line a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["megabyte_132m:32"], metavar="ROW")
    parser.add_argument("--repeats", type=int, default=7, help="of ten steps each")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--profile", type=int, default=0, metavar="N")
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.lock:
        with options.lock.open() as lock:
            row = options.rows[0]
            found = measure(row, options.repeats, options.remat, options.profile, lock)
            print(json.dumps(found), flush=True)
        return
    # A process a row: its peak memory is its own, and one that runs out stops no other. They
    # compile side by side and wait for each other before they touch the device.
    rest = ["--repeats", str(options.repeats), "--profile", str(options.profile)]
    rest += ["--remat"] * options.remat
    with tempfile.NamedTemporaryFile() as lock:
        calls = [[sys.executable, __file__, "--lock", lock.name, "--rows", r] for r in options.rows]
        started = [subprocess.Popen([*call, *rest], env=_ENVIRONMENT) for call in calls]
        for row, process in zip(options.rows, started, strict=True):
            if process.wait():
                print(json.dumps({"row": row, "failed": True}), flush=True)


if __name__ == "__main__":
    main()
