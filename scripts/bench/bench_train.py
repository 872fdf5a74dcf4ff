"""Training speed of recipes, side by side in one run: one JSON object per row.

    python scripts/bench/bench_train.py --rows megabyte_132m:32 megabyte_132m:128 blt_767m:8:2048:4

A row is RECIPE[,FIELD=VALUE…]:BATCH[:LENGTH[:PATCH]][@DEVICES[xFSDP][xFORM]]; windows are as long
as the recipe's if LENGTH is left out or 0, and PATCH gives a Byte Latent Transformer patches of
that many bytes instead of its patcher. FIELD is one of the recipe's, as `bytelm train` takes it:
`transformer_132m,model.global_heads=8:8` has heads of 128. BATCH is that of all DEVICES (1 if left
out), of which each FSDP hold the parameters together; FORM is jit or shard_map. Bytes are random,
or with `--data` those of a text, on which an entropy model, which nobody trained, gets the
threshold that makes patches as long as the recipe's. The compute dtype is bfloat16 on an
accelerator. Every row has a process of its own; only one at a time is on the devices. The time of a
step is the median over repeats of ten steps in a row, each repeat waited for at its end, after
warm-up. MFU counts the model's own operations (3 × forward, what is frozen once, causal attention
half) against the chip's data sheet; `executed_over_own` is what is executed for all patches that
the budget has room for, over that. `--losses N` adds those of N steps from the start, which no two
windows share. `--before DIR` measures each row with the packages of another tree of this project,
too (`git archive COMMIT --prefix before/ | tar x`), and `--before DIR=ROW` one row; a line compares
the two: the quotient of their times, and how far the losses lie apart. `--profile N` adds the N
longest kernels of a step and the time in collectives, from another process, whose kernels are
launched one by one: within CUDA graphs, which XLA calls command buffers, a profile of jax 0.11
shows no kernel; `--profiled` says of which rows.
"""

import argparse
import fcntl
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import numpy as np

from bytelm import data, recipes
from bytelm.arguments import parse_recipe
from bytelm.chips import peak_flops
from bytelm.config import BLTConfig, Recipe, training_flops_per_byte
from bytelm.config.models import executed_training_flops_per_byte
from bytelm.trainable import trainable
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.tools import collectives
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from bytelm_jax.training.patch_calibration import calibrate

STEPS = 10
_HERE = Path(__file__).resolve().parent

_ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ

_ONE_BY_ONE = {
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
}
"""The environment in which kernels are launched one by one, and a profile shows each."""


def read_row(row: str) -> Recipe:
    """The recipe that a row names, with the row's batch, length, patches and devices."""
    what, _, where = row.partition("@")
    named, *numbers = what.split(":")
    name, *fields = named.split(",")
    batch, length, patch = (*map(int, numbers), *(0,) * (3 - len(numbers)))
    devices, fsdp, form = (*where.split("x"), *("", "", "")[where.count("x") + 1 :])
    overrides = [f"--{field}" for field in fields]
    recipe = parse_recipe(recipes.get(name), overrides, name, "")
    if patch and isinstance(recipe.model, BLTConfig):
        model = replace(
            recipe.model, patcher="fixed", patch_size=patch, whole_characters=False,
            bytes_per_patch=float(patch),
        )  # fmt: skip
        recipe = replace(recipe, model=model)
    run = replace(
        recipe.train, batch_size=batch or 32, eval_every=0, devices=int(devices or 1),
        fsdp=int(fsdp or 1), parallel="shard_map" if form == "shard_map" else "jit",
    )  # fmt: skip
    window = replace(recipe.data, sequence_length=length or recipe.data.sequence_length)
    return replace(recipe, train=run, data=window)


def longest_kernels(trace: Path, steps: int, count: int) -> dict[str, float]:
    """Milliseconds per step and device of what takes longest, by place in the program, and of all.

    "collectives" are those between devices, waiting for the slowest of them included.
    """
    hlo = (trace / "hlo.txt").read_text()
    places = dict(re.findall(r"%?([\w.-]+) = .*?op_name=\"([^\"]*)\"", hlo))
    (path,) = trace.rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(path))
    total, between, busy = Counter[str](), 0.0, set[str]()
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/device:") else ():
            for event in line.events if line.name.startswith("Stream") else ():
                busy.add(plane.name)  # a host's other devices have planes, too
                stats = dict(event.stats)
                name = str(stats.get("hlo_op", event.name))
                place = re.sub(r"[.]\d+|layers/\d+/", "", places.get(name, name))
                total[f"{re.sub(r'[._]?[0-9]+', '', name)} {place}"] += event.duration_ns / 1e6
                if name.startswith(collectives.KINDS) or "nccl" in event.name.lower():
                    between += event.duration_ns / 1e6
    parts = steps * max(len(busy), 1)
    kernels = {name: round(ms / parts, 3) for name, ms in total.most_common(count)}
    sums = {"all kernels": sum(total.values()), "collectives": between}
    return {name: round(ms / parts, 3) for name, ms in sums.items()} | kernels


def read_windows(recipe: Recipe, text: Path | None, count: int) -> np.ndarray:
    """`count` batches of ids, [count, B, T]: of random bytes, or of the beginning of a text."""
    shape = (count, recipe.train.batch_size, recipe.data.sequence_length)
    if text is None:
        values = np.random.default_rng(0).integers(0, 256, shape, np.int32)
    else:
        values = np.fromfile(text, np.uint8, math.prod(shape))
        missing = math.prod(shape) - len(values)
        if missing:
            raise SystemExit(f"--data {text}: {missing} bytes too short for {count} batches")
        values = values.reshape(shape).astype(np.int32)
    return values + recipe.model.vocab.offset


def calibrated(recipe: Recipe, text: Path | None) -> Recipe:
    """The recipe with the threshold that its untrained entropy model needs on this text."""
    if text is None or not recipe.model.needs_entropy_model:
        return recipe
    params = define_model(recipe.model)[1](recipe.train.seed)
    windows = data.Windows(
        data.open_corpus([str(text)]),
        recipe.model.vocab,
        recipe.data.sequence_length,
        append_eos=False,
    )
    model: Any = recipe.model
    found: Any = calibrate(recipe, params, windows, model.bytes_per_patch, 32).model
    return replace(recipe, model=replace(model, threshold=found.threshold))


class Prepared(NamedTuple):
    """A row, compiled; the devices hold nothing of it yet."""

    row: str
    recipe: Recipe
    mesh: jax.sharding.Mesh
    step: jax.stages.Compiled
    make_state: Callable[[], steps.TrainState]
    seconds: float


def prepare(row: str, remat: bool = False, text: Path | None = None) -> Prepared:
    """Compiles a row's step and its first state."""
    recipe = calibrated(read_row(row), text)
    recipe = replace(recipe, train=replace(recipe.train, remat=remat))
    run, start = recipe.train, time.perf_counter()
    mesh = meshes.make_mesh(run.devices, run.fsdp, run.tensor)
    bind, init = define_model(recipe.model)
    params = abstract_params(recipe.model)
    parts = trainable(recipe, params)
    optimizer = build_optimizer(recipe.optimizer, run.steps, parts=parts)
    step = steps.make_train_step(bind, optimizer, run, recipe.model.vocab.pad_id, mesh, parts)
    state = steps.abstract_init(mesh, optimizer, params)
    shape = (run.batch_size, recipe.data.sequence_length)
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=meshes.batch_sharding(mesh))
    compiled = step.lower(state, ids).compile()  # pyright: ignore[reportFunctionMemberAccess]
    make_state = steps.compile_init(optimizer, lambda: init(run.seed), state)
    return Prepared(row, recipe, mesh, compiled, make_state, time.perf_counter() - start)


def first_losses(prepared: Prepared, count: int, text: Path | None) -> list[float]:
    """Losses of the first `count` steps, each on a batch of its own."""
    state, losses = prepared.make_state(), []
    for rows in read_windows(prepared.recipe, text, count):
        state, report = prepared.step(state, meshes.put_batch(prepared.mesh, rows))
        losses.append(report["loss"])
    return [float(loss) for loss in jax.device_get(losses)]


def measure(
    prepared: Prepared, repeats: int, trace: Path | None, text: Path | None = None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Seconds per step, bytes of memory; a profile of ten steps goes to `trace`."""
    mesh = prepared.mesh
    batches = [meshes.put_batch(mesh, x) for x in read_windows(prepared.recipe, text, 4)]
    report: dict[str, Any] = {}
    state = prepared.make_state()

    def some_steps() -> float:
        nonlocal state, report
        start = time.perf_counter()
        for i in range(STEPS):
            state, report = prepared.step(state, batches[i % len(batches)])
        jax.block_until_ready((state, report))
        return (time.perf_counter() - start) / STEPS

    some_steps()
    times = [some_steps() for _ in range(repeats)]
    used = [device.memory_stats() or {} for device in mesh.devices.flat]
    first = mesh.devices.flat[0]
    state_bytes = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards
               if s.device == first)  # fmt: skip
    if trace:
        with jax.profiler.trace(str(trace)):
            some_steps()
    spread, loss = max(times) - min(times), float(report["loss"])
    timing = {"seconds": statistics.median(times), "spread": spread, "loss": loss}
    timing |= {k: float(v) for k, v in report.items() if k in ("patch_length", "patch_overflow")}
    peak = max(m.get("peak_bytes_in_use", 0) for m in used)
    return timing, {"peak": peak, "state": state_bytes}


def describe(prepared: Prepared, times: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """One row: milliseconds per step, megabytes per second, MFU, memory."""
    run, length = prepared.recipe.train, prepared.recipe.data.sequence_length
    rate = run.batch_size * length / times["seconds"]
    peak = peak_flops(jax.devices()[0].device_kind)
    planned: Any = prepared.step.memory_analysis()
    step = (planned.argument_size_in_bytes, planned.temp_size_in_bytes,
            planned.output_size_in_bytes, -planned.alias_size_in_bytes)  # fmt: skip
    flops = training_flops_per_byte(prepared.recipe.model, length)
    executed = executed_training_flops_per_byte(prepared.recipe.model, length)
    return {
        "row": prepared.row,
        "ms": round(1e3 * times["seconds"], 2),
        "spread_ms": round(1e3 * times["spread"], 2),
        "megabytes_per_second": round(rate / 1e6, 4),
        "mfu": peak and round(flops * rate / peak / prepared.mesh.size, 4),
        "executed_over_own": round(executed / flops, 3),
        "peak_gib": round(sizes["peak"] / 2**30, 2),
        "step_gib": round(sum(step) / 2**30, 2),
        "state_gib": round(sizes["state"] / 2**30, 4),
        **{k: round(v, 4) for k, v in times.items() if k.startswith(("loss", "patch_"))},
        "dtype": str(steps.compute_dtype(run)),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def run_row(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles a row, waits for the devices and measures; the devices are its own until it ends."""
    prepared = prepare(row, options.remat, options.data)
    fcntl.flock(os.open(options.lock, os.O_RDWR), fcntl.LOCK_EX)
    losses = first_losses(prepared, options.losses, options.data) if options.losses else []
    times, sizes = measure(prepared, options.repeats, options.trace, options.data)
    if options.trace:
        (options.trace / "hlo.txt").write_text(prepared.step.as_text() or "")
    more = {"losses": [round(loss, 6) for loss in losses]} if losses else {}
    return describe(prepared, times, sizes) | more


class Job(NamedTuple):
    """A row and the tree whose packages measure it, by the path of its root."""

    row: str
    tree: str = "this"


class Plan(NamedTuple):
    """What is done with all rows of a call."""

    profile: int = 0
    """How many kernels of a profile are printed; 0: no profile."""
    profiled: Sequence[str] = ()
    """The rows that get a profile; all if there are none."""
    before: Sequence[str] = ()
    """The roots of other trees, each with = and the row that it measures, if not all."""
    kept: Path | None = None
    """A folder in which the cache of programs stays."""

    def jobs(self, rows: Iterable[str]) -> list[Job]:
        """Each row, with the other trees first."""
        others = [each.partition("=")[::2] for each in self.before]
        trees = {row: [tree for tree, only in others if only in ("", row)] for row in rows}
        return [Job(row, tree) for row in trees for tree in (*trees[row], "this")]

    def has_profile(self, job: Job) -> bool:
        """Whether this job's kernels are printed."""
        of_row = not self.profiled or job.row in self.profiled
        return self.profile > 0 and job.tree == "this" and of_row

    def environment(self, job: Job, cache: Path) -> dict[str, str]:
        """The environment of a process of this job, whose programs are cached in `cache`."""
        tree = _HERE.parents[1] if job.tree == "this" else Path(job.tree).resolve()
        paths = filter(None, (str(tree), os.environ.get("PYTHONPATH")))
        return _ENVIRONMENT | {
            "PYTHONPATH": os.pathsep.join(paths),
            "JAX_COMPILATION_CACHE_DIR": str(self.kept or cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }


def measure_all(
    rows: list[str], rest: list[str], workers: int, plan: Plan | None = None
) -> Iterator[dict[str, Any]]:
    """Every row in a process of its own: its peak memory is its own, and one that fails stops none.

    First all are compiled, `workers` side by side: the compiler tries out kernels on the devices
    and keeps memory there. Then other processes take the programs from the cache, a few ahead of
    the one that is on the devices. Rows come as they are measured.
    """
    plan = plan or Plan()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        lock = Path(folder, "lock")
        lock.touch()

        def run(job: Job, *more: str, launched: dict[str, str] | None = None) -> dict[str, Any]:
            call = [sys.executable, __file__, "--rows", job.row, *rest, *more]
            environment = plan.environment(job, Path(folder)) | (launched or {})
            done = subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True)
            return {"failed": True} if done.returncode else json.loads(done.stdout)

        def run_on_devices(job: Job) -> dict[str, Any]:
            result = run(job, "--lock", str(lock))
            if "failed" in result or not plan.has_profile(job):
                return result
            with tempfile.TemporaryDirectory() as trace:
                more = ("--lock", str(lock), "--trace", trace)
                if "failed" not in run(job, *more, launched=_ONE_BY_ONE):
                    result["kernels"] = longest_kernels(Path(trace), STEPS, plan.profile)
            return result

        jobs = plan.jobs(rows)
        # A profile's program, too, is compiled before anything is measured.
        programs = [(job, None) for job in jobs]
        programs += [(job, _ONE_BY_ONE) for job in jobs if plan.has_profile(job)]
        compiling = [pool.submit(run, job, "--compile", launched=how) for job, how in programs]
        compiled = {job: each.result() for job, each in zip(jobs, compiling, strict=False)}
        for each in compiling:
            each.result()
        waiting = {pool.submit(run_on_devices, job): job for job in jobs}
        done = dict[Job, dict[str, Any]]()
        for each in as_completed(waiting):
            job = waiting[each]
            tree = {"tree": job.tree} if plan.before else {}
            done[job] = {"row": job.row} | tree | each.result() | compiled[job]
            yield done[job]
            if all(other in done for other in jobs if other.row == job.row):
                yield from comparisons(job.row, done)


def comparisons(row: str, done: dict[Job, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line about each other tree that has measured the row, once this one has."""
    new = done.get(Job(row), {})
    for job, old in done.items():
        if job.row != row or job.tree == "this" or "ms" not in old or "ms" not in new:
            continue
        times = {"times": round(old["ms"] / new["ms"], 3)}
        pairs = zip(old.get("losses", ()), new.get("losses", ()), strict=True)
        apart = [abs(a - b) for a, b in pairs]
        losses = {"losses_apart": round(max(apart), 6)} if apart else {}
        yield {"compare": f"{job.tree} / this", "row": row} | times | losses


def main() -> None:
    """Prints one line per row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["megabyte_132m:32"], metavar="ROW")
    parser.add_argument("--repeats", type=int, default=7, help="of ten steps each")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--data", type=Path, metavar="TEXT", help="take its bytes, not random ones")
    parser.add_argument("--losses", type=int, default=0, metavar="N")
    parser.add_argument("--before", nargs="+", default=[], metavar="DIR[=ROW]")
    parser.add_argument("--profile", type=int, default=0, metavar="N")
    parser.add_argument("--profiled", nargs="+", default=[], metavar="ROW", help="default: all")
    parser.add_argument("--workers", type=int, default=4, help="rows compiled side by side")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        seconds = prepare(options.rows[0], options.remat, options.data).seconds
        print(json.dumps({"compile_seconds": round(seconds, 1)}))
    elif options.lock:
        print(json.dumps(run_row(options.rows[0], options)), flush=True)
    else:
        rest = ["--repeats", str(options.repeats), "--losses", str(options.losses)]
        rest += ["--remat"] * options.remat
        rest += ["--data", str(options.data)] if options.data else []
        plan = Plan(options.profile, options.profiled, options.before)
        for row in measure_all(options.rows, rest, options.workers, plan):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
