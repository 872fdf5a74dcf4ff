"""What a TPU's compiler keeps in memory, as a dry run estimates it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bytelm import recipes
from bytelm_jax.tools import dry_run, dry_run_text, seen
from bytelm_jax.tools.fusion import (
    Buffer,
    Program,
    heap_height,
    least_tile_bytes,
    mark_written,
    tile_bytes,
)
from bytelm_jax.tools.machine import Machine
from bytelm_jax.training import mesh as meshes

LINES = [
    json.loads(line)
    for line in Path("scripts/check/tpu_compile.jsonl").read_text().splitlines()
]  # fmt: skip

ROWS, WIDTH = 256, 128


def written(function, *shapes, gathered=False):
    """(name, dtype, whether it is for products alone) of what a program writes, in order."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    program = Program(jax.make_jaxpr(function)(*inputs))
    mark_written(program, gathered)
    return [
        (operation.name, 8 * array.width, array.operand and not array.written)
        for operation in program.operations
        for array in operation.results
        if array.written or array.operand
    ]


def test_tiles_are_whole():
    assert tile_bytes((4, 16, 2048, 64), 2) == 4 * 16 * 2048 * 128 * 2
    assert tile_bytes((8192, 4096), 4) == 8192 * 4096 * 4
    assert tile_bytes((4, 2048, 1, 64), 2) == 4 * 2048 * 128 * 2
    assert tile_bytes((100, 3), 4) == 104 * 128 * 4
    assert tile_bytes((3, 130), 4) == 3 * 256 * 4
    assert least_tile_bytes((48, 512, 16), 4) == 48 * 512 * 16 * 4  # 512 along the lanes
    assert least_tile_bytes((7,), 4) == 28 and least_tile_bytes((), 4) == 4


def test_a_buffer_takes_the_lowest_place_that_is_free():
    kib = 2**14  # what addresses are multiples of
    assert heap_height([]) == 0
    assert heap_height([Buffer(0, 1, kib), Buffer(2, 3, kib)]) == kib
    assert heap_height([Buffer(0, 1, 1), Buffer(1, 2, 1)]) == 2 * kib
    # A hole of one block is too small for two, though three blocks are in use at most.
    holes = [Buffer(0, 1, kib), Buffer(0, 4, kib - 1), Buffer(3, 4, 2 * kib)]
    assert heap_height(holes) == 4 * kib


def test_what_alone_reads_a_product_is_written_in_its_place():
    def function(x, w, b):
        return jnp.square(x @ w + b) @ w

    shapes = (ROWS, WIDTH), (WIDTH, WIDTH), (1, WIDTH)
    assert written(function, *shapes) == [("square", 16, False), ("dot_general", 16, False)]


@pytest.mark.parametrize("reshaped", [True, False])
def test_a_wide_copy_that_is_read_in_another_shape_is_written(reshaped):
    def function(x, w):
        y = x @ w
        wide = (y.reshape(2, -1, WIDTH) if reshaped else y).astype(jnp.float32)
        return y @ w, wide - wide.mean(axis=-1, keepdims=True)

    found = written(function, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert found[0] == ("dot_general", 16, False)
    assert (("convert_element_type", 32, False) in found) == reshaped


@pytest.mark.parametrize("count", [1, 2])
def test_an_operand_of_two_products_is_written_for_them(count):
    def function(x, w):
        y = 2 * jnp.cumsum(x, axis=0) + x
        return [y @ (w + i) for i in range(count)]

    found = written(function, (ROWS, WIDTH), (WIDTH, WIDTH))
    assert (("add", 16, True) in found) == (count == 2)


@pytest.mark.parametrize("gathered", [True, False])
def test_an_activation_is_repeated_unless_parameters_are_gathered(gathered):
    def function(x, w):
        y = (x @ w).reshape(2, -1, WIDTH)
        z = jnp.tanh(y)
        return z @ w, z @ (w + 1), y + 1

    found = written(function, (ROWS, WIDTH), (WIDTH, WIDTH), gathered=gathered)
    assert (("tanh", 16, True) in found) == gathered


@pytest.mark.parametrize("spared", [True, False])
def test_rematerialised_operations_are_not_taken_for_the_first_ones(spared):
    def layer(x, w):
        return jnp.exp(x @ w)

    def function(x, w):
        return (jax.checkpoint(layer) if spared else layer)(x, w).astype(jnp.float32).sum()

    inputs = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((ROWS, WIDTH), (WIDTH, WIDTH))]
    program = Program(jax.make_jaxpr(jax.value_and_grad(function, argnums=1))(*inputs))
    assert [x.name for x in program.operations].count("exp") == 1 + spared


def test_an_estimate_is_what_the_lines_of_the_compiler_say():
    (line,) = (
        each for each in LINES
        if each["cell"] | {"name": "entropy_tiny", "form": "shard_map", "fsdp": 8} == each["cell"]
    )  # fmt: skip
    recipe = recipes.get("entropy_tiny")
    run = replace(recipe.train, parallel="shard_map", fsdp=8, devices=8, batch_size=32,
                  accumulation_steps=1, compute_dtype="bfloat16")  # fmt: skip
    recipe, mesh = replace(recipe, train=run), meshes.make_mesh(8, 8)
    state = dry_run.abstract_state(recipe, mesh)
    memory = dry_run.estimate_memory(recipe, mesh, state, "tpu")
    assert memory.peak == line["estimated"] and memory.least < memory.peak


@pytest.mark.parametrize("key", seen.SEEN["tpu"], ids=str)
def test_what_was_seen_is_what_the_lines_say(key):
    off = []
    for line in LINES:
        model = recipes.get(line["cell"]["name"]).model
        if key == (model.architecture, model.parameter_count() < seen.SMALL):
            needed = line["arguments"] + line["temporaries"] + line["program"]
            off.append(needed / line["estimated"] - 1)
    assert seen.SEEN["tpu"][key] == (round(min(off), 2), round(max(off), 2), len(off))


def test_the_dry_run_says_how_far_off_it_may_be(monkeypatch):
    monkeypatch.setattr(dry_run, "compile_step", lambda *_: "")
    recipe = recipes.get("entropy_tiny")
    recipe = replace(recipe, train=replace(recipe.train, devices=8, batch_size=32))
    text = dry_run_text.describe("x", dry_run.dry_run(recipe, Machine("v5e")))
    assert "steps of such models" in text and "if the compiler has to save memory" in text
    text = dry_run_text.describe("x", dry_run.dry_run(recipe, Machine("H100")))
    assert "GiB   at most" in text and "such models" not in text
