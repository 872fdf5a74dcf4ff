"""The same run in both packages: batches, losses, validation; and torch's own processes."""

import ast
import json
import math
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
import torch

import bytelm_torch
from bytelm import data, recipes, tolerances
from bytelm.config import (
    AdamWConfig,
    BLTConfig,
    DataConfig,
    LFByteConfig,
    MegabyteConfig,
    Recipe,
    TrainConfig,
    change_optimizer,
    from_dict,
    model_from_dict,
    to_dict,
    training_flops_per_byte,
)
from bytelm.config import Recipe as TorchRecipe
from bytelm.config.block import PAPER
from bytelm.data.shuffle import shuffled_index, skips_last_row
from bytelm.metrics import read_metrics
from bytelm.runs import start_notes
from bytelm_jax.interop import convert
from bytelm_jax.models import define_model
from bytelm_jax.training import loop as jax_train
from bytelm_jax.training.batches import training_batches as jax_batches
from bytelm_torch.train import main
from bytelm_torch.training import loop as train
from bytelm_torch.training import parallel, reporter
from bytelm_torch.training.batches import training_batches as torch_batches
from bytelm_torch.training.checkpoint import saved_steps
from bytelm_torch.training.starting import start_model
from parity_tests.starts import with_changes
from parity_tests.tiny_models import CONFIGS

ROOT = Path(__file__).parents[1]
MODEL = MegabyteConfig(
    patch_size=4,
    global_dim=4,
    local_dim=8,
    max_length=16,
    global_layers=1,
    global_heads=2,
    local_layers=1,
    local_heads=2,
    init_std=0.2,
)
RECIPE = Recipe(
    name="both",
    model=MODEL,
    optimizer=AdamWConfig(learning_rate=1e-2, warmup_steps=2),
    data=DataConfig(sequence_length=15, validation_fraction=0.2, shuffle_seed=3),
    train=TrainConfig(
        steps=5, batch_size=4, devices=1, log_every=1, eval_every=0, compute_dtype="float32"
    ),
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    source = np.random.default_rng(0)
    for name in "abcdefgh":
        text = b" ".join(bytes(source.integers(97, 105, 5, np.uint8)) for _ in range(20))
        (folder / name).write_bytes(text)
    return folder


def test_what_transformers_cannot_express_is_said_at_the_start(corpus, tmp_path, capsys):
    recipe = torch_recipe(corpus, steps=1)
    model = replace(CONFIGS["blt"], patcher="space", global_block=PAPER)
    entropy = replace(recipe, model=CONFIGS["entropy"])
    assert start_notes(recipe) == start_notes(entropy) == []
    public = replace(model, patcher="byte")
    assert public.transformers_problem is None
    assert start_notes(replace(recipe, model=public)) == []
    adapted = replace(recipe, train=replace(recipe.train, lora_rank=2))
    assert "adapters train over random weights" in start_notes(adapted)[0]
    adapted = replace(recipe, train=replace(adapted.train, init_from="exports/base"))
    assert start_notes(adapted) == []
    train.train(replace(recipe, model=model), tmp_path)
    why = "(patcher='space': transformers only has 'entropy' and 'byte')"
    note = f"note: `bytelm export --format hf-blt` cannot write this model {why}"
    assert note in capsys.readouterr().err.splitlines()


def torch_recipe(corpus, **changes):
    recipe = replace(RECIPE, data=replace(RECIPE.data, paths=(str(corpus),)))
    recipe = replace(recipe, train=replace(recipe.train, **changes))
    return from_dict(TorchRecipe, to_dict(recipe))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An export of JAX's initial parameters."""
    folder = tmp_path_factory.mktemp("start")
    convert.export_model(MODEL, jax.jit(define_model(MODEL)[1], static_argnums=0)(0), folder)
    return folder


@pytest.fixture(scope="module")
def one_process(corpus, start, tmp_path_factory):
    run = tmp_path_factory.mktemp("torch")
    assert train.train(torch_recipe(corpus, init_from=str(start)), run) == (5, False)
    return run


# ---- batches --------------------------------------------------------------------------------


def test_the_shuffle_is_grain_s():
    for count in (1, 3, 1000, 65537, 65538, 2**20 + 3, 2**32):
        for seed in (0, 2**32 - 1):
            theirs = grain.MapDataset.range(count).seed(seed).shuffle().repeat(None)
            for position in (0, 1, count - 1, count, 3 * count + count // 2):
                assert shuffled_index(position, count, seed, "grain") == theirs[position]
                if not skips_last_row(count):
                    assert shuffled_index(position, count, seed) == theirs[position]


def test_the_batches_are_those_of_jax(corpus):
    windows = data.Windows(data.open_corpus([corpus]), MODEL.vocab, 15, True)
    for process in range(2):
        arguments = (windows, 4, 7, 3, process, 2)
        actual, expected = torch_batches(*arguments), jax_batches(*arguments)
        for _ in range(2 * len(windows) // 4):  # into the third epoch
            np.testing.assert_array_equal(next(actual).ids, next(expected).ids, strict=True)
    with pytest.raises(ValueError, match="batch_size=3: must be a positive multiple"):
        torch_batches(windows, 3, 0, 0, 0, 2)


# ---- the run --------------------------------------------------------------------------------


def test_both_packages_log_the_same_run(corpus, start, one_process, tmp_path):
    recipe = replace(RECIPE, data=replace(RECIPE.data, paths=(str(corpus),)))
    recipe = replace(recipe, train=replace(recipe.train, init_from=str(start)))
    jax_train.train(recipe, tmp_path)
    ours, theirs = (
        read_metrics(tmp_path / "metrics.jsonl"),
        read_metrics(one_process / "metrics.jsonl"),
    )
    steps = [1, 2, 3, 4, 5, 5, 5]  # at last the validation, and the time that all took
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == steps
    for record, other in zip(ours, theirs, strict=True):
        assert record.keys() == other.keys()
        for name in ("loss", "grad_norm", "learning_rate", "validation_bits_per_byte"):
            if name in record:
                error = abs(record[name] - other[name]) / record[name]
                assert error <= tolerances.DEVICES_AFTER_5_STEPS, (name, record, other)
    assert ours[4]["loss"] < ours[0]["loss"]
    assert (one_process / "config.json").read_text() == (tmp_path / "config.json").read_text()


def parameters(run, step=5):
    return bytelm_torch.from_pretrained(run / "checkpoints" / str(step)).state_dict()


def test_an_interrupted_run_ends_bit_for_bit_where_the_other_did(
    corpus, start, one_process, tmp_path, monkeypatch
):
    recipe = torch_recipe(corpus, checkpoint_every=2, keep_last=1, keep_best=0)
    began = replace(recipe, train=replace(recipe.train, init_from=str(start)))
    real, calls = parallel.make_train_step, []

    def stopping(*arguments):
        step = real(*arguments)

        def call(count, rows, rate, clip, stop):
            calls.append(count)
            return step(count, rows, rate, clip, len(calls) == 3)

        return call

    monkeypatch.setattr(parallel, "make_train_step", stopping)
    assert train.train(began, tmp_path) == (3, True)
    assert saved_steps(tmp_path) == [3]
    assert train.train(recipe, tmp_path) == (5, False)
    assert calls == [0, 1, 2, 3, 4]
    expected = parameters(one_process)
    assert all(torch.equal(v, expected[k]) for k, v in parameters(tmp_path).items())
    losses = [
        [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
        for run in (tmp_path, one_process)
    ]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"model.patch_size=2: .* was started with 4"):
        train.train(replace(recipe, model=replace(recipe.model, patch_size=2)), tmp_path)
    (corpus / "i").write_bytes(b"other bytes")
    try:
        with pytest.raises(ValueError, match="data: not the bytes that"):
            train.train(torch_recipe(corpus, steps=6), tmp_path)
    finally:
        (corpus / "i").unlink()


def test_initial_weights_of_any_dtype_become_float32(corpus, start, tmp_path):
    model = bytelm_torch.from_pretrained(start, torch.bfloat16)
    alone = parallel.Group(0, 1, torch.device("cpu"))
    bytelm_torch.save_pretrained(model, tmp_path / "sixteen")
    recipe = torch_recipe(corpus, init_from=str(tmp_path / "sixteen"))
    _, started = start_model(recipe, alone.device)
    assert {value.dtype for value in started.parameters()} == {torch.float32}
    model.double().to_logits.bias.data[3] = 1e39
    bytelm_torch.save_pretrained(model, tmp_path / "large")
    line = r"large: to_logits\.bias holds a value too large for float32$"
    with pytest.raises(ValueError, match=line):
        start_model(torch_recipe(corpus, init_from=str(tmp_path / "large")), alone.device)


def test_two_processes_and_accumulation_change_nothing(corpus, start, one_process, tmp_path):
    config = tmp_path / "recipe.json"
    config.write_text(json.dumps(to_dict(torch_recipe(corpus))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "bytelm_torch.train", str(config)]
    command += ["train.accumulation_steps=2", "train.devices=0", "--run-dir", str(tmp_path / "run")]
    command += [f"train.init_from={start}"]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    try:
        assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    expected = parameters(one_process)
    for name, value in parameters(tmp_path / "run").items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error <= tolerances.DEVICES_AFTER_5_STEPS, name
    ours, theirs = (
        read_metrics(run / "metrics.jsonl")[-2] for run in (tmp_path / "run", one_process)
    )
    error = abs(ours["validation_loss"] - theirs["validation_loss"])
    assert error <= tolerances.DEVICES_AFTER_5_STEPS * theirs["validation_loss"]


def test_autocast_computes_in_bfloat16_and_keeps_float32_parameters():
    config = LFByteConfig(embed_dim=8, num_layers=1, adapt_dim=4, rank=2, kernel_length=8)
    for described in (config, MODEL):
        torch.manual_seed(0)
        model = bytelm_torch.build_model(model_from_dict(to_dict(described))).eval()
        rows = np.arange(30, dtype=np.int32).reshape(2, 15) + 60
        group = parallel.Group(0, 1, torch.device("cpu"))
        losses = []
        for dtype in ("float32", "bfloat16"):
            settings = TrainConfig(batch_size=2, compute_dtype=dtype)
            nothing = torch.optim.SGD(model.parameters(), lr=0.0)
            step = parallel.make_train_step(model, nothing, settings, 257, group)
            losses.append(float(step(0, rows, 0.0, 0.0, False)["loss"]))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert losses[0] != losses[1]
        # A NaN weight makes a non-finite loss: nothing else moves then.
        mover = torch.optim.AdamW(model.parameters())
        step = parallel.make_train_step(model, mover, settings, 257, group)
        with torch.no_grad():
            next(model.parameters()).fill_(torch.nan)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert math.isnan(float(step(0, rows, 1.0, 1.0, False)["loss"]))
        for name, value in model.state_dict().items():
            assert torch.equal(value.isnan(), before[name].isnan()), name
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
        assert not mover.state
        assert abs(losses[0] - losses[1]) <= tolerances.BF16_LOSS * losses[0]


REFUSED = {
    "train.devices": 3,
    "train.fsdp": 2,
    "train.tensor": 2,
    "train.parallel": "shard_map",
    "train.entropy_from": "runs/entropy",
}
"""Fields that the torch trainer refuses by name, with a value that it refuses."""


def test_no_field_of_the_configuration_is_ignored(corpus, tmp_path):
    """Every field is read by the trainer or by what it calls, or refused by its name."""
    folders = ("bytelm/data", "bytelm", "bytelm_torch/training", "bytelm_torch/optimizers")
    files = [file for folder in folders for file in (ROOT / folder).glob("*.py")]
    trees = [ast.parse(file.read_text("utf-8")) for file in files]
    read = {n.attr for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    recipe = torch_recipe(corpus)
    for section in ("data", "train"):
        for field in fields(getattr(recipe, section)):
            reader = "length_at" if field.name.startswith("warmup_length") else field.name
            assert reader in read or f"{section}.{field.name}" in REFUSED, field.name
    for name, value in REFUSED.items():
        changed = with_changes(recipe, [f"{name}={value}"])
        with pytest.raises(ValueError, match=rf"^\S*{name.split('.')[1]}={value}: "):
            train.train(changed, tmp_path / "run")
    with pytest.raises(ValueError, match=r"model.patcher='entropy': needs a trained entropy"):
        train.train(replace(recipe, model=recipes.blt_tiny().model), tmp_path / "run")
    with pytest.raises(ValueError, match="sequence_length=60: this model has max_len"):
        train.train(with_changes(recipe, ["data.sequence_length=60"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_utilisation_counts_three_passes_but_one_of_a_frozen_part(corpus, tmp_path, monkeypatch):
    blt = replace(CONFIGS["blt"], patcher="entropy")
    assert isinstance(blt, BLTConfig)
    whole, frozen = blt.flops_per_byte(15), blt.entropy.flops_per_byte(15)
    assert training_flops_per_byte(blt, 15) == pytest.approx(3 * (whole - frozen) + frozen)
    counted, real = [], reporter.Throughput
    monkeypatch.setattr(reporter, "Throughput", lambda *a: [counted.append(a[0]), real(*a)][1])
    monkeypatch.setattr(reporter, "training_flops_per_byte", lambda *_: 7.0)
    train.train(torch_recipe(corpus, steps=1), tmp_path / "run")
    assert counted == [7.0]


def test_processes_of_other_rates_seeds_or_data_do_not_train(corpus, tmp_path, monkeypatch):
    recipe, told = torch_recipe(corpus, devices=0), []
    for name, change in (
        ("optimizer.learning_rate", {"optimizer.learning_rate": "0.5"}),
        ("train.seed", {"train.seed": "7"}),
        ("data", {"data": '"other"'}),
    ):

        def gather(everyone, found, change=change):
            told.append(found)
            everyone[:] = [found, found | change]

        monkeypatch.setattr(parallel.dist, "all_gather_object", gather)
        two = parallel.Group(0, 2, torch.device("cpu"))
        monkeypatch.setattr(parallel, "join_group", lambda two=two, **_: nullcontext(two))
        with pytest.raises(ValueError, match=f"^{name}=.* in process 1, .* in process 0: start"):
            train.train(recipe, tmp_path / "run")
    assert len(told) == 3 and not (tmp_path / "run").exists()


def test_warmup_lengths_cut_the_windows(corpus, tmp_path, monkeypatch):
    recipe = torch_recipe(corpus, steps=4)
    changes = ["data.warmup_lengths=[3, 5]", "data.warmup_length_steps=1"]
    shapes = []
    original = parallel.make_train_step

    def recorded(*arguments):
        step = original(*arguments)

        def noted(count, rows, *rest):
            shapes.append(rows.shape)
            return step(count, rows, *rest)

        return noted

    monkeypatch.setattr(parallel, "make_train_step", recorded)
    assert train.train(with_changes(recipe, changes), tmp_path / "run") == (4, False)
    assert shapes == [(20, 3), (12, 5), (4, 15), (4, 15)]


def test_the_optimizer_may_change_with_its_fields(tmp_path):
    recipe = torch_recipe(tmp_path)
    for name in ("sgd", '"sgd"'):
        changed = with_changes(recipe, ["optimizer.momentum=0.8", f"optimizer.name={name}"])
        usual = change_optimizer(recipe.optimizer, "sgd")
        assert changed.optimizer == replace(usual, momentum=0.8)


def test_a_command_that_is_wrong_ends_in_one_line(tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(to_dict(torch_recipe(tmp_path))))
    for arguments, expected in {
        ("none.json",): "train: none.json: cannot be read (No such file or directory); ",
        (str(recipe), "train.step=3"): "train: --train.step: no such field; did you mean",
        (str(recipe), "optimizer.momentum=0.8"): "train: --optimizer.momentum: has no effect on",
        (str(recipe), "optimizer.name=sdg"): "train: optimizer.name='sdg': choose one of adamw, ",
        (str(recipe), "train.steps=x"): "train: Error parsing --train.steps: invalid literal",
        (str(recipe), "--data="): "train: --data.paths: needs a value, not an empty one\n",
        (str(recipe), "--data"): "train: --data.paths: needs a value\n",
        ("",): "train: RECIPE: name the recipe first: ",
        (str(recipe), "train.init_from="): "train: --train.init_from: needs a value\n",
        (str(recipe), "--init-from", "none"): "train: train.init_from=none: does not exist; ",
        (str(recipe), "--run-dir", ""): "train: --run-dir: needs a value\n",
        (
            str(recipe),
            "train.batch_size=2147483644",
        ): "train: batch_size=2147483644: the logits ",
        (str(recipe), "--data", str(recipe)): f"train: {tmp_path / 'nothing'}: does not exist; ",
        (str(recipe),): f"train: {tmp_path / 'nothing'}: does not exist; ",
    }.items():
        run = [f"data.paths={tmp_path / 'nothing'}", "--run-dir", str(tmp_path / "run")]
        assert main([*arguments[:1], *run, *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert error.startswith(expected) and error.count("\n") == 1, error


@pytest.mark.parametrize("package", ["jax", "torch"])
def test_a_second_trainer_of_a_folder_is_refused(package, corpus, tmp_path, monkeypatch):
    loop = {"jax": jax_train, "torch": train}[package]
    recipe, save, refused = torch_recipe(corpus, steps=1), loop.checkpoint.save, []

    def save_and_train(*arguments):
        with pytest.raises(ValueError, match="another process is training there; wait") as caught:
            loop.train(recipe, tmp_path / "run")
        refused.append(caught.value)
        save(*arguments)

    monkeypatch.setattr(loop.checkpoint, "save", save_and_train)
    assert loop.train(recipe, tmp_path / "run") == (1, False)
    assert refused
    assert loop.train(recipe, tmp_path / "run") == (1, False)  # the lock is gone with its holder


def moved(run):
    os.rename(run, run.with_name("elsewhere"))


def replaced(run):
    moved(run)
    run.mkdir()


def changed(run):
    (run / "config.json").write_text((run / "config.json").read_text() + " ")


@pytest.mark.parametrize("package", ["jax", "torch"])
@pytest.mark.parametrize(
    ("tamper", "line"),
    [
        (moved, "run_dir={}: was moved or replaced during the run; nothing more was saved"),
        (replaced, "run_dir={}: was moved or replaced during the run; nothing more was saved"),
        (changed, "{}/config.json: was changed during the run; nothing more was saved"),
    ],
)
def test_nothing_is_saved_in_a_folder_that_is_no_longer_the_run_s(
    package, tamper, line, corpus, tmp_path, monkeypatch
):
    run, after = tamper_after_step_1(package, tamper, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=re.escape(line.format(run))):
        train_in(package, corpus, run)
    assert files_of(run) == after
    if tamper is not changed:
        assert saved_steps(run.with_name("elsewhere")) == [1]


@pytest.mark.parametrize("package", ["jax", "torch"])
def test_a_deleted_config_json_is_written_again(package, corpus, tmp_path, monkeypatch, capsys):
    contents = []

    def deleted(run):
        contents.append((run / "config.json").read_bytes())
        (run / "config.json").unlink()

    run, _ = tamper_after_step_1(package, deleted, tmp_path, monkeypatch)
    assert train_in(package, corpus, run) == (2, False)
    assert (run / "config.json").read_bytes() == contents[0]
    assert f"warning: {run}/config.json: was deleted; written again" in capsys.readouterr().err
    assert saved_steps(run) == [1, 2]


def train_in(package, corpus, run):
    recipe = torch_recipe(corpus, steps=2, checkpoint_every=1)
    return {"jax": jax_train, "torch": train}[package].train(recipe, run)


def tamper_after_step_1(package, tamper, folder, monkeypatch):
    """The run folder, and the files that it will hold after `tamper`."""
    checkpoint = {"jax": jax_train, "torch": train}[package].checkpoint
    run, after, save = folder / "run", [], checkpoint.save

    def tampered(*arguments):
        save(*arguments)
        if package == "jax":
            checkpoint.finish(arguments[0])
        tamper(run)
        after.extend(files_of(run))
        monkeypatch.setattr(checkpoint, "save", save)

    monkeypatch.setattr(checkpoint, "save", tampered)
    return run, after


def files_of(run):
    return sorted(path for path in run.rglob("*") if "progress" not in path.parts)
