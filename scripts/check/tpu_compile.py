#!/usr/bin/env python3
"""Compiles the train step of every recipe with a TPU's own compiler; needs libtpu, and no TPU.

    pip install 'bytelm[aot]'
    python scripts/check/tpu_compile.py            # continues with what its lines lack
    python scripts/check/tpu_compile.py --table    # prints the lines as a table
    python scripts/check/tpu_compile.py --estimate # renews the dry run's estimates in the lines

Each recipe is a process, and each cell (a form, a size of fsdp) a line of the file: memory of a
chip and the dry run's estimate of it, work against the model's own, collectives. With
`--extrapolate`, recipes of many layers are compiled with one layer in each stack and with two in
one stack after another, from which the figures of the full depth are extrapolated, and called so;
memory is not linear in depth (by up to 34 % for `entropy_100m`). `--layers` compiles depths of your
choice. Smaller recipes come first. `--effort -1` compiles quickly and less well; what a line was
compiled with stands in it.
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

FIGURES = ("arguments", "temporaries", "program", "in_use", "written", "padding")
LINES = Path(__file__).with_suffix(".jsonl")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class DoesNotFit(Exception):
    """The compiler says that a step needs more memory than a chip has."""


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


def depths(cell: dict[str, Any]) -> dict[str, int]:
    """The stacks of a cell and their layers."""
    return stacks(recipes.get(cell["name"]).model) | cell.get("layers", {})


def measure(cell: dict[str, Any], extrapolate: bool) -> dict[str, Any]:
    """The figures of one cell, extrapolated if that takes fewer layers than compiling all."""
    depth = depths(cell)
    if "layers" in cell:
        named = ", ".join(f"{size} {stack}" for stack, size in cell["layers"].items())
        return one_depth(cell, depth) | {"depth": named}
    deep = [stack for stack, size in depth.items() if size > 1]
    # Compiled for an extrapolation: one layer of each, and as many and one for each deep stack.
    if not extrapolate or sum(depth.values()) <= len(depth) * (1 + len(deep)) + len(deep):
        return one_depth(cell, depth) | {"depth": "full"}
    shallow = dict.fromkeys(depth, 1)
    base = one_depth(cell, shallow)
    result = dict(base)
    for stack in deep:
        deeper = one_depth(cell, shallow | {stack: 2})
        result |= {k: result[k] + (depth[stack] - 1) * (deeper[k] - base[k]) for k in base}
    return result | {"depth": "extrapolated", "estimated": estimate(cell)}


def estimate(cell: dict[str, Any]) -> int:
    """The dry run's estimate of a chip's memory, without a compiler."""
    from bytelm_jax.tools import dry_run

    recipe, mesh = shaped(cell, depths(cell))
    return dry_run.tpu_peak(recipe, mesh, dry_run.abstract_state(recipe, mesh))


def shaped(cell: dict[str, Any], depth: dict[str, int]) -> tuple[Any, Any]:
    """The recipe of a cell with these numbers of layers, and its mesh."""
    from bytelm_jax.tools.compiled import topology_mesh
    from bytelm_jax.tools.targets import read_target

    target, recipe = read_target(cell["target"]), recipes.get(cell["name"])
    run = replace(
        recipe.train, parallel=cell["form"], fsdp=cell["fsdp"], devices=target.devices,
        accumulation_steps=1, batch_size=cell["rows"] * target.devices, compute_dtype="bfloat16",
        tensor=cell.get("tensor", 1),
    )  # fmt: skip
    recipe = replace(recipe, model=with_depth(recipe.model, depth), train=run)
    return recipe, topology_mesh(target, run.fsdp, run.tensor)


def one_depth(cell: dict[str, Any], depth: dict[str, int]) -> dict[str, Any]:
    """The compiler's figures for these numbers of layers."""
    from bytelm.config import training_flops_per_byte
    from bytelm.config.models import executed_training_flops_per_byte
    from bytelm_jax.tools import dry_run
    from bytelm_jax.tools.compiled import compile_lowered

    recipe, mesh = shaped(cell, depth)
    state = dry_run.abstract_state(recipe, mesh)
    lowered = dry_run.lower_step(recipe, mesh, state)
    effort = cell["effort"]
    options = {"exec_time_optimization_effort": effort} if effort else None
    compiled = compile_lowered(lowered, mesh.size, options)
    if compiled is None:
        raise DoesNotFit
    length = recipe.data.sequence_length
    count = recipe.train.batch_size * length // mesh.size
    found: dict[str, Any] = {key: getattr(compiled, key) for key in FIGURES}
    found |= compiled.work._asdict()
    found["estimated"] = dry_run.tpu_peak(recipe, mesh, state)
    found["model_flops"] = training_flops_per_byte(recipe.model, length) * count
    found["executed_flops"] = executed_training_flops_per_byte(recipe.model, length) * count
    found |= dict.fromkeys((*KINDS, *(f"{kind} count" for kind in KINDS)), 0)
    for each in compiled.collectives:
        found[each.kind] += each.bytes
        found[f"{each.kind} count"] += each.count
    return found


def stack_and_size(text: str) -> tuple[str, int]:
    """`STACK=N` of the command line."""
    stack, _, size = text.partition("=")
    return stack, int(size)


def cells(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells that are asked for, those of small models first."""
    names = asked.recipes or list(recipes.names())
    rest = {"rows": asked.rows, "target": asked.target, "effort": asked.effort}
    rest |= {"tensor": asked.tensor} if asked.tensor > 1 else {}
    rest |= {"layers": dict(asked.layers)} if asked.layers else {}
    sizes = {each.name: each.parameters for each in recipes.summaries()}
    found = [
        {"name": name, "form": form, "fsdp": fsdp} | rest
        for name in sorted(names, key=lambda name: sizes[name])
        for form in asked.forms
        for fsdp in asked.fsdp
    ]
    if asked.shallow:
        found = [cell | {"layers": dict.fromkeys(depths(cell), 1)} for cell in found]
    return found


def renew_estimates(lines: Path) -> None:
    """Estimates every cell again."""
    found = [line | {"estimated": estimate(line["cell"])} for line in read_lines(lines)]
    lines.write_text("".join(json.dumps(line) + "\n" for line in found))


def run(lines: Path, todo: list[dict[str, Any]], seconds: int, extrapolate: bool) -> None:
    """Measures what `lines` lacks, in one process for each recipe."""
    from bytelm_jax.tools.compiled import ENVIRONMENT

    known = read_lines(lines)
    missing = [cell for cell in todo if cell not in [each["cell"] for each in known]]
    for name in dict.fromkeys(cell["name"] for cell in missing):
        own = [cell for cell in missing if cell["name"] == name]
        command = [sys.executable, __file__, "--lines", str(lines), "--cells", json.dumps(own)]
        command += ["--extrapolate"] if extrapolate else []
        try:
            answer = subprocess.run(
                command, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True,
                timeout=seconds * len(own),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{name}: no answer in {seconds} s for each cell; left out", flush=True)
            continue
        if answer.returncode:
            print(f"{name}: {answer.stderr.strip().splitlines()[-1:]}", flush=True)


def measure_all(lines: Path, todo: list[dict[str, Any]], extrapolate: bool) -> None:
    """Measures these cells in this process, and adds a line for each."""
    versions = {"jax": version("jax"), "libtpu": version("libtpu")}
    for cell in todo:
        begun = time.process_time()
        what = f"{cell['name']} {cell['form']} fsdp {cell['fsdp']}"
        try:
            found = measure(cell, extrapolate)
        except DoesNotFit:
            print(f"{what}: does not fit the chip; left out", flush=True)
            continue
        seconds = round(time.process_time() - begun)
        line = {"cell": cell, "date": date.today().isoformat(), **versions, "cpu": seconds, **found}
        with lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{what}: {seconds} CPU-s", flush=True)


def read_lines(lines: Path) -> list[dict[str, Any]]:
    """What was measured before."""
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


HEAD = (
    "recipe", "form", "fsdp", "depth", "GiB", "in use", "estimated", "GFLOP",
    "of them in kernels", "by element", "/ own", "/ executed", "padding", "all-reduce",
    "all-gather", "reduce-scatter",
)  # fmt: skip


def table(lines: Path) -> str:
    """The lines as a Markdown table, those of a recipe together."""
    found = read_lines(lines)
    order = {name: at for at, name in enumerate(dict.fromkeys(x["cell"]["name"] for x in found))}
    found.sort(key=lambda x: (order[x["cell"]["name"]], x["cell"]["form"], x["cell"]["fsdp"]))
    rows = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    for each in found:
        cell, work = each["cell"], each["products"] + each["kernels"] + each["elementwise"]
        peak = each["arguments"] + each["temporaries"] + each["program"]
        values = [cell["name"], cell["form"], cell["fsdp"], each["depth"], f"{peak / 2**30:.2f}"]
        known = "in_use" in each and each["depth"] != "extrapolated"  # holes are not linear
        values += [f"{each['in_use'] / 2**30:.2f}" if known else "–"]
        values += [f"{100 * (each['estimated'] / peak - 1):+.0f} %", f"{work / 1e9:,.1f}"]
        values += [f"{100 * each[part] / work:.0f} %" for part in ("kernels", "elementwise")]
        values += [f"{work / each[part]:.2f}" for part in ("model_flops", "executed_flops")]
        values += [f"{100 * each['padding'] / each['written']:.0f} %"]
        for kind in KINDS[:3]:
            values.append(f"{each[kind] / 1e6:,.0f} MB in {each[f'{kind} count']}")
        rows.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(rows)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description="Compiles every recipe for a TPU.")
    parser.add_argument("recipes", nargs="*", help="recipes (default: all)")
    parser.add_argument("--lines", type=Path, default=LINES)
    parser.add_argument("--forms", nargs="+", default=["jit", "shard_map"])
    parser.add_argument("--fsdp", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4, help="rows of the batch on each chip")
    parser.add_argument("--target", default="v5e:16x16")
    parser.add_argument("--effort", type=float, default=0, help="-1: quick, less optimised")
    parser.add_argument("--seconds", type=int, default=7200, help="most seconds for each cell")
    parser.add_argument(
        "--layers", nargs="+", type=stack_and_size, metavar="STACK=N",
        help="compile these numbers of layers, as global_layers=9, and extrapolate nothing",
    )  # fmt: skip
    parser.add_argument(
        "--shallow", action="store_true", help="compile one layer of each stack, and no more"
    )
    parser.add_argument("--table", action="store_true", help="print the lines as a table")
    parser.add_argument(
        "--extrapolate", action="store_true", help="compile few layers of deep recipes"
    )
    parser.add_argument("--estimate", action="store_true", help="renew the estimates in the lines")
    parser.add_argument("--cells", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.cells and asked.estimate:
        renew_estimates(asked.lines)
    elif asked.cells:
        measure_all(asked.lines, json.loads(asked.cells), asked.extrapolate)
    elif asked.estimate:
        from bytelm_jax.tools.compiled import ENVIRONMENT

        command = [sys.executable, __file__, "--lines", str(asked.lines), "--cells", "[]"]
        subprocess.run([*command, "--estimate"], env=os.environ | ENVIRONMENT, check=True)
    elif asked.table:
        print(table(asked.lines))
    else:
        run(asked.lines, cells(asked), asked.seconds, asked.extrapolate)


if __name__ == "__main__":
    main()
