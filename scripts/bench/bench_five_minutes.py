"""Recipes trained for the same wall time on one GPU each: exact bits per byte, and the curves.

    python scripts/bench/bench_five_minutes.py --train english_train.txt --valid english_valid.txt \
        --gpus 4 --out five.jsonl --picture five.png
    python scripts/bench/bench_five_minutes.py --plot five.jsonl five.png      # the picture alone

A row is a recipe and its overrides, as `bytelm train` takes them; `--options` go to every row. Each
row has a process and a GPU of its own, `--gpus` at a time. It trains for `--seconds`, compilation
and evaluation aside, and is then evaluated on every byte of `--valid`, window by window, each as if
nothing stood before it. Prints one JSON object per row; a point of its `curve` is [seconds of
training, bits per byte on 64 windows of `--valid`, on what was trained on since the last point].
`--save DIR` keeps the models as run folders.
"""

import argparse
import json
import math
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from equal_time import Trainer, add_options, machine, read_row, side_by_side

from bytelm import data
from bytelm.chips import peak_flops
from bytelm.config import BLTConfig, training_flops_per_byte
from bytelm.files import read_json_lines
from bytelm_jax.training import checkpoint
from bytelm_jax.training import patch_calibration as patch_contract
from bytelm_jax.training import step as steps

ROWS = [
    "megabyte_132m",
    "blt_132m",
    "lfbyte_130m",
    "transformer_132m --batch-size 16",
]


def measure(row: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    recipe = read_row(row, args.options)
    data_config = replace(recipe.data, paths=(args.train,), validation_fraction=0.0)
    recipe, corpus = replace(recipe, data=data_config), data.open_corpus([args.valid])
    held_out = data.Windows(
        corpus, recipe.model.vocab, data_config.sequence_length, append_eos=False
    )
    trainer, begin = Trainer(recipe, held_out), time.perf_counter()
    trained = trainer.train(recipe.train.seed, args.seconds, time.perf_counter, args.points)
    count = trained.steps * recipe.train.batch_size * data_config.sequence_length
    rate, peak = count / trained.seconds, peak_flops(jax.devices()[0].device_kind)
    flops = training_flops_per_byte(recipe.model, data_config.sequence_length)
    if args.save:
        if isinstance(recipe.model, BLTConfig):
            contract = patch_contract.measure(recipe.model, trained.params, trainer.windows)
            recipe = replace(recipe, patching=contract)
        checkpoint.create_run(args.save / folder(row), recipe, trained.params)
    return {
        "row": row,
        "parameters": recipe.model.parameter_count(),
        "bits_per_byte": round(trained.evaluation.bits_per_byte, 4),
        "nats_per_byte": round(trained.evaluation.nats / trained.evaluation.count, 4),
        "held_out_bytes": trained.evaluation.count,
        "steps": trained.steps,
        "trained_bytes": count,
        "bytes_per_second": round(rate),
        "mfu": peak and round(flops * rate / peak, 4),
        "seconds": round(trained.seconds, 1),
        "seconds_in_all": round(time.perf_counter() - begin, 1),
        "peak_gib": round(trained.peak_gib, 2),
        "batch_size": recipe.train.batch_size,
        "learning_rate": recipe.optimizer.learning_rate,
        "dtype": str(steps.compute_dtype(recipe.train)),
        **machine(),
        "curve": [[round(number, 4) for number in point] for point in trained.curve],
    }


def folder(row: str) -> str:
    """The name of a row's run folder."""
    return re.sub(r"[^\w.]+", "-", row)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out bits per byte over seconds of training, and behind them those of training."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "curve" in row]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(sorted(rows, key=lambda row: row["bits_per_byte"])):
        seconds, held_out, training = zip(*row["curve"], strict=True)
        label = f"{re.sub(r' --(model[.])?', ', ', row['row'])}: {row['bits_per_byte']:.3f}"
        axes.plot(seconds, held_out, color=f"C{number}", label=label)
        axes.plot(seconds, training, color=f"C{number}", linewidth=0.8, alpha=0.4)
    ends = [point[1] for row in rows for point in row["curve"] if math.isfinite(point[1])]
    axes.set_ylim(min(ends) - 0.1, min(max(ends), min(ends) + 1.5))
    axes.set(xlabel="seconds of training", ylabel="bits per byte (thin: training)")
    axes.set_title(f"Held-out text, {rows[0]['device']}, {rows[0]['date']}")
    axes.grid(alpha=0.3)
    axes.legend(title="at the end, all held-out bytes")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints one line per row, and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="'RECIPE OVERRIDES'")
    parser.add_argument("--options", default="--warmup-steps 200", help="overrides of every row")
    add_options(parser, 300.0)
    parser.add_argument("--points", type=int, default=24, help="of the curve")
    parser.add_argument("--save", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="the lines go here, too")
    parser.add_argument("--picture", type=Path, metavar="OUT.png")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("FILE.jsonl", "OUT.png"))
    parser.add_argument("--here", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot:
        draw(read_json_lines(args.plot[0]), args.plot[1])
        return
    if args.here:
        print(json.dumps(measure(args.here, args)), flush=True)
        return
    rows, command = [], shlex.join(["python", *sys.argv])
    for row in side_by_side([[*sys.argv, "--here", row] for row in args.rows], args.gpus):
        print(json.dumps(row | {"command": command}), flush=True)
        rows.append(row)
        if args.out:
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"command": command}) + "\n")
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    main()
