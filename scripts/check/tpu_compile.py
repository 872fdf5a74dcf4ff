#!/usr/bin/env python3
"""Compiles the train step of every recipe with a TPU's own compiler; needs libtpu, and no TPU.

    pip install 'bytelm[aot]'
    python scripts/check/tpu_compile.py --lines tpu.jsonl            # goes on where it stopped
    python scripts/check/tpu_compile.py --lines tpu.jsonl --table    # prints the lines as a table

Each cell is a process and one line of the file: memory of a chip, work against the model's own,
collectives. The first form of each family (jit, fsdp 1, its smallest recipe) is compiled in full
depth; the others with one layer in each stack and with two in one stack after another, from which
the figures of the full depth are extrapolated, and called so. Smaller recipes come first.
`--effort -1` compiles quickly and less well; what a line was compiled with stands in it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import fields, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bytelm import recipes
from bytelm.config.blt import EntropyConfig

FIGURES = ("arguments", "temporaries", "program", "flops", "kernel_flops", "written", "padding")


def stacks(config: Any) -> dict[str, int]:
    """Field → its number of layers; those of a nested entropy model as `entropy.layers`."""
    found = {f.name: getattr(config, f.name) for f in fields(config) if f.name.endswith("layers")}
    inner = config.entropy if "entropy" in {f.name for f in fields(config)} else None
    if isinstance(inner, EntropyConfig):
        found |= {f"entropy.{name}": size for name, size in stacks(inner).items()}
    return {name: size for name, size in found.items() if size > 0}


def with_depth(config: Any, depth: dict[str, int]) -> Any:
    """The configuration with these numbers of layers."""
    inner = {k.removeprefix("entropy."): v for k, v in depth.items() if k.startswith("entropy.")}
    changes = {k: v for k, v in depth.items() if "." not in k}
    if inner:
        changes["entropy"] = with_depth(config.entropy, inner)
    return replace(config, **changes)


def measure(name: str, form: Any, fsdp: int, rows: int, target: str, effort: float, full: bool):
    """The figures of one cell, extrapolated unless `full`."""
    model = recipes.get(name).model
    depth = stacks(model)
    compile_one = lambda depth: one_depth(name, form, fsdp, rows, target, effort, depth)  # noqa: E731
    if full or all(size <= 1 for size in depth.values()):
        return compile_one(depth) | {"depth": "full"}
    shallow = dict.fromkeys(depth, 1)
    base = compile_one(shallow)
    result = dict(base)
    keys = [k for k in base if isinstance(base[k], int | float)]
    for stack, size in depth.items():
        if size > 1:
            deeper = compile_one(shallow | {stack: 2})
            result |= {k: result[k] + (size - 1) * (deeper[k] - base[k]) for k in keys}
    return result | {"depth": "extrapolated"}


def one_depth(
    name: str, form: Any, fsdp: int, rows: int, target: str, effort: float, depth: dict[str, int]
) -> dict[str, Any]:
    """The compiler's figures for these numbers of layers."""
    from bytelm.config import training_flops_per_byte
    from bytelm_jax.tools import dry_run
    from bytelm_jax.tools.compiled import compile_lowered, topology_mesh
    from bytelm_jax.tools.targets import read_target

    where = read_target(target)
    recipe = recipes.get(name)
    run = replace(
        recipe.train, parallel=form, fsdp=fsdp, devices=where.devices, accumulation_steps=1,
        batch_size=rows * where.devices, compute_dtype="bfloat16",
    )  # fmt: skip
    recipe = replace(recipe, model=with_depth(recipe.model, depth), train=run)
    mesh = topology_mesh(where, fsdp)
    lowered = dry_run.lower_step(recipe, mesh, dry_run.abstract_state(recipe, mesh))
    options = {"exec_time_optimization_effort": effort} if effort else None
    compiled = compile_lowered(lowered, where.devices, options)
    if compiled is None:
        raise SystemExit("RESOURCE_EXHAUSTED: the step does not fit the chip")
    length = recipe.data.sequence_length
    found: dict[str, Any] = {key: getattr(compiled, key) for key in FIGURES}
    found["model_flops"] = training_flops_per_byte(recipe.model, length) * rows * length
    for each in compiled.collectives:
        found[each.kind] = found.get(each.kind, 0) + each.bytes
        found[f"{each.kind} count"] = found.get(f"{each.kind} count", 0) + each.count
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        found.setdefault(kind, 0)
        found.setdefault(f"{kind} count", 0)
    return found


def cells(names: list[str], rows: int, target: str, effort: float) -> list[dict[str, Any]]:
    """All cells, those of small models first."""
    sizes = {each.name: each.parameters for each in recipes.summaries()}
    found, families = [], set()
    for name in sorted(names, key=lambda name: sizes[name]):
        family = type(recipes.get(name).model).__name__
        for form in ("jit", "shard_map"):
            for fsdp in (1, 8):
                full = family not in families
                families.add(family)
                found.append(
                    {"name": name, "form": form, "fsdp": fsdp, "rows": rows, "target": target,
                     "effort": effort, "full": full}
                )  # fmt: skip
    return found


def run(lines: Path, todo: list[dict[str, Any]], seconds: int) -> None:
    """Measures what `lines` lacks, one process a cell."""
    from bytelm_jax.tools.compiled import ENVIRONMENT

    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    done = [each["cell"] for each in known]
    for cell in todo:
        if cell in done:
            continue
        begun = time.monotonic()
        try:
            answer = subprocess.run(
                [sys.executable, __file__, "--cell", json.dumps(cell)],
                env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{cell}: no answer in {seconds} s; left out", flush=True)
            continue
        if answer.returncode:
            print(f"{cell}: {answer.stderr.strip().splitlines()[-1:]}", flush=True)
            continue
        versions = {"jax": version("jax"), "libtpu": version("libtpu")}
        line = {"cell": cell, "date": date.today().isoformat(), **versions}
        line |= {"seconds": round(time.monotonic() - begun), **json.loads(answer.stdout)}
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{cell['name']} {cell['form']} fsdp {cell['fsdp']}: {line['seconds']} s", flush=True)


def table(lines: Path) -> str:
    """The lines as a Markdown table."""
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    head = "recipe | form | fsdp | depth | GiB a chip | GFLOP | the model's own | × | padding"
    head += " | all-reduce | all-gather | reduce-scatter"
    rows = [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for each in found:
        cell = each["cell"]
        peak = (each["arguments"] + each["temporaries"] + each["program"]) / 2**30
        work, own = each["flops"] / 1e9, each["model_flops"] / 1e9
        values = [cell["name"], cell["form"], cell["fsdp"], each["depth"], f"{peak:.2f}"]
        values += [f"{work:,.0f}", f"{own:,.0f}", f"{work / own:.2f}"]
        values += [f"{100 * each['padding'] / each['written']:.0f} %"]
        for kind in ("all-reduce", "all-gather", "reduce-scatter"):
            values.append(f"{each[kind] / 1e6:,.0f} MB in {each[f'{kind} count']}")
        rows.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(rows)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description="Compiles every recipe for a TPU.")
    parser.add_argument("recipes", nargs="*", help="recipes (default: all)")
    parser.add_argument("--lines", type=Path, default=Path("tpu_compile.jsonl"))
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch on each chip")
    parser.add_argument("--target", default="v5e:16x16")
    parser.add_argument("--effort", type=float, default=0, help="-1: quick, less optimised")
    parser.add_argument("--seconds", type=int, default=7200, help="most seconds of a cell")
    parser.add_argument("--table", action="store_true", help="print the lines as a table")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.cell:
        print(json.dumps(measure(**json.loads(asked.cell))))
    elif asked.table:
        print(table(asked.lines))
    else:
        names = asked.recipes or list(recipes.names())
        run(asked.lines, cells(names, asked.rows, asked.target, asked.effort), asked.seconds)


if __name__ == "__main__":
    main()
