"""A run starts from any weights that can be read: the same ones in both packages, or a refusal."""

import shutil

import jax
import numpy as np
import pytest
import torch

import bytelm_torch
import bytelm_torch.hf
from bytelm import recipes
from bytelm.config import AdamWConfig, DataConfig, Recipe, TrainConfig
from bytelm.metrics import read_metrics
from bytelm.remote.copies import COMMITTED
from bytelm.remote.folder import RemoteFolder
from bytelm.starting import with_source
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert
from bytelm_jax.models import define_model
from bytelm_jax.training import checkpoint, starting
from bytelm_torch.training import loop as torch_loop
from bytelm_torch.training import parallel
from bytelm_torch.training import starting as torch_starting
from parity_tests import servers
from parity_tests.starts import with_changes
from parity_tests.tiny_models import CONFIGS

MODEL = CONFIGS["megabyte"]
ALONE = parallel.Group(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def params():
    return jax.jit(define_model(MODEL)[1], static_argnums=0)(3)


@pytest.fixture(scope="module")
def sources(params, tmp_path_factory):
    """The same weights in every form; the run of JAX has other weights at its latest step."""
    folder = tmp_path_factory.mktemp("sources")
    convert.export_model(MODEL, params, folder / "export")
    model = bytelm_torch.from_pretrained(folder / "export")
    bytelm_torch.hf.from_native(model).save_pretrained(folder / "transformers")
    recipe = Recipe(name="source", model=MODEL)
    checkpoint.create_run(folder / "jax", recipe, params)
    other = {name: value + 1 for name, value in params.items()}
    with checkpoint.open_checkpoints(folder / "jax", TrainConfig()) as manager:
        checkpoint.save(manager, 2, other, {"mean": other}, recipe, "", None)
    bytelm_torch.save_pretrained(model, folder / "torch" / "checkpoints" / "7")
    shutil.copy(folder / "jax" / "config.json", folder / "torch" / "config.json")
    return folder


@pytest.mark.parametrize("name", ["jax@0", "torch", "torch@7", "export", "transformers"])
def test_both_packages_start_from_the_same_weights(name, sources, params):
    check_start(str(sources / name), name, sources, params)


def test_weights_at_an_address_are_those_of_the_folder(sources, params, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with servers.stores():
        for protocol, name in (("gs", "export"), ("s3", "torch@7"), ("s3", "jax@0")):
            address = f"{protocol}://{servers.BUCKET}"
            folder = name.partition("@")[0]
            if name == "jax@0":  # a run that a trainer has put there
                RemoteFolder(address).write(f"jax/checkpoints/0/{COMMITTED}", b"")
            RemoteFolder(address).upload(sources / folder, folder, "")
            check_start(f"{address}/{name}", name, sources, params)
        with pytest.raises(ValueError, match=f"{address}/none: does not exist; check the spelling"):
            read = starting.read_config
            with_source(recipes.megabyte_tiny(), f"{address}/none@2", tmp_path / "no run", read)


def check_start(source, name, sources, params):
    """Both packages begin with `params`, and say that they are those of `source`."""
    recipe = with_source(recipes.megabyte_tiny(), source, sources / "no run", starting.read_config)
    assert recipe.model == MODEL and recipe.train.init_from == source
    begun, ours = starting.load_start(recipe)
    assert ours.keys() == params.keys()
    for key, value in params.items():
        np.testing.assert_array_equal(ours[key], value)
    step = {"jax@0": " at step 0", "torch": " at step 7", "torch@7": " at step 7"}.get(name, "")
    assert begun.origin.startswith(f"{source}{step}, sha256:")
    if not name.startswith("jax"):
        theirs, model = torch_starting.start_model(recipe, ALONE.device)
        assert theirs.origin == begun.origin
        back = convert.from_torch({k: v.numpy() for k, v in model.state_dict().items()}, MODEL)
        assert all((back[key] == value).all() for key, value in params.items())
    else:
        with pytest.raises(ValueError, match="a run folder of JAX, which JAX alone reads"):
            torch_starting.start_model(recipe, ALONE.device)


def test_what_does_not_fit_is_named_and_nothing_is_written(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"some text " * 400)
    damaged = tmp_path / "damaged"
    shutil.copytree(sources / "export", damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    export = sources / "export"
    for options, says in {
        f"megabyte_tiny --init-from {export} --global-dim 24": r"there and",
        f"megabyte_tiny --init-from {export} --vocab.pad-id 300": "has another id map",
        f"lfbyte_tiny --init-from {export}": "architecture megabyte, and lfbyte_tiny is lfbyte",
        f"megabyte_tiny --init-from {damaged}": "model.safetensors",
        f"megabyte_tiny --init-from {sources / 'jax'}@5": "checkpoint=5",
        f"megabyte_tiny --init-from {export}@best": "is not a run folder",
        "megabyte_tiny --init-from none": "train.init_from=none: does not exist",
        "megabyte_tiny --init-from=": "needs a value",
    }.items():
        command = ["train", *options.split(), "--data", "text", "--sequence-length", "8"]
        assert cli.main([*command, "--batch-size", "8", "--steps", "2"]) == 2, options
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (options, error)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["damaged", "text"]


def test_a_stable_run_goes_on_and_decays_when_asked(tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"some text " * 100)
    recipe = Recipe(
        name="stable",
        model=MODEL,
        optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=2),
        data=DataConfig(paths=(str(tmp_path / "text"),), sequence_length=8),
        train=TrainConfig(steps=6, batch_size=4, log_every=1, eval_every=0),
    )

    def run(name, *changes):
        torch_loop.train(with_changes(recipe, changes), tmp_path / name)
        return bytelm_torch.from_pretrained(tmp_path / name).state_dict(), capsys.readouterr().err

    stable = "optimizer.schedule=wsd"
    straight, _ = run("straight", stable, "optimizer.decay_steps=2")
    run("parts", stable, "train.steps=2")
    run("parts", stable, "train.steps=4")
    shutil.copytree(tmp_path / "parts", tmp_path / "branch")
    extended, said = run("parts", stable, "optimizer.decay_steps=2")
    assert all(torch.equal(value, extended[name]) for name, value in straight.items())
    assert "jumps" not in said
    _, said = run("branch", stable, "train.steps=5", "optimizer.decay_steps=1")
    assert "jumps" not in said
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "branch" / "metrics.jsonl") if "loss" in line]  # fmt: skip  # noqa: E501
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.01, 0.01])
    run("cosine", "train.steps=4")
    _, said = run("cosine")
    assert "rate jumps at step 4, from 0.001 under 4 steps to 0.0055 under 6; under --" in said
