"""Which learning rate each optimizer needs, as a multiple of the one that a recipe has for AdamW.

    python scripts/bench/bench_rates.py --data english.txt --lines rates.jsonl --jobs 8 \\
        --recipes megabyte_tiny --optimizers lion=.03,.1,.3 muon=.3,1,3 -- --steps 600

Every cell is a `bytelm train` of its own; what stands after `--` goes to each. The learning rate is
multiplied by the factor and the weight decay divided by it. Prints a line a cell with the bits per
byte of the validation set at the end, then a table with the best factor of each row. Cells that the
file --lines holds are not run again. `adamw_rate` of a configuration class and the rates of
`bytelm/recipes.py` come from here.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bytelm import recipes
from bytelm.config import change_optimizer
from bytelm.files import read_json_lines
from bytelm.metrics import METRIC, read_metrics

Cell = tuple[str, str, float]


def train(cell: Cell, data: Path, folder: Path, extra: list[str]) -> dict[str, Any]:
    """The line of one cell: bits per byte, infinite for a run that diverged."""
    recipe, optimizer, factor = cell
    usual = recipes.get(recipe).optimizer
    # From the rate for AdamW, whatever the conversion of today does.
    rate, decay = usual.learning_rate * factor, usual.weight_decay / factor
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=folder) as work:
        run = Path(work) / "run"
        command = [sys.executable, "-m", "bytelm_jax.cli", "train", recipe, "--data", str(data)]
        command += ["--run-dir", str(run), "--optimizer", optimizer, *extra]
        command += ["--optimizer.learning-rate", f"{rate:.6g}"]
        command += ["--optimizer.weight-decay", f"{decay:.6g}"]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        records = read_metrics(run / "metrics.jsonl") if run.exists() else []
    bits = [record[METRIC] for record in records if record.get(METRIC) is not None]
    line = {"recipe": recipe, "optimizer": optimizer, "factor": factor, "learning_rate": rate}
    line |= {"bits_per_byte": bits[-1] if bits and done.returncode == 0 else None}
    line |= {"options": " ".join(extra), "seconds": round(time.monotonic() - begun)}
    if done.returncode:
        line["failure"] = f"status {done.returncode}: {done.stderr.strip()[-300:]}"
    return line


def table(lines: list[dict[str, Any]]) -> str:
    """A row per recipe and optimizer, the best factor first."""
    rows = ["| recipe | optimizer | best factor | bits per byte by factor |", "| --- " * 4 + "|"]
    for recipe, optimizer in dict.fromkeys((x["recipe"], x["optimizer"]) for x in lines):
        cells = {
            line["factor"]: line["bits_per_byte"] or math.inf
            for line in lines
            if (line["recipe"], line["optimizer"]) == (recipe, optimizer)
        }
        best = min(cells, key=lambda factor: cells[factor])
        each = ", ".join(f"× {factor:g}: {cells[factor]:.3f}" for factor in sorted(cells))
        rows.append(f"| {recipe} | {optimizer} | {best:g} | {each} |")
    return "\n".join(rows)


def _row(text: str) -> tuple[str, list[float]]:
    name, _, factors = text.partition("=")
    change_optimizer(recipes.get("megabyte_tiny").optimizer, name)
    return name, [float(factor) for factor in factors.split(",")]


def main(argv: list[str]) -> int:
    """Runs the cells that are missing and prints the table."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="real text")
    parser.add_argument("--lines", type=Path, required=True, metavar="FILE", help="kept up")
    parser.add_argument("--jobs", type=int, default=1, help="cells beside each other")
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--optimizers", nargs="+", required=True, metavar="NAME=FACTORS")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where runs are made and removed")
    args = parser.parse_args(argv[:split])
    try:
        optimizers = [_row(text) for text in args.optimizers]
        cells = [(recipes.get(r).name, name, x) for r in args.recipes for name, xs in optimizers for x in xs]  # fmt: skip  # noqa: E501
    except ValueError as error:
        parser.error(str(error))
    lines = read_json_lines(args.lines) if args.lines.exists() else []
    known = {(line["recipe"], line["optimizer"], line["factor"]) for line in lines}
    lock = threading.Lock()

    def run(cell: Cell) -> None:
        line = train(cell, args.data.absolute(), args.work, argv[split + 1 :])
        with lock, args.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, [cell for cell in cells if cell not in known]))
    print(table(read_json_lines(args.lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
