"""Branches, optimizers that come along, averages of weights: exact, and alike in both packages."""

import json
import shutil

import jax
import numpy as np
import pytest

import bytelm_torch.train
from bytelm import tolerances
from bytelm.config import AdamWConfig, DataConfig, Recipe, TrainConfig, to_dict
from bytelm.metrics import METRIC, read_metrics
from bytelm.runs import load_recipe
from bytelm.starting import ANEW
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert
from bytelm_jax.interop.convert import in_torch_layout
from bytelm_jax.models import define_model
from bytelm_jax.training import checkpoint
from parity_tests.tiny_models import CONFIGS

pytestmark = pytest.mark.usefixtures("compiled_once")
MODEL = CONFIGS["megabyte"]
PACKAGES = {"jax": lambda argv: cli.main(["train", *argv]), "torch": bytelm_torch.train.main}
DECAY = 0.75
SCALED = ("--learning-rate-scale", "to_logits.*=0.1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_once):
    """A text, an export to start from, and a recipe."""
    folder = tmp_path_factory.mktemp("branching")
    for name in ("text", "other"):
        (folder / name).write_bytes(f"some {name} to learn from; ".encode() * 100)
    params = jax.jit(define_model(MODEL)[1], static_argnums=0)(3)
    convert.export_model(MODEL, params, folder / "export")
    recipe = Recipe(
        name="base",
        model=MODEL,
        optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=2, schedule="wsd"),
        data=DataConfig(paths=(str(folder / "text"),), sequence_length=8),
        train=TrainConfig(
            steps=6, batch_size=4, log_every=1, eval_every=3, checkpoint_every=2, keep_last=9,
            devices=1, compute_dtype="float32", average_decay=DECAY,
        ),
    )  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    return folder


class Package:
    """One package's `train` command, in a folder of its own."""

    def __init__(self, name, folder):
        self.name, self.home, self.out = name, folder, folder / name

    def run(self, name, *argv):
        return PACKAGES[self.name]([*argv, "--run-dir", str(self.out / name)])

    def weights(self, name, averaged=True):
        """The parameters of the latest checkpoint, in the layout of torch."""
        if self.name == "torch":
            return bytelm_torch.from_pretrained(self.out / name).state_dict()
        params = checkpoint.load_run(self.out / name, averaged=averaged)[1]
        return {key: value.read() for key, value in in_torch_layout(params).items()}

    def metrics(self, name):
        return [
            {k: v for k, v in record.items() if k in ("step", "loss", "learning_rate", METRIC)}
            for record in read_metrics(self.out / name / "metrics.jsonl")
        ]


@pytest.fixture(scope="module")
def packages(folder):
    """Each with a run, and branches of it."""
    return {name: with_branches(Package(name, folder), folder) for name in PACKAGES}


@pytest.fixture(params=PACKAGES)
def package(request, packages):
    return packages[request.param]


def with_branches(package, folder):
    base = ["--init-from", str(folder / "export")]
    assert package.run("base", str(folder / "recipe.json"), *base) == 0
    of = str(package.out / "base")
    assert package.run("same", "--branch-from", f"{of}@2") == 0
    other = [f"--data={folder / 'other'}", "--learning-rate=3e-2", "optimizer.decay_steps=3"]
    assert package.run("other", "--branch-from", f"{of}@4", "--steps", "7", *other) == 0
    sgd = ["--optimizer", "sgd", "--average-decay", "0"]
    assert package.run("sgd", "--branch-from", f"{of}@4", *sgd) == 0
    along = ["--init-from", f"{of}@4", "--init-optimizer", "--steps", "3", "--average-decay", "0"]
    assert package.run("along", str(folder / "recipe.json"), *along) == 0
    return package


def equal(ours, theirs):
    return all(np.array_equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())


def test_a_branch_without_a_change_is_the_run(package):
    assert equal(package.weights("same"), package.weights("base"))
    assert package.metrics("same") == package.metrics("base")[2:]
    recipe = load_recipe(package.out / "same")
    assert recipe.origin.startswith(f"{package.out / 'base'}@2 at step 2, sha256:")
    assert recipe.train.init_from == "" and recipe.train.branch_from.endswith("base@2")


def test_a_branch_needs_its_source_no_more(package, capsys):
    shutil.copytree(package.out / "same", package.out / "gone")
    for file in (package.out / "gone" / "checkpoints").iterdir():
        if file.name != "2":
            shutil.rmtree(file)
    hidden = package.out / "base"
    hidden.rename(package.out / "hidden")
    try:
        assert package.run("gone", "--branch-from", f"{hidden}@2") == 0
        assert "resuming base" in capsys.readouterr().err
        assert package.run("gone", str(package.home / "recipe.json")) == 0
        assert equal(package.weights("gone"), package.weights("same"))
        assert package.run("new", "--branch-from", f"{hidden}@2") == 2
        assert "base@2: is no run folder" in capsys.readouterr().err
    finally:
        (package.out / "hidden").rename(hidden)


def require_same_metrics(packages, name):
    ours, theirs = packages["jax"], packages["torch"]
    for record, other in zip(ours.metrics(name), theirs.metrics(name), strict=True):
        for key, value in record.items():
            error = abs(value - other[key]) / max(abs(value), 1)
            assert error <= tolerances.DEVICES_AFTER_5_STEPS, (name, key, record, other)


def test_both_packages_branch_alike(packages):
    ours = packages["jax"]
    for name in ("base", "other", "sgd", "along"):
        require_same_metrics(packages, name)
        weights = ours.weights(name)
        for key, value in packages["torch"].weights(name).items():
            assert np.allclose(weights[key], value, rtol=0, atol=2e-5), (name, key)
    rates = [round(r["learning_rate"], 6) for r in ours.metrics("other") if "learning_rate" in r]
    assert rates == [0.03, 0.021, 0.012]
    rates = [round(r["learning_rate"], 6) for r in ours.metrics("along") if "learning_rate" in r]
    assert rates == [0.005, 0.01, 0.01]


@pytest.mark.slow
def test_other_rates_begin_with_a_new_state_of_the_optimizer(packages, capsys):
    """In torch its groups are others, so that moments would come to the wrong parameters.

    Weights are not compared: Adam's first step has the sign of gradients that are rounding errors.
    """
    for package in packages.values():
        of = f"{package.out / 'base'}@4"
        assert package.run("scaled", "--branch-from", of, *SCALED) == 0
        assert ANEW in capsys.readouterr().err
        assert package.metrics("scaled")[-1]["step"] == 6
    require_same_metrics(packages, "scaled")


def test_the_average_is_what_is_evaluated_and_exported(packages, tmp_path, capsys):
    """Its value is that of torch, by the test above."""
    run, text = str(packages["jax"].out / "base"), str(packages["jax"].home / "text")
    figures = {}
    for option in ("--average", "--no-average"):
        capsys.readouterr()
        assert cli.main(["eval", run, "--data", text, option, "--json"]) == 0
        figures[option] = json.loads(capsys.readouterr().out)["bits_per_byte"]
        out = tmp_path / option
        assert cli.main(["export", run, "--out", str(out), option]) == 0
        weights = packages["jax"].weights("base", option == "--average")
        exported = bytelm_torch.from_pretrained(out).state_dict()
        assert equal(weights, {key: value.numpy() for key, value in exported.items()})
    assert figures["--average"] != figures["--no-average"]
    assert cli.main(["eval", str(packages["jax"].out / "sgd"), "--data", text, "--no-average"]) == 2
    assert "sgd keeps none of its weights" in capsys.readouterr().err


def test_what_cannot_be_a_branch_is_refused(package, capsys):
    of = str(package.out / "base")
    new, recipe = package.out / "refused", str(package.home / "recipe.json")
    for argv, says in {
        ("--branch-from", f"{of}@5"): "checkpoint=5: choose latest, best or one of [2, 4, 6]",
        (f"train.branch_from={of}@5",): "checkpoint=5: choose latest, best or one of [2, 4, 6]",
        ("--branch-from", of): "begins at step 6, so train.steps=6 is over; give more steps",
        ("--branch-from", f"{of}@2", "--patch-size=2"): "model.patch_size=2: train.branch_from=",
        ("--branch-from", f"{of}@2", "--optimizer", "q_learning_sgd"): "counts from step 0",
        ("--branch-from", str(package.home / "export")): "is no run folder",
        (recipe, "--branch-from", of): "has a recipe; leave",
        (recipe, "--init-optimizer"): "init_optimizer=True: needs init_from",
        (recipe, "--init-from", str(package.home / "export"), "--init-optimizer"): "is no run",
        (recipe, "--init-from", of, "--init-optimizer", "--optimizer=sgd"): "trained with adamw",
        (recipe, "--init-from", of, "--init-optimizer", "--freeze=to_logits*"): "train.freeze",
        (recipe, "--init-from", of, "--init-optimizer", *SCALED): "train.learning_rate_scale",
    }.items():
        assert package.run("refused", *argv) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (argv, error)
        assert not new.exists()
    assert package.run("base", recipe, "--learning-rate", "1") == 2
    assert f"branch off: --branch-from {of} --run-dir NEW" in capsys.readouterr().err
    assert package.run("base", recipe, "--steps", "5") == 2
    assert f"train.steps=5: {of} is at step 6 already" in capsys.readouterr().err
    assert PACKAGES[package.name]([of]) == 0  # a run folder is its own recipe, and is resumed
    assert f"in {of}, step 6" in capsys.readouterr().err
