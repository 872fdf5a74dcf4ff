"""What starting from weights is worth: a script that a model of English learns in a few steps.

    python scripts/bench/bench_fine_tuning.py --english english.txt --other greek.jsonl \\
        --out /tmp/fine-tuning --pretrain 600 --steps 200 --seeds 0 1 2

Trains RECIPE on English, then on the other text in equal steps from scratch and from those weights:
all of them, without the lower two of three global layers (56 % of the parameters), and low-rank
adapters at ten times the rate. A row each gives the bits per byte of the same
held-out documents, the processor time of the run with its compilation, the parameters that train
and the bytes of optimizer state, over the seeds. Finished runs in OUT are read, not run again.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from bytelm.files import replace_file
from bytelm.metrics import METRIC, read_metrics
from bytelm.runs import load_recipe
from bytelm_jax.tools.dry_run import abstract_state
from bytelm_jax.training import mesh as meshes

WAYS = {
    "from scratch": [],
    "all weights": ["--init-from"],
    "half frozen": ["--init-from", "--freeze", "global_transformer.layers.[01].*"],
    "LoRA, rank 8": ["--init-from", *["--lora-rank", "8", "--learning-rate-scale", "*=10"]],
}


def train(run: Path, recipe: str, options: list[str]) -> dict[str, Any]:
    """The figures of a `bytelm train` in `run`, which ends at its last step."""
    done = run / "figures.json"
    if done.is_file():
        return json.loads(done.read_text("utf-8"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "bytelm_jax.cli", "train", recipe, "--run-dir", str(run)]
    subprocess.run([*command, *options], check=True, stderr=subprocess.DEVNULL)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    records = read_metrics(run / "metrics.jsonl")
    bits = [record[METRIC] for record in records if METRIC in record][-1]
    trained, state = sizes(run)
    figures = {"bits": bits, "seconds": seconds, "trained": trained, "state": state}
    replace_file(done, json.dumps(figures).encode())
    return figures


def sizes(run: Path) -> tuple[int, int]:
    """How many parameters a run trains, and the bytes of its optimizer's state."""
    state = abstract_state(load_recipe(run), meshes.make_mesh(1))
    leaves = jax.tree.leaves(state.opt_state)
    moments = [leaf for leaf in leaves if leaf.ndim]
    trained = sum(math.prod(leaf.shape) for leaf in moments) // 2  # AdamW has two of each
    return trained, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="megabyte_tiny")
    parser.add_argument("--english", required=True)
    parser.add_argument("--other", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pretrain", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("options", nargs="*", help="after --: of every run")
    asked = parser.parse_args()
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    common = [*asked.options, "--validation-fraction", "0.1", "--devices", "1", "--eval-every", "0"]
    for seed in asked.seeds:
        every = [*common, "--train.seed", str(seed), "--checkpoint-every", "0"]
        base = asked.out / f"{seed}-english"
        first = ["--data", asked.english, "--steps", str(asked.pretrain)]
        print(f"seed {seed}, English: {train(base, asked.recipe, [*every, *first])}", flush=True)
        for way, extra in WAYS.items():
            start = [*extra[:1], str(base), *extra[1:]] if extra else []
            options = ["--data", asked.other, "--steps", str(asked.steps), *start]
            place = asked.out / f"{seed}-{way.replace(' ', '-').replace(',', '')}"
            figures = train(place, asked.recipe, [*every, *options])
            print(f"seed {seed}, {way}: {figures}", flush=True)
            rows[way].append(figures)
    print("| | bits per byte | processor seconds | trained | optimizer state, bytes |")
    print("| --- | --- | --- | --- | --- |")
    for way, each in rows.items():
        bits = [figures["bits"] for figures in each]
        spread = f"{statistics.mean(bits):.3f} ({min(bits):.3f} to {max(bits):.3f})"
        seconds = statistics.mean(figures["seconds"] for figures in each)
        print(
            f"| {way} | {spread} | {seconds:.0f} | {each[0]['trained']:,} | {each[0]['state']:,} |"
        )


if __name__ == "__main__":
    main()
