"""Training speed of the PyTorch twin on a row of `bench_train.py`: one JSON object.

    python scripts/bench/bench_twin.py --row megabyte_132m:32 --form graphs

Forms: `eager` and `compiled` are steps of `bytelm_torch.train`, without and with `--compile`;
`graphs` is the fastest that PyTorch is known to offer: model and loss as one graph, compiled with
"reduce-overhead", which replays CUDA graphs, and no wait within a step. All take AdamW in one
kernel and attention by `scaled_dot_product_attention`, in bfloat16 under autocast on a GPU. The
bytes and the median are those of `bench_train.py`.
"""

import argparse
import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_train import STEPS, calibrated, read_row, read_windows

import bytelm_torch
from bytelm.chips import peak_flops
from bytelm.config import Recipe, training_flops_per_byte
from bytelm_torch.layers.ids import as_ids
from bytelm_torch.optimizers.build import build_optimizer, clip_by_global_norm
from bytelm_torch.training import parallel

FORMS = ("eager", "compiled", "graphs")

Step = Callable[[int, np.ndarray], Any]
"""`step(count, rows) -> loss`, a tensor."""


def make_step(recipe: Recipe, form: str, group: parallel.Group) -> Step:
    """A step of the twin in that form."""
    run, pad = recipe.train, recipe.model.vocab.pad_id
    torch.manual_seed(run.seed)
    model = bytelm_torch.build_model(recipe.model).to(group.device).train()
    optimizer = build_optimizer(recipe.optimizer, model)
    rate, limit = recipe.optimizer.learning_rate, recipe.optimizer.max_grad_norm
    if form != "graphs":
        step = parallel.make_train_step(
            model, optimizer, run, pad, group, compiled=form == "compiled"
        )
        return lambda count, rows: step(count, rows, rate, limit, False)["loss"]

    parallel.require_compilable(recipe.model)
    loss = parallel.RowLoss(model, pad, False)
    mode = "reduce-overhead" if group.device.type == "cuda" else None
    loss.compile(fullgraph=True, dynamic=False, mode=mode)
    dtype = parallel.compute_dtype(run, group.device)

    def graphs(count: int, rows: np.ndarray) -> Any:
        optimizer.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        with parallel.autocast(group.device, dtype):
            nats, extra, _, _ = loss(as_ids(torch.from_numpy(rows)).to(group.device))
        total = nats / rows.size + extra / len(rows)
        total.backward()
        clip_by_global_norm(model.parameters(), limit)
        optimizer.step()
        return total.detach().clone()

    return graphs


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row; only compiled, if `--compile`."""
    recipe = calibrated(read_row(options.row), options.data)
    start, length = time.perf_counter(), recipe.data.sequence_length
    with parallel.join_group() as group:
        batches = read_windows(recipe, options.data, 4)
        step = make_step(recipe, options.form, group)
        for count in range(3):  # CUDA graphs are recorded in the second
            step(count, batches[count])
        wait(group.device)
        seconds = time.perf_counter() - start
        if options.compile:
            return {"compile_seconds": round(seconds, 1)}
        if options.lock:
            fcntl.flock(os.open(options.lock, os.O_RDWR), fcntl.LOCK_EX)
        times, loss = [], None
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            for count in range(STEPS):
                loss = step(count, batches[count % len(batches)])
            wait(group.device)
            times.append((time.perf_counter() - start) / STEPS)
        cuda = group.device.type == "cuda"
        device = torch.cuda.get_device_name() if cuda else "cpu"
    median, rate = statistics.median(times[1:]), recipe.train.batch_size * length
    flops, peak = training_flops_per_byte(recipe.model, length), peak_flops(device)
    return {
        "row": options.row,
        "form": options.form,
        "ms": round(1e3 * median, 2),
        "spread_ms": round(1e3 * (max(times[1:]) - min(times[1:])), 2),
        "megabytes_per_second": round(rate / median / 1e6, 4),
        "mfu": peak and round(flops * rate / median / peak, 4),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0,
        "loss": None if loss is None else round(float(loss), 4),
        "device": device,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Prints the row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", "--rows", default="megabyte_132m:32")
    parser.add_argument("--form", choices=FORMS, default="graphs")
    parser.add_argument("--data", type=Path, metavar="TEXT", help="take its bytes, not random ones")
    parser.add_argument("--repeats", type=int, default=5, help="of ten steps each")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    print(json.dumps(measure(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
