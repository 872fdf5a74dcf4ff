"""Training speed of recipes, side by side in one run: one JSON line a row.

    python scripts/bench_train.py --rows megabyte_132m:32 megabyte_132m:128 transformer_132m:8

A row is RECIPE:BATCH; windows are as long as the recipe's, bytes are random, the compute dtype is
bfloat16 on an accelerator. Times are medians of single steps, each waited for, after warm-up. MFU
counts the model's own operations (3 × forward, what is frozen once, causal attention half) against
the chip's data sheet. Needs neither grain nor tyro.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import flax
import jax
import numpy as np

from bytelm_jax import parallel, recipes
from bytelm_jax.config import training_flops_per_byte
from bytelm_jax.metrics import peak_flops
from bytelm_jax.models import define_model
from bytelm_jax.optim import build_optimizer


def measure(name: str, batch: int, steps: int, remat: bool) -> dict[str, object]:
    """One row: milliseconds a step, megabytes a second, MFU, memory, compile time."""
    recipe = recipes.get(name)
    run = replace(recipe.train, batch_size=batch, remat=remat, eval_every=0)
    mesh = parallel.make_mesh(1)
    bind, init = define_model(recipe.model)
    frozen = recipe.model.frozen_prefixes
    optimizer = build_optimizer(recipe.optimizer, run.steps, frozen)
    state = parallel.init_state(mesh, optimizer, lambda: init(run.seed))
    step = parallel.make_train_step(bind, optimizer, run, recipe.model.vocab.pad_id, mesh, frozen)
    length, offset = recipe.data.sequence_length, recipe.model.vocab.offset
    source = np.random.default_rng(0)
    batches = [
        parallel.put_batch(mesh, source.integers(offset, offset + 256, (batch, length), np.int32))
        for _ in range(4)
    ]
    start = time.perf_counter()
    compiled = step.lower(state, batches[0]).compile()  # pyright: ignore[reportFunctionMemberAccess]
    seconds, times = time.perf_counter() - start, []
    for i in range(steps + 3):
        start = time.perf_counter()
        state, report = compiled(state, batches[i % len(batches)])
        jax.block_until_ready(report)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[3:])
    rate, peak = batch * length / median, peak_flops()
    memory = jax.local_devices()[0].memory_stats() or {}
    return {
        "row": f"{name}:{batch}",
        "ms": round(1e3 * median, 2),
        "spread_ms": round(1e3 * (max(times[3:]) - min(times[3:])), 2),
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


def main() -> None:
    """Prints a line a row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["megabyte_132m:32"], metavar="RECIPE:BATCH")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a row")
    parser.add_argument("--remat", action="store_true")
    options = parser.parse_args()
    for row in options.rows:
        name, _, batch = row.partition(":")
        print(json.dumps(measure(name, int(batch or 32), options.steps, options.remat)), flush=True)


if __name__ == "__main__":
    main()
