"""All questions about training speed, in one run on one machine: JSON lines, resumable.

    git archive COMMIT --prefix before/ | tar x     # the tree to compare with
    python scripts/bench/bench_speed.py --data english.txt.xz --before before --lines speed.jsonl

Stages, the most important first: what recipes reach beside the fastest form of the PyTorch twin;
the same rows and the losses of their first steps with the code of another tree; recipes as shipped
on real text beside fixed patches; wider heads of the plain transformer and less room for patches,
with the losses of equal steps; flags of XLA, each in processes of its own. Within a stage all rows
are compiled side by side first, then measured, one at a time on each GPU. A job is a row of
`bench_train.py` or `bench_twin.py`. Comparisons are printed at the end, and by `--minutes 0` from
what `--lines` holds; a call with the same `--lines` goes on with what is missing or failed.
"""

import argparse
import json
import lzma
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TEXT_BYTES = 32_000_000
"""What is read of a compressed text: more than the steps of any job."""

FLAGS = (
    "--xla_gpu_exhaustive_tiling_search=true",
    "--xla_gpu_cudnn_gemm_fusion_level=2",
    "--xla_gpu_enable_cudnn_layer_norm=true",
    "--xla_gpu_experimental_enable_fusion_autotuner=true",
    "--xla_gpu_experimental_enable_fusion_block_level_rewriter=true",
    "--xla_gpu_unsupported_enable_triton_multi_output_fusion=true",
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_analytical_latency_estimator=true",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_command_buffer=",
)
"""Of jaxlib 0.10 and 0.11; one that is unknown fails its row alone."""

HEADS = "transformer_132m,model.global_heads=8,optimizer.warmup_steps=100"


class Job(NamedTuple):
    """One process: a tool of this folder, its row and what else it is told."""

    row: str
    tool: str = "bench_train.py"
    more: tuple[str, ...] = ()
    tree: str = "this"
    """Whose packages it imports: this tree's, or "before"."""
    flags: str = ""

    @property
    def key(self) -> str:
        """What tells it from all others."""
        named = (self.tree, self.tool.removesuffix(".py"), self.row, *self.more, self.flags)
        return " ".join(filter(None, named))


def twin(row: str, form: str = "graphs", tree: str = "this") -> Job:
    """A row of PyTorch."""
    return Job(row, "bench_twin.py", ("--form", form), tree)


def stages(tiny: bool, losses: int) -> list[list[Job]]:
    """What is measured; `tiny` is a plan for a CPU, to see that all of it runs."""
    if tiny:
        mega = "megabyte_tiny,model.global_layers=1,model.local_layers=1:2:64"
        blt = "blt_tiny,model.patcher=space,model.global_layers=1,model.decoder_layers=1:2:64"
        twins, rows, best = [twin(mega, "eager")], [mega], []
        changed = [blt.replace(":", ",train.compute_dtype=bfloat16:", 1)]
        shipped, room = [(blt, blt)], "model.patch_budget=0.4"
        heads = [mega.replace(":", ",model.global_heads=2:", 1), mega]
        flagged, flags = [mega], ("--xla_cpu_enable_fast_math=false",)
    else:
        twins = [
            twin("megabyte_132m:32"), twin("transformer_132m:8"), twin("lfbyte_130m:32", "eager"),
            twin("blt_767m:8:2048:4"), twin("megabyte_in_action_132m:32"), twin("bytropix:32"),
            twin(f"{HEADS}:8"),
        ]  # fmt: skip
        rows = [job.row for job in twins]
        best = ["megabyte_132m:256", "blt_767m:32:2048:4"]
        changed = ["lfbyte_130m:32", "megabyte_in_action_132m:32", "bytropix:32", "blt_132m:32"]
        shipped = [(f"{name}:32", f"{name}:32:2048") for name in ("blt_132m", "blt_767m")]
        shipped.append(("bytropix:32", "bytropix:32:2048"))
        room = "model.patch_budget=0.21875"  # 456 patches; English prose has 379 on average
        heads = [f"{HEADS}:8", f"{HEADS.replace('heads=8', 'heads=16')}:8"]
        flagged, flags = ["megabyte_132m:32", "blt_767m:8:2048:4"], FLAGS
    count = ("--losses", str(losses))
    fixed = [f"{row}:{patch}" for _, row in shipped for patch in (4, 5)]
    return [
        [*(Job(row) for row in rows), *twins, *map(Job, best)],
        [Job(row, more=count, tree=tree) for row in changed for tree in ("this", "before")],
        [Job(row, more=("--text",)) for row in (*(row for row, _ in shipped), *fixed)],
        [*(Job(row, more=("--losses", str(3 * losses))) for row in heads),
         Job(changed[-1].replace(":", f",{room}:", 1), more=count)],
        [twin(row, form, tree) for row in rows[:1] for form, tree in (
            ("eager", "this"), ("eager", "before"), ("compiled", "this"),
        )],
        [Job(row, flags=flag) for row in flagged for flag in flags],
    ]  # fmt: skip


class Runner:
    """Runs jobs on the GPUs of this machine, and keeps what they print."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.end = time.monotonic() + 60 * options.minutes
        self.results, self.writing = dict[str, dict[str, Any]](), Lock()
        if options.lines.exists():
            lines = map(json.loads, options.lines.read_text().splitlines())
            self.results = {line["job"]: line for line in lines if "failed" not in line}

    def left(self) -> float:
        """Seconds until no job may begin."""
        return self.end - time.monotonic()

    def missing(self, jobs: list[Job]) -> Iterator[Job]:
        """Those that have no result and can be run."""
        for job in jobs:
            given = job.tree == "this" or self.options.before
            if given and job.key not in self.results:
                yield job

    def run(self, job: Job, gpu: int, *more: str) -> dict[str, Any]:
        """What the job's process prints, or why it failed."""
        text = "--losses" in job.more or "--text" in job.more
        said = [word for word in job.more if word != "--text"]
        said += ["--data", str(self.options.data)] if text else []
        call = [sys.executable, str(HERE / job.tool), "--rows", job.row, *said, *more]
        call += ["--repeats", str(self.options.repeats)]
        tree = HERE.parents[1] if job.tree == "this" else self.options.before.resolve()
        flags = f"{os.environ.get('XLA_FLAGS', '')} {job.flags}".strip()
        environment = os.environ | {
            "PYTHONPATH": f"{tree}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
            "XLA_FLAGS": flags,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "CUDA_VISIBLE_DEVICES": str(gpu),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / f"torch-{job.tree}"),
        }
        streams: dict[str, Any] = {
            "capture_output": True,
            "text": True,
            "timeout": self.options.limit,
        }
        try:
            done = subprocess.run(call, env=environment, **streams)
        except subprocess.TimeoutExpired:
            return {"failed": f"took more than {self.options.limit:.0f} s"}
        try:
            return json.loads(done.stdout.splitlines()[-1])
        except (ValueError, IndexError):
            return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}

    def stage(self, jobs: list[Job]) -> None:
        """Compiles the jobs side by side, then measures them, one at a time on each GPU."""
        jobs = list(self.missing(jobs))
        if not jobs or self.left() <= 0:
            return
        with ThreadPoolExecutor(self.options.workers) as pool:
            gpus = [n % self.options.gpus for n in range(len(jobs))]
            compiled = list(pool.map(lambda job, gpu: self.run(job, gpu, "--compile"), jobs, gpus))
        waiting = queue.SimpleQueue[tuple[Job, dict[str, Any]]]()
        for pair in zip(jobs, compiled, strict=True):
            waiting.put(pair)
        with ThreadPoolExecutor(self.options.gpus) as lanes:
            list(lanes.map(lambda gpu: self._measure(waiting, gpu), range(self.options.gpus)))

    def _measure(self, waiting: queue.SimpleQueue, gpu: int) -> None:
        lock = self.folder / f"lock-{gpu}"
        lock.touch()
        while self.left() > 0 and not waiting.empty():
            try:
                job, compiled = waiting.get_nowait()
            except queue.Empty:
                return
            found = compiled
            if "failed" not in compiled:
                found = self.run(job, gpu, "--lock", str(lock)) | compiled
            self._keep({"job": job.key, "gpu": gpu} | found)

    def _keep(self, line: dict[str, Any]) -> None:
        with self.writing, self.options.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
            print(json.dumps({k: v for k, v in line.items() if k != "losses"}), flush=True)
            if "failed" not in line:
                self.results[line["job"]] = line


def plain_text(path: Path, folder: Path) -> Path:
    """The text itself, or the beginning of one that is compressed by xz, unpacked into `folder`."""
    if path.suffix != ".xz":
        return path
    unpacked = folder / "text"
    with lzma.open(path) as file:
        unpacked.write_bytes(file.read(TEXT_BYTES))
    return unpacked


def comparisons(plan: list[list[Job]], results: dict[str, dict[str, Any]]) -> Iterator[dict]:
    """What the lines say about each other."""
    ours, trees, shipped, (*heads, room), twins, flagged = plan
    ms = {key: line["ms"] for key, line in results.items()}

    def ratio(what: str, slow: Job, fast: Job) -> Iterator[dict[str, Any]]:
        if slow.key in ms and fast.key in ms:
            yield {"compare": what, "row": fast.row, "times": round(ms[slow.key] / ms[fast.key], 3)}

    for job in ours:
        if job.tool == "bench_twin.py":
            yield from ratio(f"twin, {job.more[1]} / ours", job, Job(job.row))
    for new, old in zip(trees[::2], trees[1::2], strict=True):
        yield from ratio("before / now", old, new)
        yield from differences("now - before", new, old, results)
    count = len(shipped) // 3
    for number, job in enumerate(shipped[:count]):
        pair = shipped[count + 2 * number : count + 2 * number + 2]
        line, (four, five) = results.get(job.key), (ms.get(each.key) for each in pair)
        if line and four and five and line.get("patch_length"):
            mean = line["patch_length"]
            between = five + (1 / mean - 1 / 5) / (1 / 4 - 1 / 5) * (four - five)
            about = {"patch_length": mean, "patch_overflow": line["patch_overflow"]}
            times = round(line["ms"] / between, 3)
            yield {"compare": "as shipped / fixed patches", "row": job.row, "times": times} | about
    yield from ratio("heads of 64 / of 128", heads[1], heads[0])
    yield from differences("heads of 128 - of 64", heads[0], heads[1], results)
    yield from ratio("room of 1.5 times the mean / less", trees[-2], room)
    yield from differences("less room - more", room, trees[-2], results)
    yield from ratio("twin eager, before / now", twins[1], twins[0])
    for job in flagged:
        yield from ratio(f"without / with {job.flags}", Job(job.row), job)


def differences(
    what: str, new: Job, old: Job, results: dict[str, dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """How two lists of losses differ, in nats per byte."""
    if new.key not in results or old.key not in results:
        return
    pairs = list(zip(results[new.key]["losses"], results[old.key]["losses"], strict=True))
    each = [ours - theirs for ours, theirs in pairs]
    last = each[-max(1, len(each) // 4) :]
    yield {
        "compare": f"losses, {what}",
        "row": new.row,
        "steps": len(each),
        "largest": round(max(map(abs, each)), 6),
        "mean of the last quarter": round(sum(last) / len(last), 6),
    }


def main() -> None:
    """Prints one line per job, then the comparisons."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="TEXT", help="real text")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another tree of this project")
    parser.add_argument("--lines", type=Path, default=Path("speed.jsonl"))
    parser.add_argument("--cache", type=Path, help="compiled programs; keep it to go on quickly")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--workers", type=int, default=8, help="rows compiled side by side")
    parser.add_argument("--repeats", type=int, default=5, help="of ten steps each")
    parser.add_argument("--losses", type=int, default=200, help="steps whose losses are compared")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds of a process")
    parser.add_argument("--tiny", action="store_true", help="tiny recipes, for a CPU")
    options = parser.parse_args()
    plan = stages(options.tiny, options.losses)
    with tempfile.TemporaryDirectory() as name:
        folder = options.cache or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        options.data = plain_text(options.data, folder)
        runner = Runner(options, folder)
        for jobs in [[job for stage in plan for job in stage]] if options.tiny else plan:
            runner.stage(jobs)
    for line in comparisons(plan, runner.results):
        print(json.dumps(line), flush=True)
    left = [job.key for jobs in plan for job in runner.missing(jobs)]
    if left:
        print(json.dumps({"left": left}), flush=True)


if __name__ == "__main__":
    main()
