"""`bytelm eval` of several files and models: tables, parts, sliding windows, damaged text."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import bytelm_jax
import bytelm_torch
from bytelm import tolerances
from bytelm.config import MegabyteConfig, Recipe
from bytelm_jax.cli import main as cli
from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tests.test_cli import refused
from bytelm_jax.training import checkpoint

CONFIG = MegabyteConfig(
    patch_size=4, global_dim=8, local_dim=16, global_layers=1, local_layers=1, global_heads=2,
    local_heads=2, max_length=64,
)  # fmt: skip
LENGTH = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A random model and one whose logits are all equal."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = Recipe(name="made", model=CONFIG)
    recipe = replace(recipe, data=replace(recipe.data, sequence_length=LENGTH))
    params = jax.jit(define_model(CONFIG)[1], static_argnums=0)(0)
    params["to_logits.kernel"] *= 20
    flat = {k: jnp.zeros_like(v) if k.startswith("to_logits") else v for k, v in params.items()}
    checkpoint.create_run(folder / "random", recipe, params)
    checkpoint.create_run(folder / "flat", recipe, flat)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_bytes("Latin text, ΚΑΙ ελληνικά.\n".encode() * 3)
    (folder / "b.txt").write_bytes(b"numbers 123\n" * 4)
    return folder


@pytest.fixture
def evaluated(capsys):
    def run(*argv):
        assert cli.main(["eval", *map(str, argv)]) == 0
        return capsys.readouterr().out

    return run


def test_a_uniform_model_costs_the_logarithm_of_its_size(runs, texts, evaluated):
    files = texts / "a.txt", texts / "b.txt"
    whole = json.loads(evaluated(runs / "flat", "--data", *files, "--dtype", "float64", "--json"))
    for each in (whole, *whole["files"]):
        assert each["bits_per_byte"] == pytest.approx(math.log2(512), rel=1e-15)
    assert [each["bytes"] for each in whole["files"]] == [f.stat().st_size for f in files]
    lines = evaluated(runs / "flat", "--data", texts / "a.txt", "--robustness").splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["9.000000"] * 5


def test_a_table_of_files_and_models(runs, texts, evaluated):
    argv = runs / "random", runs / "flat", "--data", texts / "a.txt", texts / "b.txt"
    first, second = json.loads(evaluated(*argv, "--json"))
    assert [first["model"], second["model"]] == [str(argv[0]), str(argv[1])]
    lines = evaluated(*argv).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [str(argv[3]), str(argv[4]), "total"]
    for line, ours, theirs in zip(
        lines[1:], [*first["files"], first], [*second["files"], second], strict=True
    ):
        assert line.split()[1:] == [
            str(ours["bytes"]), f"{ours['bits_per_byte']:.6f}", f"{theirs['bits_per_byte']:.6f}"
        ]  # fmt: skip
    alone = json.loads(evaluated(runs / "random", "--data", texts / "a.txt", "--json"))
    assert set(alone) == {"nats", "bytes", "bits_per_byte", "step", "dtype"}
    joined = json.loads(evaluated(runs / "random", "--data", texts, "--json"))
    assert "files" not in joined and joined["bytes"] == first["bytes"]
    bound = tolerances.OTHER_PLACE["float32"]
    assert joined["nats"] == pytest.approx(first["nats"], rel=bound)


@pytest.mark.parametrize("by", ["source", "file", "document", "script", "position"])
def test_parts_add_up_to_the_whole(by, runs, texts, evaluated):
    result = json.loads(evaluated(runs / "random", "--data", texts, "--by", by, "--json"))
    groups = result["groups"]
    assert result["by"] == by and all(next(iter(group)) == by for group in groups)
    assert sum(group["bytes"] for group in groups) == result["bytes"]
    nats = math.fsum(group["nats"] for group in groups)
    assert nats == pytest.approx(result["nats"], rel=1e-12)
    counts = {group[by]: group["bytes"] for group in groups}
    if by == "script":
        assert counts == {"Latin": 55, "Greek": 66, "Common": 38}
    if by == "position":
        assert list(counts) == ["0", "1", "2–3", "4–7", "8–15", "16–19"]


def test_a_stride_gives_each_byte_more_to_go_by(runs, texts, evaluated):
    content = (texts / "a.txt").read_bytes()
    argv = runs / "random", "--data", texts / "a.txt", "--stride", "3", "--json"
    result = json.loads(evaluated(*argv))
    assert result["bytes"] == len(content)
    recipe, params, _ = checkpoint.load_run(runs / "random")
    model = define_model(recipe.model)[0](params)
    twin = make_twin(recipe.model, params)
    ours = bytelm_jax.evaluate(model, content, LENGTH, stride=3)
    theirs = bytelm_torch.evaluate(twin, content, LENGTH, stride=3)
    bound = tolerances.OTHER_PLACE["float32"]
    assert ours.count == theirs.count == len(content)
    assert ours.nats == pytest.approx(theirs.nats, rel=bound)
    assert result["nats"] == pytest.approx(theirs.nats, rel=bound)
    plain = bytelm_torch.evaluate(twin, content, LENGTH)
    assert abs(plain.nats - theirs.nats) > 5 * bound * plain.nats  # or the stride did nothing


def test_what_cannot_be_evaluated_is_refused(runs, texts, capsys):
    argv = "eval", runs / "flat", "--data", texts / "a.txt"
    assert "stride=21: must be from 1 to" in refused(capsys, *argv, "--stride", 21)
    assert "RUNS" in refused(capsys, "eval", "--data", texts / "a.txt")
    assert "--by" in refused(capsys, *argv, "--by", "letter")
