"""`bytelm draft-table`: what it makes of a run's data, and what it refuses."""

import random
import string
from dataclasses import replace

import numpy as np
import pytest

from bytelm import recipes
from bytelm.generation.draft_table import build_table, bytes_per_round, load_table
from bytelm.runs import save_recipe
from bytelm_jax.cli import main as cli
from bytelm_jax.tests.test_cli import contents, refused
from bytelm_jax.tests.test_front import answers


@pytest.fixture
def text(tmp_path):
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(2, 7))) for _ in range(50)]
    path = tmp_path / "words.txt"
    path.write_text(" ".join(chance.choices(words, k=4000)))
    return path


@pytest.fixture
def run(tmp_path, text):
    """A run folder as far as the command looks at it: nothing of a checkpoint is read."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    recipe = recipes.megabyte_tiny()
    save_recipe(folder, replace(recipe, data=replace(recipe.data, paths=(str(text),))))
    return folder


def is_table_of(folder, chunks):
    table = load_table(folder / "draft_table.npz")
    return all(map(np.array_equal, table, build_table(chunks)))


def test_a_table_of_the_runs_own_data_without_jax(run, text):
    ((_, code, output, loaded),) = answers([["draft-table", str(run)]])
    assert (code, loaded) == (0, []), output
    whole = text.read_bytes()
    trained = whole[: len(whole) - int(output.split(" bytes that")[0].split()[-1].replace(",", ""))]
    assert 0.8 < len(trained) / len(whole) < 1 and is_table_of(run, [trained])
    rate = bytes_per_round(load_table(run / "draft_table.npz"), whole[len(trained) :])
    assert f"\n{rate:.2f} bytes a round on " in output and rate > 2
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.json", "draft_table.npz",
    ]  # fmt: skip


def test_a_table_of_other_data_for_an_export(tmp_path, text, capsys):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").touch()
    argv = ["draft-table", str(tmp_path / "export"), "--data", str(text), "--megabytes", "0.005"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.endswith(" contexts\n")
    assert is_table_of(tmp_path / "export", [text.read_bytes()[: int(0.005 * 2**20)]])


def test_what_is_refused_leaves_the_table_as_it_was(run, tmp_path, text, capsys):
    assert cli.main(["draft-table", str(run)]) == 0
    capsys.readouterr()
    (tmp_path / "once").write_text(string.printable)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "model.safetensors").touch()
    before = contents(tmp_path)
    for argv, reason in {
        (run, "--data", tmp_path / "once"): "100 bytes repeat nothing; give more text",
        (run, "--data", tmp_path / "none"): "none: does not exist",
        (run, "--megabytes", "257"): "--megabytes 257.0: must be above 0 and at most 256",
        (run, "--raw"): "--data: name the files",
        (tmp_path / "none",): "none: no config.json there",
        (tmp_path, "--data", text): "no model there; give a run folder or an export",
        (tmp_path / "export",): "is an export, which does not say",
        ("hf://some/run",): "hf://some/run: a table is written on disks, gs:// and s3://",
    }.items():
        assert reason in refused(capsys, "draft-table", *argv), argv
    assert contents(tmp_path) == before
    text.unlink()
    assert "words.txt: does not exist" in refused(capsys, "draft-table", run)


def test_a_run_that_read_standard_input_needs_files(run, capsys):
    recipe = recipes.megabyte_tiny()
    save_recipe(run, replace(recipe, data=replace(recipe.data, paths=("-",))))
    assert "the run read standard input" in refused(capsys, "draft-table", run)
