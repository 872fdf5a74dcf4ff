"""Programs that run without this library compute what the models do, at any batch and length."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest
import torch

from bytelm import tolerances
from bytelm.config import Recipe
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert
from bytelm_jax.interop.stablehlo import export_stablehlo
from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tests.test_cli import refused
from bytelm_jax.training import checkpoint
from bytelm_torch import export as torch_command
from bytelm_torch.interop import programs
from parity_tests.cases import quick
from parity_tests.tiny_models import CONFIGS
from parity_tests.twins import random_ids, random_params

ROOT = Path(__file__).parents[1]
BOUND = tolerances.LOGITS["float32"]


def assert_near(found, expected):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert found.shape == expected.shape and error <= BOUND


@pytest.mark.parametrize("name", quick(["megabyte", "entropy"], "entropy"))
def test_a_program_of_jax_takes_any_number_of_rows(name, tmp_path):
    config = CONFIGS[name]
    params, file = random_params(config, "float32"), tmp_path / "model.stablehlo"
    export_stablehlo(config, params, file, 21)
    program = jax.export.deserialize(bytearray(file.read_bytes()))
    for rows in (1, 4):
        ids = random_ids(config, rows, 21)
        expected = define_model(config)[0](params)(ids)
        assert_near(np.asarray(program.call(ids)), np.asarray(expected))


def test_programs_of_jax_by_the_command_and_what_has_none(tmp_path, capsys):
    config = CONFIGS["lfbyte"]
    params = random_params(config, "float32")
    checkpoint.create_run(tmp_path / "run", Recipe(name="tiny", model=config), params)
    out = tmp_path / "model.stablehlo"
    words = ["export", tmp_path / "run", "--out", out]
    asked = [*words, "--format", "stablehlo", "--length", "12"]
    assert "lfbyte: its program depends on the number of rows" in refused(capsys, *asked)
    assert not out.exists()
    assert "--length: needs --format stablehlo" in refused(capsys, *words, "--length", "3")
    assert cli.main([*map(str, asked), "--batch", "2"]) == 0
    assert "for rows of 12 ids" in capsys.readouterr().out
    ids = random_ids(config, 2, 12)
    program = jax.export.deserialize(bytearray(out.read_bytes()))
    expected = define_model(config)[0](params)(ids)
    assert_near(np.asarray(program.call(ids)), np.asarray(expected))


RUN = """
import sys
import numpy as np, torch
from bytelm_torch import export
folder = sys.argv[1]
for name, length in (("entropy", 30), ("megabyte", 22)):
    file = f"{folder}/{name}.pt2"
    assert export.main([f"{folder}/{name}", "--out", file, "--length", str(length)]) == 0
    program = torch.export.load(file).module()
    for i in range(3):
        ids = torch.from_numpy(np.load(f"{folder}/{name}{i}.npy")).long()
        with torch.no_grad():
            np.save(f"{folder}/{name}{i}_logits.npy", program(ids).numpy())
assert export.main([f"{folder}/resets", "--out", f"{folder}/none.pt2", "--length", "22"]) == 2
"""
"""In a process of its own: here annotations are enforced, and lengths in a trace are no int."""


@pytest.mark.slow
def test_a_program_of_torch_takes_any_batch_and_length(tmp_path):
    """MEGABYTE's in whole patches; and what torch can export for one length only is refused."""
    resets = replace(CONFIGS["megabyte"], reset_on="newline")
    convert.export_model(resets, random_params(resets, "float32"), tmp_path / "resets")
    sizes = {"entropy": ((1, 7), (5, 30), (2, 61)), "megabyte": ((1, 12), (4, 20), (2, 32))}
    expected = {}
    for name, shapes in sizes.items():
        config = CONFIGS[name]
        params = random_params(config, "float32")
        convert.export_model(config, params, tmp_path / name)
        for i, (rows, length) in enumerate(shapes):
            ids = random_ids(config, rows, length)
            np.save(tmp_path / f"{name}{i}.npy", ids)
            with torch.no_grad():
                made = make_twin(config, params)(torch.from_numpy(ids).long())
            expected[f"{name}{i}"] = made.numpy()
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "export: megabyte: torch.export fixes its length with these settings" in done.stderr
    assert not (tmp_path / "none.pt2").exists()
    for name, logits in expected.items():
        assert_near(np.load(tmp_path / f"{name}_logits.npy"), logits)


def test_what_is_missing_is_named(tmp_path, capsys, monkeypatch):
    config = CONFIGS["megabyte"]
    twin = make_twin(config, random_params(config, "float32"))
    with pytest.raises(ValueError, match="length=5: must be from 16 to 32"):
        programs.export_program(twin, 5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx: not installed; install the extra onnx"):
        programs.export_onnx(twin, tmp_path / "model.onnx", 22)
    with pytest.raises(ValueError, match=r"torchao: not installed; install the extra int8"):
        programs.quantize_int8(twin)
    assert torch_command.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "name a file in a folder that exists" in capsys.readouterr().err
