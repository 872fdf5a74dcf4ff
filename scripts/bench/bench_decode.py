"""Forms of decoding one text on this GPU: one JSON line per result, what decides most first.

    git archive main bytelm bytelm_jax | tar -x -C BEFORE
    python scripts/bench/bench_decode.py --out lines.jsonl --before BEFORE
    python scripts/bench/bench_decode.py --tiny        # a check of the script itself, on a CPU

Random weights in bfloat16, one text, `--bytes` new bytes after a prompt of `--context`, prefill
included, medians of three calls after one that compiles. Patches of BLT are four bytes long, so
that every form does the same work; "entropy" has a patcher whose threshold makes them so on random
letters. Forms (`bytelm_jax/kernels/decode_choice.py`): "before" is an earlier tree, "plain" this
one without stored weights, "sums" with them.

Every form is a process of its own. Those of a wave compile at the same time and are then measured
one after the other; a form that fails, or is not ready in time, is a line and ends nothing. Rows:

- "generate": bytes per second; how many times those of "before" (or of "plain"); kernels of the
  compiled loop, a round's and those of a patch that ends; a digest of the text.
- "layers": microseconds of a layer of a stack by itself; its error against "plain" in float32, and
  whether a row is the same bits alone and among four.

Ends within `--seconds`.
"""

import argparse
import hashlib
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MEGABYTE, BLT = "megabyte_132m", "blt_767m"
FORMS = {
    "before": None,
    "plain": "plain",
    "sums": "sums",
}
"""What `choose_form` is given; None: another tree."""


class Job(NamedTuple):
    """What one process measures."""

    row: str
    model: str
    form: str
    temperature: float = 1.0
    patcher: str = "fixed"


def waves() -> list[list[Job]]:
    """Jobs whose programs are compiled together."""
    first = [Job("generate", m, f) for m in (MEGABYTE, BLT) for f in ("before", "plain", "sums")]
    second = [Job("generate", BLT, form, 1.0, "entropy") for form in ("before", "plain", "sums")]
    second += [Job("generate", m, f, 0.0) for m in (MEGABYTE, BLT) for f in ("before", "sums")]
    second += [Job("layers", m, form) for m in (MEGABYTE, BLT) for form in ("plain", "sums")]
    return [first, second]


# ---- one process ------------------------------------------------------------------------------


def build(job: Job, tiny: bool, context: int, new: int) -> Any:
    """The model, with random weights; in float32 and tiny on a CPU."""
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from bytelm import recipes
    from bytelm_jax.models import cast_params, define_model

    config: Any = recipes.get(job.model.split("_")[0] + "_tiny" if tiny else job.model).model
    if job.model == BLT:
        config = replace(config, patcher=job.patcher, whole_characters=False, bytes_per_patch=4.0)
        if job.patcher == "fixed":
            config = replace(config, patch_size=4)
    else:
        config = replace(config, max_length=max(config.max_length, context + new))
    bind, init = define_model(config)
    dtype = jnp.float32 if tiny else jnp.bfloat16
    params = jax.jit(lambda: cast_params(init(0), dtype))()
    if job.patcher == "entropy":
        scores = jax.jit(lambda params, ids: bind(params).entropies(ids))(params, letters(context))
        bind, _ = define_model(replace(config, threshold=float(jnp.quantile(scores, 0.75))))
    return bind(params)


def letters(count: int) -> Any:
    """Random letters, digits and signs as ids [1, count]."""
    import numpy as np

    return np.random.default_rng(0).integers(32, 127, (1, count), np.int32)


def in_form(form: str) -> Any:
    """The context in which programs are traced in this form."""
    import contextlib

    if FORMS[form] is None:
        return contextlib.nullcontext()
    from bytelm_jax.kernels.decode_choice import choose_form

    return choose_form(FORMS[form])


def generation(job: Job, tiny: bool, context: int, new: int) -> Callable[[], dict[str, Any]]:
    """What measures the job's generation, once its programs are compiled."""
    from bytelm.sampling import SamplerConfig
    from bytelm_jax.inference.generate import generate

    model, prompt = build(job, tiny, context, new), bytes(letters(context)[0].tolist())
    sampler, found = SamplerConfig(temperature=job.temperature), [b""]

    def call() -> None:
        found[:] = generate(model, [prompt], new, sampler, 0, False)

    with in_form(job.form):
        call()

    def measure() -> dict[str, Any]:
        with in_form(job.form):
            seconds = median(call, 1 if tiny else 3)
        digest = hashlib.blake2b(found[0], digest_size=4).hexdigest()
        speed = {"bytes_per_second": round(new / seconds, 1), "text": digest}
        return speed | kernels(Path(os.environ.get("DECODE_DUMP", "/nowhere")))

    return measure


def median(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def layers(job: Job, tiny: bool) -> Callable[[], dict[str, Any]]:
    """What measures a layer of each of the model's stacks."""
    import jax

    model, measured = build(job, tiny, 64, 64), []
    blocks = {"global": model.global_transformer}
    if job.model == BLT:
        blocks |= {"decoder": model.decoder.transformer}
    else:
        blocks |= {"local": model.local_transformer}
    for name, stack in blocks.items():
        with in_form(job.form):
            rows = 2 if job.form == "plain" else 1
            program = stack_program(stack, rows, 8 if name == "local" else 512, 1 if tiny else 32)
            jax.block_until_ready(program())
        measured.append((name, stack, program))

    def measure() -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, stack, program in measured:
            seconds = median(lambda p=program: jax.block_until_ready(p()), 5)
            steps = 1 if tiny else 32
            out[name] = {"microseconds": round(1e6 * seconds / steps / len(stack.layers), 2)}
            if job.form != "plain":
                out[name] |= exactness(stack, job.form)
        return out

    return measure


def stack_program(stack: Any, rows: int, length: int, steps: int) -> Callable[[], Any]:
    """A call that sends one position of each row through the stack, `steps` times."""
    import jax
    import jax.numpy as jnp

    from bytelm_jax.inference.compiled import split_cached
    from bytelm_jax.inference.stored import stored_by_module, weights_to_store
    from bytelm_jax.kernels.decode_choice import stored_weights

    structure, params = split_cached(stack)
    weights = weights_to_store(structure, params, rows)
    width, dtype = stack.layers[0].attention.to_q.kernel.shape[0], params[0].dtype
    x = 0.02 * jax.random.normal(jax.random.key(0), (rows, 1, width), dtype)
    caches = jax.jit(lambda: stack.empty_caches(rows, length, dtype))()

    @jax.jit
    def program(params: Any, weights: Any, x: Any, caches: Any) -> Any:
        module = structure.model(params)
        with stored_weights(stored_by_module(module, weights)):

            def step(number: Any, carry: Any) -> Any:
                x, caches = carry
                index = jnp.full((rows,), length // 2, jnp.int32) + number % (length // 2)
                out, caches = module.extend(x, caches, index)
                return (out / (1 + jnp.abs(out).max())).astype(x.dtype), caches

            return jax.lax.fori_loop(0, steps, step, (x, caches))

    return lambda: program(params, weights, x, caches)


def exactness(stack: Any, form: str) -> dict[str, Any]:
    """One layer in float32: its error, and a row among others."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    layer = nnx.clone(stack)
    layer.layers = nnx.List(layer.layers[:1])
    graph, state = nnx.split(layer)
    layer, outs = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), state)), {}
    with jax.default_matmul_precision("highest"):
        for name, rows in (("plain", 4), (form, 4), (form, 1)):
            with in_form(name):
                outs[name, rows] = one_step(layer, rows)
    error = np.linalg.norm(outs[form, 4] - outs["plain", 4]) / np.linalg.norm(outs["plain", 4])
    equal = bool((outs[form, 1] == outs[form, 4][:1]).all())
    return {"error": float(f"{error:.2e}"), "rows_equal": equal}


def one_step(layer: Any, rows: int, length: int = 64) -> Any:
    """One position of the first `rows` of four texts, after others in the cache."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bytelm_jax.inference.compiled import split_cached
    from bytelm_jax.inference.stored import stored_by_module, weights_to_store
    from bytelm_jax.kernels.decode_choice import stored_weights

    structure, params = split_cached(layer)
    weights = weights_to_store(structure, params, rows)
    source = np.random.default_rng(0)
    width = layer.layers[0].attention.to_q.kernel.shape[0]
    x = source.normal(size=(4, 1, width)).astype(np.float32)[:rows]
    template = jax.eval_shape(lambda: layer.empty_caches(4, length, jnp.float32))
    fill = lambda leaf: source.normal(size=leaf.shape).astype(np.float32)[:rows]  # noqa: E731
    caches = jax.tree.map(fill, template)

    @jax.jit
    def program(params: Any, weights: Any, x: Any, caches: Any) -> Any:
        module = structure.model(params)
        with stored_weights(stored_by_module(module, weights)):
            return module.extend(x, caches, jnp.full((rows,), length // 2, jnp.int32))[0]

    return np.asarray(program(params, weights, x, caches))


def kernels(folder: Path) -> dict[str, int]:
    """Kernels of the loop that XLA dumped there: of a round, and those of a patch that ends."""
    texts = [path.read_text() for path in folder.glob("*jit_append*gpu_after_optimizations.txt")]
    if not texts:
        return {}
    lines: dict[str, list[str]] = {}
    name = ""
    for line in max(texts, key=len).splitlines():
        start = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start:
            name = start.group(1)
        elif " = " in line:
            lines.setdefault(name, []).append(line)
    bodies = [m.group(1) for text in lines.values() for m in map(BODY.search, text) if m]
    rounds = max((lines[body] for body in bodies), key=len)
    branches = [m.group(1) for m in map(BRANCH.search, rounds) if m]
    return {
        "kernels_a_round": sum(map(is_kernel, rounds)),
        "kernels_a_patch": max((sum(map(is_kernel, lines[b])) for b in branches), default=0),
    }


BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
BRANCH = re.compile(r" conditional\(.*true_computation=%?([\w.\-]+)")
KERNEL = re.compile(r" (fusion|custom-call|copy|scatter|sort|reduce|transpose|concatenate)\(")


def is_kernel(line: str) -> bool:
    """Whether the instruction is one that a GPU starts."""
    return bool(KERNEL.search(line))


def work(options: argparse.Namespace) -> None:
    """Compiles, says "ready", waits for a line on standard input, measures and prints."""
    job = Job(**json.loads(options.job))
    start = time.perf_counter()
    if job.row == "generate":
        measure = generation(job, options.tiny, options.context, options.bytes)
    else:
        measure = layers(job, options.tiny)
    compiled = round(time.perf_counter() - start, 1)
    print("ready", flush=True)
    sys.stdin.readline()
    import jax

    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(measure() | {"seconds_until_ready": compiled} | about), flush=True)


# ---- all of them ------------------------------------------------------------------------------


class Worker(NamedTuple):
    """A process, and where it writes its errors."""

    job: Job
    process: Any
    errors: Path


def launch(job: Job, options: argparse.Namespace, folder: Path) -> Worker:
    """Starts a process that compiles."""
    here = Path(__file__).parents[2]
    tree = options.before if job.form == "before" else here
    name = hashlib.blake2b(repr(job).encode(), digest_size=6).hexdigest()
    dump, errors = folder / name, folder / f"{name}.txt"
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*append.*"
    environment = os.environ | {
        "PYTHONPATH": str(Path(tree).resolve()),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "DECODE_DUMP": str(dump),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
    }
    arguments = [f"--context={options.context}", f"--bytes={options.bytes}"]
    process = subprocess.Popen(
        [sys.executable, __file__, "--job", json.dumps(job._asdict()), *arguments]
        + ["--tiny"] * options.tiny,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors.open("w"),
        text=True,
        bufsize=1,
    )
    return Worker(job, process, errors)


def next_line(worker: Worker, seconds: float) -> str | None:
    """What the process prints next; None if it ends or is late."""
    if not select.select([worker.process.stdout], [], [], max(0.0, seconds))[0]:
        return None
    return worker.process.stdout.readline().strip() or None


def result(worker: Worker, until: float, is_ready: bool) -> dict[str, Any]:
    """The job's line."""
    found = None
    if is_ready:
        worker.process.stdin.write("go\n")
        found = next_line(worker, until - time.monotonic())
    row: dict[str, Any] = worker.job._asdict()
    if found:
        return row | json.loads(found)
    try:  # what has failed is about to end
        late = worker.process.wait(timeout=2) is None
    except subprocess.TimeoutExpired:
        late = True
        worker.process.kill()
        worker.process.wait()
    last = worker.errors.read_text().strip().splitlines()[-3:]
    return row | {"failed": "not in time" if late else " | ".join(last)[-600:]}


def main() -> None:
    """Prints lines as they come."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--out", type=Path, help="a file for the lines, beside standard output")
    parser.add_argument("--before", type=Path, help="a folder with an earlier tree's packages")
    parser.add_argument("--bytes", type=int, default=1024)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=195.0)
    parser.add_argument("--wave", type=float, default=80.0, help="seconds a wave may compile")
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a CPU")
    parser.add_argument("--only", nargs="+", help="models")
    parser.add_argument("--forms", nargs="+", choices=[*FORMS])
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.context, options.bytes = 32, 8
    if options.job:
        return work(options)
    begun, speeds = time.monotonic(), {}
    end = begun + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        for wave in waves():
            wave = [job for job in wave if wanted(job, options)]
            workers = [launch(job, options, Path(folder)) for job in wave]
            limit = min(end, time.monotonic() + options.wave)
            ready = [next_line(w, limit - time.monotonic()) == "ready" for w in workers]
            for worker, is_ready in zip(workers, ready, strict=True):
                row = result(worker, end, is_ready)
                compare(row, speeds)
                text = json.dumps(row | {"at": round(time.monotonic() - begun, 1)})
                print(text, flush=True)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(text + "\n")


def wanted(job: Job, options: argparse.Namespace) -> bool:
    """Whether this job can be measured, and was asked for."""
    if job.form == "before" and options.before is None:
        return False
    right_form = options.forms is None or job.form in options.forms
    return right_form and (options.only is None or job.model in options.only)


def compare(row: dict[str, Any], speeds: dict[Any, float]) -> None:
    """Adds how many times as fast a form is as the first one of the same work."""
    if "bytes_per_second" in row:
        same = row["model"], row["temperature"], row["patcher"]
        base = speeds.setdefault(same, row["bytes_per_second"])
        row["times_first"] = round(row["bytes_per_second"] / base, 3)


if __name__ == "__main__":
    main()
