"""`--dry-run --compile-for` and `--fit`; what needs a TPU's compiler runs where libtpu is."""

import json
import subprocess

import pytest

from bytelm import recipes
from bytelm.chips import find_chip
from bytelm_jax.cli import main as cli
from bytelm_jax.tools import compile_process, dry_run
from bytelm_jax.tools.compiled import Compiled, padded_bytes
from bytelm_jax.tools.machine import Machine
from bytelm_jax.tools.targets import TOPOLOGIES, read_target
from bytelm_jax.tools.work import Work, kernel_flops, read_work
from bytelm_jax.training import mesh as meshes

RUN = ["train", "megabyte_tiny", "--dry-run"]


@pytest.mark.parametrize(
    ("text", "chip", "devices"),
    [("v5e:16x16", "v5e", 256), ("v4:2x2x1", "v4", 4), ("v7:2x2x1", "v7", 8), ("h100:8", "H100", 8),
     ("tpu7x:2x2x1", "v7", 8), ("H200:3", "H200", 3)],
)  # fmt: skip
def test_a_target_is_read(text, chip, devices):
    target = read_target(text)
    assert (target.chip.name, target.devices) == (chip, devices)
    assert read_target(target.name) == target


@pytest.mark.parametrize("text", ["v5e:3x3", "v5e", "v5p:16x16", "h100:0", "h100:x", "l40s:8"])
def test_an_unknown_target_lists_the_known_ones(text, capsys):
    assert cli.main([*RUN, "--compile-for", text]) == 2
    error = capsys.readouterr().err
    assert f"compile_for={text}: unknown; choose one of v5e:2x2|" in error and "h100:8" in error
    assert error.count("\n") == 1 and all(name in error for name in TOPOLOGIES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--compile-for", "h100:8", "--chip", "H100"], "--chip: --compile-for names it"),
        (["--compile-for", "h100:8", "--devices", "4"], "devices=4: H100 has"),
        (["--compile-for", "h100:8", "--fsdp", "3"], "fsdp=3: must divide"),
    ],
)
def test_bad_input_is_one_line(options, expected, capsys):
    assert cli.main([*RUN, *options]) == 2
    error = capsys.readouterr().err
    assert expected.replace("H100 has", "h100:8 has 8") in error and error.count("\n") == 1


def test_its_options_need_a_dry_run(capsys):
    for options in (["--fit"], ["--compile-for", "v5e:2x2"]):
        assert cli.main(["train", "megabyte_tiny", *options]) == 2
        assert "need --dry-run" in capsys.readouterr().err


def test_without_the_compiler_it_is_an_estimate_that_says_so(monkeypatch, capsys):
    monkeypatch.setattr(dry_run, "has_compiler", lambda platform: False)
    monkeypatch.setattr(dry_run, "compile_step", lambda *_: "")
    for target, why in (("v5e:2x4", "install libtpu"), ("h100:8", "install CUDA's plugin")):
        assert cli.main([*RUN, "--compile-for", target, "--batch-size", "8"]) == 0
        out = capsys.readouterr().out
        assert f"an estimate for {target}, of 8 simulated CPUs" in out and why in out
        assert "compiled for" not in out


@pytest.mark.parametrize(
    ("status", "printed", "says"),
    [
        (
            2,
            "noise\nbytelm train: batch_size=3: must be\n\n",
            "bytelm train: batch_size=3: must be",
        ),
        (-11, "E0000 symbols\nhttps://trace\n", "libtpu 0.0.20 failed (signal 11); jax "),
        (
            1,
            "Trace\njax.errors.JaxRuntimeError: INTERNAL: no\nE0000\n",
            "(jax.errors.JaxRuntimeErr",
        ),
        (2, "", "libtpu 0.0.20 failed (status 2)"),
    ],
)
def test_a_compiler_that_fails_is_one_line_with_its_version(
    status, printed, says, monkeypatch, capsys
):
    """A libtpu of another JAX may end the process by a signal."""
    ended = subprocess.CompletedProcess([], status, "", printed)
    monkeypatch.setattr(compile_process.subprocess, "run", lambda *_, **__: ended)
    known = compile_process.metadata.version
    versions = {"libtpu": "0.0.20"}
    monkeypatch.setattr(
        compile_process.metadata, "version", lambda name: versions.get(name) or known(name)
    )
    monkeypatch.setattr(dry_run, "has_compiler", lambda platform: True)
    assert cli.main([*RUN, "--compile-for", "v5e:2x2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    if status != 2 or not printed:
        assert line.startswith("bytelm train: compile_for=v5e:2x2: ") and "for libtpu==" in line


@pytest.mark.parametrize("most", [0, 1, 2, 5, 8, 31])
@pytest.mark.parametrize("start", [1, 3, 8])
def test_the_largest_that_fits_is_found_from_wherever_it_begins(most, start):
    asked = []

    def peak(number):
        asked.append(number)
        return 10 * number if number <= most else None

    assert dry_run.largest_fitting(peak, start, 10 * most + 9) == (most, 10 * most)
    assert len(asked) == len(set(asked)) <= 6


def test_a_large_number_is_found_to_a_thirty_second_part_in_few_steps():
    asked = []

    def peak(number):  # a part does not grow
        asked.append(number)
        return 500 + number if number <= 9500 else None

    found, needed = dry_run.largest_fitting(peak, 3, 10_000)
    assert 9500 * 31 / 32 - 1 <= found <= 9500 and needed == 500 + found and len(asked) <= 12


def _compiled(size):
    return Compiled(size, 0, 0, Work(1.0, 0.0, 0.0), 1, 0, [], in_use=size)


def test_what_fits_is_compiled_once(monkeypatch):
    """The last batch that was compiled and fits is not compiled again for its figures."""
    asked = []

    def compile_lowered(rows, *_):
        asked.append(rows)
        return _compiled(rows * 2**30) if rows <= 24 else None

    monkeypatch.setattr(dry_run, "has_compiler", lambda platform: True)
    monkeypatch.setattr(dry_run, "topology_mesh", lambda *_: meshes.make_mesh(4))
    monkeypatch.setattr(dry_run, "lower_step", lambda recipe, *_: recipe.train.batch_size // 4)
    monkeypatch.setattr(dry_run, "compile_lowered", compile_lowered)
    target, machine = read_target("v5e:2x2"), Machine("v5e")
    found = dry_run.largest_batch(recipes.get("megabyte_tiny"), machine, target)
    assert (found.recipe.train.batch_size, found.needed) == (4 * 16, 16 * 2**30)
    count = len(asked)
    estimate = dry_run.dry_run(found.recipe, machine, target, found.compiled)
    assert estimate.compiled is found.compiled and len(asked) == count
    assert dry_run.dry_run(found.recipe, machine, target).compiled == found.compiled
    assert len(asked) == count + 1


def test_fit_names_the_largest_batch_that_fits(monkeypatch, capsys):
    """A stand-in for the estimate, of a megabyte a row: 100 of them fit, in multiples of 8."""
    small = find_chip("H100")._replace(memory=100 * 2**20)

    def estimate(recipe, *_):
        peak = recipe.train.batch_size * 2**20
        return dry_run.Memory(0, 0, 0, 0, 0, 0, peak, peak)

    monkeypatch.setattr(dry_run, "compile_step", lambda *_: "")
    monkeypatch.setattr(dry_run, "find_chip", lambda name: small)
    monkeypatch.setattr(dry_run, "estimate_memory", estimate)
    assert cli.main([*RUN, "--devices", "8", "--fit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 96
    assert cli.main([*RUN, "--devices", "8", "--fit"]) == 0
    assert "the largest batch that fits: --batch-size 96, 0.094 GiB" in capsys.readouterr().out
    monkeypatch.setattr(dry_run, "find_chip", lambda name: small._replace(memory=2**20))
    assert cli.main([*RUN, "--devices", "8", "--fit"]) == 2
    assert "one row on each device does not fit the memory of a H100" in capsys.readouterr().err


HLO = """
%fused (p: f32[8]) -> f32[8] {
  %x.1 = f32[8,1000000]{1,0:T(8,128)} add(%p, %p)
}

ENTRY %main (a: f32[4,100]) -> f32[4,100] {
  %a = f32[4,100]{1,0:T(8,128)} parameter(0)
  %b.1 = bf16[4,100]{1,0:T(8,128)(2,1)} convert(%a)
  %c.1 = f32[100,4]{0,1:T(8,128)} fusion(%a), kind=kLoop, calls=%fused
  %splash_mha_fwd_residuals.1 = (bf16[2,16,2048,64]{3,2,1,0}) custom-call(%c), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,4,4]{2,1,0}, s8[1,4,4]{2,1,0}, bf16[2,16,2048,64]{3,2,1,0}, bf16[2,1,2048,64]{3,2,1,0}, bf16[2,1,2048,64]{3,2,1,0}, s32[2048,128]{1,0}}, frontend_attributes={}
  %splash_mha_dkv_no_residuals.1 = (bf16[2]{0}) custom-call(%c), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,4]{2,1,0}, s8[1,2,4]{2,1,0}, bf16[2,16,2048,72]{3,2,1,0}, bf16[2,1,2048,72]{3,2,1,0}, bf16[2,1,2048,64]{3,2,1,0}, s32[8,2048]{1,0}}, frontend_attributes={}
}
"""  # noqa: E501


def test_the_work_of_attention_kernels_is_that_of_their_blocks():
    causal = 2 * 2 * 16 * (1 + 2 + 3 + 4) * 512**2 * (64 + 64)
    window = 2 * 2 * 16 * (1 + 2 + 2 + 2) * 512**2 * (2 * 72 + 2 * 64)
    assert kernel_flops(HLO) == causal + window
    one_row = HLO.replace("bf16[2,", "bf16[").replace("]{3,2,1,0}", "]{2,1,0}")
    assert kernel_flops(one_row) == (causal + window) / 2


PRODUCTS = """
%branch (p.1: bf16[2048,384,1], p.2: bf16[6,64,384]) -> bf16[2048,6,64] {
  %p.1 = bf16[2048,384,1]{1,0,2} parameter(0)
  %p.2 = bf16[6,64,384]{2,1,0} parameter(1)
  ROOT %c.1 = bf16[2048,6,64]{2,0,1:T(8,128)} convolution(%p.1, %p.2), window={size=6 pad=5_5 rhs_reversal=1}, dim_labels=bf0_0oi->b0f, metadata={op_name="jit(step)/dot_general"}
}

ENTRY %main (a: bf16[32,64], b: bf16[64,16]) -> bf16[32,16] {
  %a = bf16[32,64]{1,0} parameter(0)
  %b = bf16[64,16]{1,0} parameter(1)
  %fusion.1 = bf16[2048,6,64]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%branch
  %dot.1 = bf16[32,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %custom-call.1 = (bf16[32,16]{1,0}, s8[100]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %gmm.1 = bf16[2048,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], s32[5]{0}, s32[19]{0}, s32[19]{0}, s32[1]{0}, bf16[2048,64]{1,0}, bf16[4,64,128]{2,1,0}}, frontend_attributes={}
  %tgmm.1 = bf16[4,64,128]{2,1,0} custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], s32[5]{0}, s32[19]{0}, s32[19]{0}, s32[1]{0}, bf16[2048,64]{1,0}, bf16[2048,128]{1,0}}, frontend_attributes={}
  %fwd.1 = (bf16[2,4,256,64]{3,1,2,0}, f32[2,4,256]{2,1,0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax", operand_layout_constraints={bf16[2,256,4,64]{3,2,1,0}, bf16[2,256,1,64]{3,2,1,0}, bf16[2,256,1,64]{3,2,1,0}}, backend_config={"sliding_window_length": 0}
  ROOT %bwd.1 = (bf16[2,4,256,64]{3,1,2,0}, bf16[2]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmaxBackward", operand_layout_constraints={bf16[2,256,4,64]{3,2,1,0}, bf16[2,256,1,64]{3,2,1,0}, bf16[2,256,1,64]{3,2,1,0}}, backend_config={"sliding_window_length": 100}
}
"""  # noqa: E501


def test_the_work_of_a_program_is_told_apart():
    """Of a window that is mostly padding, only what lies on numbers counts."""
    products = 2 * 2048 * 384 * 384 + 2 * (2 * 32 * 64 * 16)
    grouped = 2 * (2 * 2048 * 64 * 128)
    causal, window = 256 * 257 // 2, 100 * 101 // 2 + 156 * 100
    attention = 2 * 2 * 4 * 64 * (2 * causal + 5 * window)
    found = read_work(PRODUCTS, products + grouped + 5.0)
    # Groups end within tiles: 16 tiles are up to 19.
    assert found == Work(products, attention + grouped * 19 / 16, 5.0)
    assert found.total == sum(found)


def test_padding_is_what_whole_tiles_add_to_what_is_written():
    plain = 400 * 2 + 400 * 4 + 2 * 16 * 2048 * 64 * 2 + 2 * 2
    padding = (8 * 128 - 400) * 2 + (8 * 128 - 400) * 4
    assert padded_bytes(HLO) == (plain, padding)


@pytest.mark.parametrize(
    ("target", "library"), [("v5e:2x2", "libtpu"), ("h200:4", "jax_plugins.xla_cuda13")]
)
def test_a_tiny_recipe_by_the_compiler(target, library, capfd):
    pytest.importorskip(library)
    assert cli.main([*RUN, "--compile-for", target, "--batch-size", "4", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    compiled = found["compiled"]
    assert 0 < compiled["peak"] < 2**30 and compiled["flops"] > found["flops"]
    assert {each["kind"] for each in found["collectives"]} == {"all-reduce"}
    assert recipes.get("megabyte_tiny").name == found["recipe"]
