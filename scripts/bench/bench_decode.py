"""What decoding kernels would bring on this GPU: one JSON line each, as they come, then verdicts.

    python scripts/bench/bench_decode.py
    python scripts/bench/bench_decode.py --tiny          # a check of the script itself, on a CPU

Forms of a byte (`bytelm_jax/kernels/decode_choice.py`): by XLA's operations, as shipped; with the
whole loop in a CUDA graph; with three or five Pallas kernels a layer and a kernel that draws; with
one row or two. Random weights in bfloat16, one text of 2,048 bytes of the documentation, 512 new
bytes at temperature 1, medians of `--repeats` after one call that compiles. Patches of BLT are
fixed, five bytes long, so that every form does the same work.

"generate" rows, the shipped form and the likeliest first: bytes per second; "same" says how many
bytes were those of the shipped form (in bfloat16 roundings part the texts). "exact" rows: the error
of one layer in float32, and whether a row is the same bits alone and among 4. "stack" rows:
microseconds a layer, for each of the models' stacks alone. "kernels" rows: kernels a byte and their
milliseconds, in a profile with graphs off.

Ends within `--seconds`: what does not fit is named. Keep a form whose verdict says "keep".
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bytelm import recipes
from bytelm.config import BLTConfig
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.compiled import split_cached
from bytelm_jax.inference.generate import generate
from bytelm_jax.inference.stored import stored_by_module, weights_to_store
from bytelm_jax.kernels.decode_choice import (
    ONE_BY_ONE,
    WHOLE_LOOP,
    DecodeForm,
    choose_form,
    decode_form,
    stored_weights,
)
from bytelm_jax.layers.attention import KeyValueCache
from bytelm_jax.models import cast_params, define_model

SHIPPED = "plain"
CHECKED = ("three", "five")
PARTS = ("generate", "exactness", "stacks", "kernels")
WORTH = 1.05
"""Times as fast as the shipped form from which on a form should be kept."""

MEGABYTE = {
    SHIPPED: DecodeForm(),
    "plain, loop in a graph": DecodeForm(options=WHOLE_LOOP),
    "three": DecodeForm("three", True, 1),
    "three, loop in a graph": DecodeForm("three", True, 1, WHOLE_LOOP),
    "five": DecodeForm("five", True, 1),
    "three, two rows": DecodeForm("three", True, 2),
    "three, XLA draws": DecodeForm("three", False, 1),
}
BLT = {
    SHIPPED: DecodeForm(),
    "plain, loop in a graph": DecodeForm(options=WHOLE_LOOP),
    "five": DecodeForm("five", True, 1),
    "five, loop in a graph": DecodeForm("five", True, 1, WHOLE_LOOP),
    "five, two rows": DecodeForm("five", True, 2),
}
PREDICTED = {
    "megabyte_132m": {SHIPPED: 4_700, "five": 8_500, "three": 10_500},
    "blt_767m": {SHIPPED: 1_500, "five": 2_500},
}
"""Bytes per second, from kernels counted by hand at 2.5 µs each and weights at 4 TB/s."""


class Model(NamedTuple):
    """A model, its recipe, and the shapes of its stacks: name, modules, width, cached positions."""

    name: str
    model: Any
    forms: dict[str, DecodeForm]
    stacks: list[tuple[str, Any, int, int]]


def build(name: str, new: int, context: int) -> Model:
    """Random weights in bfloat16; on a CPU in float32, with one layer in each stack."""
    config: Any = recipes.get(name).model
    if jax.default_backend() == "cpu":
        config = replace(config, **{f.name: 1 for f in fields(config) if f.name.endswith("layers")})
    if isinstance(config, BLTConfig):
        config = replace(
            config, patcher="fixed", patch_size=5, whole_characters=False, bytes_per_patch=5.0
        )
    elif config.max_length < context + new:
        config = replace(config, max_length=2 * context)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    bind, init = define_model(config)
    model = bind(jax.jit(lambda: cast_params(init(0), dtype))())
    if isinstance(config, BLTConfig):
        patches = config.budget(context + new)
        local, window = model.encoder.transformer, config.local_window
        stacks = [
            ("global", model.global_transformer, config.global_dim, patches),
            ("decoder", model.decoder.transformer, config.local_dim, 2 * window),
            ("encoder", local, config.local_dim, 2 * window),
        ]
        return Model(name, model, BLT, stacks)
    patches = (context + new) // config.patch_size
    stacks = [
        ("global", model.global_transformer, config.global_width, patches),
        ("local", model.local_transformer, config.local_dim, config.patch_size),
    ]
    return Model(name, model, MEGABYTE, stacks)


def checked(each: Model) -> list[str]:
    """The forms of a layer that the model has, the likeliest first."""
    return [form for form in CHECKED if form in each.forms]


def in_form(form: DecodeForm, call: Callable[[], Any]) -> Any:
    """`call()` in this form; in Pallas' interpreter on a CPU."""
    with choose_form(form, interpret=jax.default_backend() == "cpu"):
        return call()


def timed(call: Callable[[], Any], repeats: int) -> float:
    """Seconds, the median of several calls after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def check_generate(
    each: Model, name: str, before: dict[str, Any], text: bytes, new: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """One line about a form; `before` keeps text and seconds of the first, the shipped one."""
    found: list[bytes] = []

    def call() -> None:
        found[:] = generate(each.model, [text], new, SamplerConfig(), 0, False)

    begun = time.perf_counter()
    seconds = in_form(each.forms[name], partial(timed, call, repeats))
    first, shipped = before.setdefault(each.name, (found[0], seconds))
    yield {
        "row": "generate",
        "model": each.name,
        "form": name,
        "bytes_per_second": round(new / seconds, 1),
        "microseconds_a_byte": round(1e6 * seconds / new, 1),
        "times_shipped": round(shipped / seconds, 3),
        "predicted": PREDICTED.get(each.name, {}).get(name),
        "same": next((i for i in range(new) if found[0][i] != first[i]), new),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def count_kernels(each: Model, text: bytes, new: int) -> Iterator[dict[str, Any]]:
    """Kernels of a byte, and which take longest, of the shipped form and of the last but one."""
    for name in (SHIPPED, checked(each)[0]):
        form = each.forms[name]._replace(options=ONE_BY_ONE)

        def call() -> None:
            generate(each.model, [text], new, SamplerConfig(), 0, False)

        in_form(form, call)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                in_form(form, call)
            kernels = kernel_events(Path(folder))
        total = sum(ms for _, ms in kernels.values())
        longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:25]
        yield {
            "row": "kernels",
            "model": each.name,
            "form": name,
            "kernels": round(sum(count for count, _ in kernels.values()) / new, 1),
            "kernel_ms": round(total / new, 4),
            "longest": {
                key: [round(count / new, 2), round(1000 * ms / max(count, 1), 2)]
                for key, (count, ms) in longest
            },
        }


def kernel_events(folder: Path) -> dict[str, tuple[int, float]]:
    """How often each kernel ran, and its milliseconds; prefill included."""
    kernels: dict[str, tuple[int, float]] = {}
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines if plane.name.startswith("/device:") else ():
                for event in line.events if line.name.startswith("Stream") else ():
                    name = event.name.rstrip("0123456789_.")
                    count, ms = kernels.get(name, (0, 0.0))
                    kernels[name] = (count + 1, ms + event.duration_ns / 1e6)
    return kernels


def check_stacks(each: Model, repeats: int) -> Iterator[dict[str, Any]]:
    """Microseconds a layer, of every stack by itself, in a loop of 32 positions."""
    steps = 32 if jax.default_backend() == "gpu" else 2
    kinds = [SHIPPED, *checked(each)]
    for (stack_name, stack, width, length), name in (
        (stack, name) for stack in each.stacks for name in kinds
    ):
        form = each.forms[name]
        rows, dtype = form.min_rows, each.model.to_logits.kernel[...].dtype
        run = in_form(form, partial(stack_program, stack, rows, width, length, steps, dtype))
        seconds = in_form(form, partial(timed, run, repeats))
        yield {
            "row": "stack",
            "model": each.name,
            "stack": stack_name,
            "form": name,
            "rows": rows,
            "microseconds_a_layer": round(1e6 * seconds / steps / len(stack.layers), 2),
            "floor": round(floor(stack), 2),
        }


def floor(stack: Any) -> float:
    """Microseconds a layer that reading its weights takes at 4 TB/s."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(stack)))
    return 1e6 * size / len(stack.layers) / 4e12


def stack_program(
    stack: Any, rows: int, width: int, length: int, steps: int, dtype: Any
) -> Callable[[], Any]:
    """A call that sends one position of each row through the stack, `steps` times."""
    structure, params = split_cached(stack)
    weights = weights_to_store(structure, decode_form(), rows)(params)
    x = 0.02 * jax.random.normal(jax.random.key(0), (rows, 1, width), dtype)
    caches = jax.jit(lambda: stack.empty_caches(rows, length, dtype))()

    @jax.jit
    def program(params: Any, weights: Any, x: Any, caches: tuple[KeyValueCache, ...]) -> Any:
        module = structure.model(params)
        with stored_weights(stored_by_module(module, weights)):

            def step(number: Any, carry: Any) -> Any:
                x, caches = carry
                index = jnp.full((rows,), length // 2, jnp.int32) + number % (length // 2)
                out, caches = module.extend(x, caches, index)
                return (out / (1 + jnp.abs(out).max())).astype(x.dtype), caches

            return jax.lax.fori_loop(0, steps, step, (x, caches))

    return lambda: program(params, weights, x, caches)


def check_exactness(each: Model) -> Iterator[dict[str, Any]]:
    """One layer of each stack in float32: its error, and a row among others."""
    for stack_name, stack, width, length in each.stacks:
        layer = nnx.clone(stack)
        layer.layers = nnx.List(layer.layers[:1])
        graph, state = nnx.split(layer)
        layer = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), state))
        for name in checked(each):
            outs = {}
            with jax.default_matmul_precision("highest"):
                for rows in (1, 4):
                    outs[rows] = in_form(
                        each.forms[name], partial(one_step, layer, rows, width, length)
                    )
                reference = in_form(DecodeForm(), partial(one_step, layer, 4, width, length))
            error = np.linalg.norm(outs[4] - reference) / np.linalg.norm(reference)
            yield {
                "row": "exact",
                "model": each.name,
                "stack": stack_name,
                "form": name,
                "error": float(f"{error:.2e}"),
                "rows_equal": bool((outs[1] == outs[4][:1]).all()),
            }


def one_step(layer: Any, rows: int, width: int, length: int) -> np.ndarray:
    """One position of the first `rows` of four texts, after others in the cache."""
    structure, params = split_cached(layer)
    weights = weights_to_store(structure, decode_form(), rows)(params)
    source = np.random.default_rng(0)
    x = source.normal(size=(4, 1, width)).astype(np.float32)[:rows]
    template = jax.eval_shape(lambda: layer.empty_caches(4, length, jnp.float32))
    caches = jax.tree.map(
        lambda leaf: source.normal(size=leaf.shape).astype(np.float32)[:rows], template
    )

    @jax.jit
    def program(params: Any, weights: Any, x: Any, caches: Any) -> Any:
        module = structure.model(params)
        with stored_weights(stored_by_module(module, weights)):
            return module.extend(x, caches, jnp.full((rows,), length // 2, jnp.int32))[0]

    return np.asarray(program(params, weights, x, caches))


def verdicts(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One line per form of each model: keep it, or delete it."""
    for row in rows:
        if row["row"] == "generate" and row["form"] != SHIPPED:
            gain = row["times_shipped"]
            sound = all(
                other["error"] <= 1e-5
                for other in rows
                if other["row"] == "exact"
                and other["model"] == row["model"]
                and row["form"].startswith(other["form"])
            )
            verdict = "keep" if gain >= WORTH and sound else "delete" if sound else "wrong"
            yield {"verdict": verdict, "model": row["model"], "form": row["form"], "times": gain}


def parts_of(
    models: list[Model], text: bytes, new: int, repeats: int
) -> Iterator[tuple[str, str, Iterator[dict[str, Any]]]]:
    """The name of a part, its model and its lines, what decides most first."""
    before: dict[str, Any] = {}
    first = [(m, form) for m in models for form in (SHIPPED, checked(m)[0])]
    rest = [(m, form) for m in models for form in m.forms if form not in (SHIPPED, checked(m)[0])]
    for each, form in first:
        yield "generate", each.name, check_generate(each, form, before, text, new, repeats)
    for each in models:
        yield "exactness", each.name, check_exactness(each)
    for each, form in rest:
        yield "generate", each.name, check_generate(each, form, before, text, new, repeats)
    for each in models:
        yield "stacks", each.name, check_stacks(each, repeats)
    for each in models:
        yield "kernels", each.name, count_kernels(each, text, min(new, 128))


def main() -> None:
    """Prints lines as they come."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--models", nargs="+", default=["megabyte_132m", "blt_767m"])
    parser.add_argument("--bytes", type=int, default=512)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a CPU")
    options = parser.parse_args()
    if options.tiny:
        options.models = [f"{name.split('_')[0]}_tiny" for name in options.models]
        options.bytes, options.context = 4, 32
        options.repeats, options.seconds = 1, 1e9
    begun, rows = time.perf_counter(), []
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps(machine | {"date": time.strftime("%Y-%m-%d")}), flush=True)
    text = (Path(__file__).parents[2] / "docs" / "measured.md").read_bytes()[: options.context]
    models = [build(name, options.bytes, options.context) for name in options.models]
    if options.tiny:  # what tells the others apart is for a GPU's compiler
        models = [
            m._replace(forms={k: m.forms[k] for k in ("plain", *CHECKED) if k in m.forms})
            for m in models
        ]
    for part, name, lines in parts_of(models, text, options.bytes, options.repeats):
        while part in options.parts:
            if time.perf_counter() - begun > options.seconds:
                print(json.dumps({"skipped": part, "model": name}), flush=True)
                break
            try:
                row = next(lines, None)
            except Exception as error:  # a form that a compiler refuses costs its own part alone
                row = {"row": "failed", "part": part, "model": name, "error": str(error)[:500]}
            if row is None:
                break
            rows.append(row)
            print(json.dumps(row), flush=True)
    for row in verdicts(rows):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
