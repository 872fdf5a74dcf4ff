"""`bytelm train --dry-run`: what is kept for the backward pass, collectives, and the command."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bytelm import recipes, tolerances
from bytelm.config import (
    DataConfig,
    MegabyteConfig,
    Recipe,
    TrainConfig,
    training_flops_per_byte,
)
from bytelm_jax.cli import main as cli
from bytelm_jax.cli import run as commands_run
from bytelm_jax.models import abstract_params, cast_params
from bytelm_jax.tools import dry_run, dry_run_text
from bytelm_jax.tools.collectives import Collective, read_collectives
from bytelm_jax.tools.machine import Machine
from bytelm_jax.tools.memory import saved_for_backward, total
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training.tensor import tensor_axis

SMALL = [
    "--patch-size", "2", "--global-dim", "16", "--local-dim", "32", "--max-length", "16",
    "--global-layers", "1", "--global-heads", "2", "--local-layers", "1", "--local-heads", "2",
    "--sequence-length", "16",
]  # fmt: skip
MODEL = MegabyteConfig(
    patch_size=2, global_dim=16, local_dim=32, max_length=16,
    global_layers=1, global_heads=2, local_layers=1, local_heads=2,
)  # fmt: skip


def saved_arrays(function, shape):
    held = saved_for_backward(function, jnp.zeros((8, 8)), jnp.zeros(shape))
    return sorted((array.primitive, array.shape) for array in held)


def test_what_is_cheap_is_computed_again():
    def function(w, x):
        y = (x @ w) * 2 + 1
        return (y * y * x).sum()

    assert saved_arrays(function, (4, 8)) == [("dot_general", (4, 8))]


def test_what_is_dear_is_kept_and_so_is_what_a_product_reads():
    def function(w, x):
        y = jnp.exp(x @ w)
        return ((3 * y) @ w).sum()

    assert saved_arrays(function, (4, 8)) == [("exp", (4, 8)), ("mul", (4, 8))]


def test_a_function_that_is_called_twice_keeps_twice():
    shared = jax.jit(jnp.exp)
    assert saved_arrays(lambda w, x: (shared(x @ w) + shared(x @ w + 1)).sum(), (4, 8)) == [
        ("exp", (4, 8)), ("exp", (4, 8)),
    ]  # fmt: skip


def test_rematerialisation_keeps_its_inputs_and_one_part_of_what_it_spares():
    def layer(x, w):
        return jnp.exp(jnp.exp(x @ w) @ w)

    def stack(layer):
        def function(w, x):
            for _ in range(3):
                x = layer(x, w)
            return x.sum()

        return function

    assert saved_arrays(stack(layer), (4, 8)) == 6 * [("exp", (4, 8))]
    # Two inputs between layers, the first being given; then both of the layer that is done again.
    assert saved_arrays(stack(jax.checkpoint(layer)), (4, 8)) == 4 * [("exp", (4, 8))]


def test_memory_of_132_million_parameters_is_what_was_measured():
    recipe = recipes.get("megabyte_132m")
    recipe = replace(recipe, train=replace(recipe.train, compute_dtype="bfloat16"))
    mesh = meshes.make_mesh(1)
    memory = dry_run.estimate_memory(recipe, mesh, dry_run.abstract_state(recipe, mesh))
    measured = 7.43 * 2**30  # docs/pods.md, 32 rows of 2,048 bytes
    assert abs(memory.peak - measured) / measured < tolerances.PEAK_MEMORY
    assert memory.parameters == 4 * recipe.model.parameter_count()


def test_scores_are_kept_where_attention_is_written_out():
    model = replace(MODEL, max_length=128)
    recipe = Recipe(name="x", model=model, data=DataConfig(sequence_length=128),
                    train=TrainConfig(batch_size=1, compute_dtype="bfloat16"))  # fmt: skip
    mesh = meshes.make_mesh(1)
    state = dry_run.abstract_state(recipe, mesh)
    working = jax.eval_shape(lambda params: cast_params(params, jnp.bfloat16), state.params)
    for platform, written_out in (("gpu", False), ("tpu", True)):  # cuDNN keeps none
        arrays = dry_run.residuals(recipe, mesh, working, platform)
        scores = [x for x in arrays if x.shape[-3::2] == (64, 64)]  # queries, keys
        assert (total(scores) > 0) == written_out


def test_no_kernel_is_gathered_twice():
    """With its norm folded in and without, say, or again in the backward pass."""
    recipe = recipes.get("megabyte_tiny")
    model = replace(recipe.model, global_layers=1, local_layers=1)
    train = replace(recipe.train, batch_size=32, fsdp=4, compute_dtype="bfloat16")
    recipe, mesh = replace(recipe, model=model, train=train), meshes.make_mesh(4, 4)
    state = dry_run.abstract_state(recipe, mesh)
    cut = sum(x.size for x in state.params.values() if not x.sharding.is_fully_replicated)
    found = read_collectives(dry_run.compile_step(recipe, mesh, state), 4)
    gathered = sum(each.bytes for each in found if each.kind == "all-gather")
    assert 2 * cut <= gathered < 2.05 * cut


def test_a_fused_reduce_scatter_is_one():
    """As a TPU's compiler writes it."""
    text = """
%all-reduce-scatter.1 (input.1: bf16[8,4]) -> bf16[2,4] {
  %all-reduce.9 = bf16[8,4]{1,0} all-reduce(%input.1), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[2,4]{1,0} dynamic-slice(%all-reduce.9, %start, %zero)
}

ENTRY %main (x: bf16[8,4]) -> bf16[2,4] {
  ROOT %fusion = bf16[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    assert read_collectives(text, 4) == [Collective("reduce-scatter", 4, 1, 64)]


def test_state_is_cut_by_fsdp():
    mesh = meshes.make_mesh(8, 4)
    recipe = Recipe(
        name="x", model=MODEL, train=TrainConfig(batch_size=8, fsdp=4, compute_dtype="float32"),
        data=DataConfig(sequence_length=16),
    )  # fmt: skip
    state = dry_run.abstract_state(recipe, mesh)
    memory = dry_run.estimate_memory(recipe, mesh, state)
    cut = [x for x in state.params.values() if x.size >= 1024 and any(n % 4 == 0 for n in x.shape)]
    small = MODEL.parameter_count() - sum(x.size for x in cut)
    part = small + sum(x.size for x in cut) // 4
    assert cut and memory.parameters == memory.gradients == 4 * part
    assert memory.copies == 4 * MODEL.parameter_count()  # whole while products read them
    assert memory.optimizer_state - 2 * 4 * part in range(0, 17)  # and what counts steps
    assert memory.peak >= memory.parameters + memory.optimizer_state + memory.activations


def test_a_device_holds_its_part_of_layers_that_are_cut():
    """Per row, half of the heads and of the hidden features, and half of their parameters."""
    data, train = DataConfig(sequence_length=64), TrainConfig(batch_size=8, compute_dtype="float32")
    model = replace(recipes.get("megabyte_tiny").model, patch_size=4, global_dim=48, local_dim=80)
    recipe = Recipe(name="x", model=model, data=data, train=train)
    found = {}
    for tensor in (1, 2):
        run = replace(recipe, train=replace(train, tensor=tensor))
        mesh = meshes.make_mesh(4 * tensor, 1, tensor)
        state = dry_run.abstract_state(run, mesh)
        working = meshes.layer_shapes(mesh, state.params)
        arrays = dry_run.residuals(run, mesh, working, "H100")
        found[tensor] = dry_run.estimate_memory(run, mesh, state), {x.shape[-1] for x in arrays}
    whole, part = found[1][0], found[2][0]
    hidden, half = 4 * 192, 2 * 192  # of the global stack; no other axis is as long
    assert hidden in found[1][1] and half not in found[1][1]
    assert half in found[2][1] and hidden not in found[2][1]
    assert part.activations < whole.activations and part.logits == whole.logits
    assert part.copies == whole.copies == 0
    rest = sum(  # norms, biases and what lies between the stacks stay whole
        leaf.size for name, leaf in state.params.items()
        if tensor_axis(name, leaf.shape, 2) is None
    )  # fmt: skip
    count = model.parameter_count()
    assert part.parameters == part.gradients == 4 * (rest + (count - rest) // 2) < whole.parameters


HLO = """HloModule jit_step
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %rs = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %t = (s32[], f32[8]) tuple(%i, %rs)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n)
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %ag = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}
  %done = bf16[32]{0} all-gather-done(%ag)
  %ar = (f32[16]{0}, s32[]) all-reduce(%x, %y), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%sum
  %as = ((f32[12]{0}, s32[]), (f32[12]{0}, s32[])) all-reduce-start(%x, %y), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %cp = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
}
"""  # noqa: E501


def test_collectives_are_read_with_their_groups_and_loops():
    collectives = read_collectives(HLO, 8)
    assert collectives == [
        Collective("reduce-scatter", 4, 3, 3 * 8 * 4 * 4),
        Collective("all-reduce", 4, 1, 16 * 4 + 4),
        Collective("all-gather", 8, 1, 32 * 2),
        Collective("all-reduce", 2, 1, 12 * 4 + 4),
        Collective("collective-permute", 8, 1, 10 * 4),
    ]
    scatter, reduce, gather, _, permute = (each.seconds(8.0) for each in collectives)
    assert scatter == 384 * 3 / 4 / 8 and reduce == 2 * 68 * 3 / 4 / 8
    assert gather == 64 * 7 / 8 / 8 and permute == 40 / 8


@pytest.mark.parametrize("name", ["megabyte_tiny", "blt_tiny", "lfbyte_tiny", "entropy_tiny"])
def test_frozen_kernels_need_no_gradient(name):
    """All of them together are the forward pass, but for attention, norms and the frozen model."""
    model = recipes.get(name).model
    forward = model.flops_per_byte(32) - model.frozen_flops_per_byte(32)
    sizes = {name: leaf.size for name, leaf in abstract_params(model).items()}
    whole, still = (training_flops_per_byte(model, 32, frozen) for frozen in ({}, sizes))
    assert 0.95 * forward < whole - still <= forward


def test_the_command_estimates_data_parallel_training_and_writes_nothing(tmp_path):
    """Of more devices than this process has, so it is another one."""
    command = [sys.executable, "-m", "bytelm_jax.cli", "train", "megabyte_tiny", *SMALL]
    options = ["--dry-run", "--devices", "16", "--batch-size", "32", "--json"]
    process = subprocess.run(
        [*command, *options, "--compute-dtype", "float32", "--link-gbytes", "25"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert not list(tmp_path.iterdir())
    (reduced,) = report["collectives"]
    gradients = 4 * MODEL.parameter_count()
    scalars = reduced["bytes"] - gradients  # the count of bytes, the loss
    assert reduced["kind"] == "all-reduce" and reduced["group"] == 16 and 0 < scalars <= 16
    assert report["memory"]["gradients"] == report["memory"]["parameters"] == gradients
    assert report["rows"] == 2 and report["memory"]["copies"] == 0
    assert report["collective_seconds"] == 2 * 15 / 16 * reduced["bytes"] / 25e9


def test_fsdp_gathers_parameters_and_scatters_gradients():
    train = TrainConfig(
        devices=8, fsdp=4, batch_size=24, accumulation_steps=3, parallel="shard_map"
    )
    recipe = Recipe(name="x", model=MODEL, train=train, data=DataConfig(sequence_length=16))
    estimate = dry_run.dry_run(recipe, Machine())
    collectives = {(each.kind, each.group): each for each in estimate.collectives}
    params: Any = dry_run.abstract_state(recipe, meshes.make_mesh(8, 4)).params
    cut = sum(x.size for x in params.values() if x.sharding.spec)
    # In bfloat16, as on an accelerator. The compiler gathers once for all three micro-batches, the
    # gradients of each are scattered, and their parts then summed from group to group.
    assert collectives["all-gather", 4].bytes == 2 * cut
    assert collectives["reduce-scatter", 4].bytes == 3 * 2 * cut
    assert collectives["all-reduce", 2].bytes == 3 * 2 * cut // 4
    text = dry_run_text.describe("x", estimate)
    assert "bfloat16" in text and re.search(rf"all-gather over 4 +{2 * cut:,} bytes", text)
    assert estimate.executed_flops == estimate.flops and "executed" not in text
    fuller = estimate._replace(executed_flops=1.25 * estimate.flops)
    assert "executed (1.25 x): the patch budget" in dry_run_text.describe("x", fuller)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "devices=0: a dry run needs their number"),
        (["--devices", "9"], "devices=9: this process started with 8"),
        (["--devices", "2049"], "devices=2049: a dry run simulates at most 2048"),
        (["--devices", "8", "--fsdp", "3"], "fsdp=3: must divide"),
        (["--devices", "8", "--batch-size", "4"], "batch_size=4: must be a multiple of 8"),
        (["--devices", "8", "--chip", "Z80"], "chip=Z80: unknown; choose one of H100"),
        (["--devices", "8", "--mfu", "1.5"], "mfu=1.5: must be above 0"),
        (["--devices", "8", "--link-gbytes", "fast"], "--link-gbytes fast: must be a number"),
        (["--devices", "8", "--epochs", "1"], "--dry-run: reads no data"),
        (["--devices", "8", "--distributed"], "--dry-run: reads no data"),
    ],
)
def test_bad_input_is_one_line(options, expected, tmp_path, monkeypatch, capsys):
    assert len(jax.devices()) == 8  # if it is the first test, JAX starts here
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "megabyte_tiny", "--dry-run", *options]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_its_options_need_it(capsys):
    assert cli.main(["train", "megabyte_tiny", "--chip", "H100"]) == 2
    assert "need --dry-run" in capsys.readouterr().err


def test_training_is_refused_before_anything_is_made_where_memory_is_short(
    tmp_path, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(commands_run, "train", lambda recipe, *_: asked.append(recipe) or (1 / 0))
    folder = tmp_path / "run"
    call = ["train", "megabyte_tiny", *SMALL, "--run-dir", str(folder), "--devices", "1"]
    data = DataConfig(sequence_length=16)
    recipe = Recipe(name="x", model=MODEL, data=data, train=TrainConfig(batch_size=16))
    mesh = meshes.make_mesh(1)
    memory = dry_run.estimate_memory(recipe, mesh, dry_run.abstract_state(recipe, mesh))
    state = memory.parameters + memory.gradients + memory.optimizer_state
    enough = int(0.81 * memory.peak)
    assert state < enough
    for limit, expected in (
        (state - 1, "model: parameters, gradients and optimizer state take"),
        (state, "batch_size=16: a step takes about"),
    ):
        monkeypatch.setattr(dry_run, "device_limit", lambda device, limit=limit: limit)
        assert cli.main(call) == 2
        error = capsys.readouterr().err
        assert expected in error and "0.0 GiB of each device" in error and error.count("\n") == 1
        assert not asked and not folder.exists()
    for limit in (enough, None):  # a CPU does not say what it has
        monkeypatch.setattr(dry_run, "device_limit", lambda device, limit=limit: limit)
        with pytest.raises(ZeroDivisionError):
            cli.main(call)
        assert asked.pop() and not folder.exists()


def test_a_device_that_runs_out_of_memory_ends_a_run_in_one_line(tmp_path, monkeypatch, capsys):
    def train(recipe, run_dir, locked):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while\n trying")

    monkeypatch.setattr(commands_run, "train", train)
    assert cli.main(["train", "megabyte_tiny", "--run-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "out of memory with batch_size=16 (RESOURCE_EXHAUSTED: Out of memory while try" in error
    assert error.count("\n") == 1
