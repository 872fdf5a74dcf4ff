"""Architectures side by side, tuned alike: exact bits per byte, and curves of learning.

    python scripts/bench/arena.py --plan small --seconds 1500 --gpus 2 --out arena.jsonl \\
        --train english_train.txt --valid english=english_valid.txt multilingual.txt:1000000
    python scripts/bench/arena.py --arms "megabyte_tiny" "blt_tiny --model.patcher space" \\
        --rates 0.3 1 3 --seeds 0 1 --run-seconds 60 --out lines.jsonl ...
    python scripts/bench/arena_report.py arena.jsonl --figures docs/figures

An arm is a recipe and its overrides, as `bytelm train` takes them; `--options` go to every arm. A
run lasts its seconds, compilation and evaluation aside, or one pass over the text, whichever ends
first. Its learning rate is a multiple of the recipe's for that optimizer (`--rates`) and follows
the share of the run that is over: 5 % of warm-up, then a cosine. Seconds are those of the wall, on
a CPU those of the process. `ARM @SECONDS` says that so many seconds were spent on the arm before,
such as on its entropy model: its runs are shorter by them.

Without `--plan` every arm is run at every rate, optimizer and seed. A plan of `PLANS` searches the
rate of each arm, runs the best longer, and goes on to what is stated there; what no longer fits in
`--seconds` on `--gpus` GPUs is left out and named at the end, in the order of the plan. Each line
is written to `--out` as its run ends, and runs that the file holds are not run again. A process
keeps an arm under an optimizer compiled, one process a GPU at a time.

`--valid` takes `NAME=FILE:BYTES`, name and bytes optional; the first set is the one of the curves
and of the plan's choices. A point of a line's `curve` is [seconds, bytes, bits per byte on 64
windows of the first set, on what was trained on since the last point]. `--save DIR` keeps each
model as a run folder.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.config.optimizer import OPTIMIZER_CONFIGS
from bytelm.files import read_json_lines

STARTING = 90.0
"""Seconds that a process is expected to need before its first run: imports and compilation."""

FINISHING = 25.0
"""Seconds that a run is expected to need beside its own: curve and evaluation."""


class Cell(NamedTuple):
    """A run."""

    arm: str
    optimizer: str
    factor: float
    """Of the recipe's learning rate."""
    seconds: float
    seed: int = 0
    bytes: int = 0
    """Bytes at which the run ends; 0: after its seconds or one pass."""

    @property
    def group(self) -> tuple[str, str]:
        """Runs of one group share a process and its programs."""
        return self.arm, self.optimizer


class Plan(NamedTuple):
    """What is run for each arm, stage after stage; earlier stages of all arms come first.

    The search, the best rate, as many bytes as the first arm had time for, the other optimizer, the
    runners-up, further seeds.
    """

    arms: tuple[str, ...]
    factors: tuple[float, ...]
    search: float
    """Seconds of a run that chooses the learning rate."""
    final: float
    """Seconds of the runs after it."""
    runners_up: int
    """Of the rates searched, how many beside the best are run for `final` seconds."""
    seeds: tuple[int, ...]
    """Further seeds of the best rate."""
    optimizer: str
    """Another optimizer, under which the best rate is run; "" for none."""


TRANSFORMER = "transformer_400m --batch-size 16"
FAMILIES = (TRANSFORMER, "blt_400m", "megabyte_400m", "lfbyte_400m")
ENGLISH = " --model.threshold 11.8"  # six bytes per patch in English prose

PLANS = {
    "full": Plan(
        arms=(*FAMILIES, "megabyte_400m_p4", "bytropix_400m" + ENGLISH),
        factors=(0.3, 1.0, 3.0),
        search=100.0,
        final=300.0,
        runners_up=1,
        seeds=(1, 2),
        optimizer="muon",
    ),
    "small": Plan(
        arms=FAMILIES,
        factors=(0.3, 1.0, 3.0),
        search=40.0,
        final=150.0,
        runners_up=0,
        seeds=(),
        optimizer="muon",
    ),
    "check": Plan(
        arms=(
            "megabyte_tiny --batch-size 2 --model.global-layers 1 --model.local-layers 1",
            "lfbyte_tiny --batch-size 2 --model.num-layers 1",
        ),
        factors=(1.0, 3.0),
        search=3.0,
        final=6.0,
        runners_up=0,
        seeds=(1,),
        optimizer="muon",
    ),
}
"""`full` is meant for two hours of a card or half an hour of four, `small` for 25 minutes of two;
`check` shows on a CPU that everything works."""

Lines = dict[Cell, dict[str, Any]]


def bits(line: dict[str, Any]) -> float:
    """Bits per byte on the first set; infinite if they are not finite."""
    value = next(iter(line["bits_per_byte"].values()))
    return float("inf") if value is None else value


def stages(plan: Plan, lines: Lines) -> Iterator[list[Cell]]:
    """The runs of a plan, as far as the lines so far determine them, the most important first."""
    searched = {
        arm: [Cell(arm, "adamw", f, plan.search) for f in plan.factors] for arm in plan.arms
    }
    yield [cell for cells in searched.values() for cell in cells]
    ranked = {
        arm: [cell.factor for cell in sorted(cells, key=lambda cell: bits(lines[cell]))]
        for arm, cells in searched.items()
        if all(cell in lines for cell in cells)
    }
    final = {arm: Cell(arm, "adamw", each[0], plan.final) for arm, each in ranked.items()}
    yield list(final.values())
    first = final.get(plan.arms[0])
    if first is not None and first in lines:  # as many bytes as the first arm had time for
        read = lines[first]["bytes"]
        yield [cell._replace(bytes=read) for cell in final.values() if cell != first]
    if plan.optimizer:
        yield [cell._replace(optimizer=plan.optimizer) for cell in final.values()]
    for place in range(1, 1 + plan.runners_up):
        yield [cell._replace(factor=ranked[arm][place]) for arm, cell in final.items()]
    for seed in plan.seeds:
        yield [cell._replace(seed=seed) for cell in final.values()]


# ---- a process and its runs -----------------------------------------------------------------


def open_trainer(cell: Cell, args: argparse.Namespace) -> Any:
    """What trains an arm under an optimizer."""
    from equal_time import Trainer, read_row

    from bytelm import data, recipes

    recipe = read_row(cell.arm.partition(" @")[0], args.options)
    recipe = recipes.with_optimizer(recipe, cell.optimizer)
    text = replace(recipe.data, paths=tuple(args.train), validation_fraction=0.0)
    recipe, vocab, length = replace(recipe, data=text), recipe.model.vocab, text.sequence_length
    held_out = {
        name: data.Windows(data.memory_corpus(each), vocab, length, append_eos=False)
        for name, each in held_out_texts(args.valid).items()
    }
    return Trainer(recipe, held_out)


def run_cells(cells: list[Cell], args: argparse.Namespace) -> None:
    """Prints a line for each run of a group, in this process."""
    import jax
    from equal_time import machine

    trainer, spent = open_trainer(cells[0], args), cells[0].arm.partition(" @")[2]
    recipe, started = trainer.recipe, time.perf_counter()
    a_step = recipe.train.batch_size * recipe.data.sequence_length
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    for cell in cells:
        seconds = cell.seconds - float(spent or 0)
        if time.time() + FINISHING + (0 if cell.bytes else seconds) > args.deadline:
            continue
        rate = cell.factor * recipe.optimizer.learning_rate
        most = max(1, cell.bytes // a_step) if cell.bytes else 0
        limit = 1e9 if cell.bytes else seconds
        trained = trainer.train(cell.seed, limit, clock, args.points, rate, most)
        line = {"cell": cell, **described(trainer, trained), "learning_rate": rate}
        line |= {"text": args.text, **machine()}
        line |= {"seconds_in_all": round(time.perf_counter() - started, 1)}
        if args.save:
            save(args.save / folder(cell), trainer, trained)
        started = time.perf_counter()
        print(json.dumps(line), flush=True)


def folder(cell: Cell) -> str:
    """The name of a run's folder."""
    name = f"{cell.arm} {cell.optimizer} {cell.factor:g} {cell.seconds:g} {cell.seed}"
    return re.sub(r"[^\w.]+", "-", name + (f" {cell.bytes}" if cell.bytes else ""))


def save(run_dir: Path, trainer: Any, trained: Any) -> None:
    """Keeps a model as the run folder of its recipe."""
    from bytelm.config import BLTConfig
    from bytelm_jax.training import checkpoint
    from bytelm_jax.training import patch_calibration as patch_contract

    recipe = trainer.recipe
    if isinstance(recipe.model, BLTConfig):
        contract = patch_contract.measure(recipe.model, trained.params, trainer.windows)
        recipe = replace(recipe, patching=contract)
    checkpoint.create_run(run_dir, recipe, trained.params)


def described(trainer: Any, trained: Any) -> dict[str, Any]:
    """The part of a line that says what a run was and came to."""
    import jax

    from bytelm.chips import peak_flops
    from bytelm.config import training_flops_per_byte
    from bytelm_jax.training import step as steps

    recipe, sets = trainer.recipe, trained.evaluations
    flops = training_flops_per_byte(recipe.model, recipe.data.sequence_length)
    peak, speed = peak_flops(jax.devices()[0].device_kind), trained.bytes / trained.seconds
    text = int(trainer.windows.corpus.lengths.sum())
    return {
        "bits_per_byte": {name: finite(each.bits_per_byte) for name, each in sets.items()},
        "held_out_bytes": {name: each.count for name, each in sets.items()},
        "parameters": recipe.model.parameter_count(),
        "steps": trained.steps,
        "bytes": trained.bytes,
        "passes": round(trained.bytes / text, 4),
        "seconds": round(trained.seconds, 1),
        "bytes_per_second": round(speed),
        "mfu": peak and round(flops * speed / peak, 4),
        "flops_per_byte": round(flops),
        "peak_gib": round(trained.peak_gib, 2),
        "batch_size": recipe.train.batch_size,
        "dtype": str(steps.compute_dtype(recipe.train)),
        "curve": [[finite(number) for number in point] for point in trained.curve],
    }


def finite(number: float) -> float | None:
    """Rounded; None, which JSON has, if it is not finite."""
    return round(number, 4) if abs(number) < float("inf") else None


def held_out_texts(specifications: list[str]) -> dict[str, bytes]:
    """The held-out texts by name, each up to the number of bytes that is asked for."""
    texts = {}
    for each in specifications:
        name, _, rest = each.rpartition("=")
        path, _, limit = rest.partition(":")
        texts[name or Path(path).stem] = Path(path).read_bytes()[: int(limit) if limit else None]
    return texts


# ---- all processes --------------------------------------------------------------------------


class Arena:
    """The runs that are known, under way, and given up."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.lock = args, threading.Lock()
        self.lines: Lines = {}
        self.busy: set[Cell] = set()
        self.left_out: list[Cell] = []
        self.failed: set[Cell] = set()
        out: Path = args.out
        if out.exists() and not out.read_bytes().endswith(b"\n"):
            out.open("a").write("\n")  # after a line that a kill cut short
        for line in read_json_lines(out) if out.exists() else []:
            if line["text"] != args.text:
                raise SystemExit(f"--out {out}: its runs read another text ({line['text']})")
            self.lines[Cell(*line["cell"])] = line

    def wanted(self) -> list[list[Cell]]:
        """The runs still to be made, stage by stage, the most important first."""
        args = self.args
        if args.plan:
            all_stages = list(stages(PLANS[args.plan], self.lines))
        else:
            all_stages = [
                [
                    Cell(arm, optimizer, factor, args.run_seconds, seed)
                    for seed in args.seeds
                    for arm in args.arms
                    for optimizer in args.optimizers
                    for factor in args.rates
                ]
            ]
        skipped = self.lines.keys() | self.busy | set(self.left_out)
        return [
            [cell for cell in dict.fromkeys(cells) if cell not in skipped | self.failed]
            for cells in all_stages
        ]

    def next_group(self) -> list[Cell]:
        """Runs of one stage and group for a process, which are then under way."""
        with self.lock:
            for cells in self.wanted():
                for first in cells:
                    if time.time() + STARTING + FINISHING + first.seconds > self.args.deadline:
                        self.left_out.append(first)
                        continue
                    group = [cell for cell in cells if cell.group == first.group]
                    self.busy |= set(group)
                    return group
            return []

    def work(self, gpu: str) -> None:
        """Runs groups on one GPU until there is nothing left that this GPU could begin."""
        while True:
            group = self.next_group()
            if group:
                self.run(group, gpu)
            elif self.busy:  # whose results may determine more
                time.sleep(0.2)
            else:
                return

    def run(self, group: list[Cell], gpu: str) -> None:
        """A process for a group; its lines are kept as they come."""
        cache = self.args.out.with_suffix(".cache").absolute()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        call = [sys.executable, *sys.argv, "--deadline", str(self.args.deadline)]
        call += ["--cells", json.dumps(group)]
        with subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for text in process.stdout or ():
                if not text.startswith("{"):
                    continue  # a library's remark
                line = json.loads(text)
                with self.lock:
                    self.lines[Cell(*line["cell"])] = line
                    with self.args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line | {"command": self.args.command}) + "\n")
                shown = {name: line[name] for name in ("bits_per_byte", "bytes", "seconds")}
                print(json.dumps({"cell": line["cell"]} | shown), flush=True)
        with self.lock:
            self.busy -= set(group)
            if process.returncode:
                self.failed |= {cell for cell in group if cell not in self.lines}
                print(json.dumps({"failed": group}), flush=True)
            else:
                self.left_out += [cell for cell in group if cell not in self.lines]


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plan", choices=PLANS, help="in place of --arms and what follows it")
    parser.add_argument("--seconds", type=float, default=7200.0, help="of the wall, for all runs")
    parser.add_argument("--arms", nargs="+", default=list(FAMILIES), metavar="'RECIPE OVERRIDES'")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="multiples")
    plain = [name for name, kind in OPTIMIZER_CONFIGS.items() if not kind.has_agent]
    parser.add_argument("--optimizers", nargs="+", default=["adamw"], choices=plain)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--run-seconds", type=float, default=300.0)
    parser.add_argument("--options", default="", help="overrides of every arm, in one string")
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--valid", nargs="+", required=True, metavar="[NAME=]FILE[:BYTES]")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--points", type=int, default=24, help="of a curve")
    parser.add_argument("--save", type=Path, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--cells", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Prints a short line per run; the whole ones go to `--out`."""
    parser = options()
    args = parser.parse_args()
    try:
        args.text = {Path(path).name: Path(path).stat().st_size for path in args.train}
        held_out_texts(args.valid)
    except (OSError, ValueError) as error:
        parser.error(f"--train or --valid: {error}")
    args.command = shlex.join(["python", *sys.argv])
    args.deadline = args.deadline or time.time() + args.seconds
    if args.cells:
        run_cells([Cell(*each) for each in json.loads(args.cells)], args)
        return
    arena = Arena(args)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(args.gpus)]
    threads = [threading.Thread(target=arena.work, args=(name,)) for name in names[: args.gpus]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if arena.left_out:
        print(json.dumps({"left_out_for_time": arena.left_out}), flush=True)
    sys.exit(1 if arena.failed else 0)


if __name__ == "__main__":
    main()
