"""Low-rank adapters: the same in both packages, the same merged, resumed bit for bit, peft's files.

peft itself is the judge of its files.
"""

import functools
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bytelm_torch
import bytelm_torch.hf
from bytelm import lora as files
from bytelm import tolerances
from bytelm.config import AdamWConfig, DataConfig, Recipe, TrainConfig
from bytelm.leaves import torch_name
from bytelm.lora import LoRA, lora_of
from bytelm.trainable import trainable
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.layers.lora import LoRALinear, init_adapters, merge
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.report import relative_error
from bytelm_jax.training import checkpoint
from bytelm_jax.training import step as steps
from bytelm_torch.interop import export as torch_export
from bytelm_torch.layers import lora as torch_lora
from bytelm_torch.models import adapt, build_model
from bytelm_torch.optimizers.build import build_optimizer
from bytelm_torch.training import checkpoint as torch_checkpoint
from bytelm_torch.training import loop as torch_loop
from bytelm_torch.training.average import Average
from parity_tests.cases import quick
from parity_tests.test_training import OPTIMIZERS, ragged_batches, run_jax, run_torch
from parity_tests.tiny_models import CONFIGS
from parity_tests.twins import MEGABYTES, random_ids, random_params

EVERY = {"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": ("*",)}


@functools.cache
def adapted(name, dtype="float64", **train):
    """Configuration, adapters, and parameters in which no adapter is 0."""
    config = CONFIGS[name]
    recipe = Recipe(name=name, model=config, train=TrainConfig(**(train or EVERY)))
    params = random_params(config, dtype)
    lora = lora_of(recipe, params)
    assert lora
    shapes = {name: value.shape for name, value in params.items()}
    source = np.random.default_rng(1)
    leaves = {
        name: jnp.asarray(0.3 * source.standard_normal(value.shape), dtype)
        for name, value in init_adapters(lora, shapes, 0).items()
    }
    return config, lora, params | leaves


def twin_of(config, lora, params):
    """The torch model with adapters and these parameters."""
    model = build_model(config)
    adapt(model, lora)
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in to_torch(params).items()}
    model.to(torch.float64).load_state_dict(tensors)
    return model.eval()


@pytest.mark.parametrize("name", quick(CONFIGS, "blt", "lfbyte"))
def test_every_plain_linear_layer_adapts_and_merges(name, x64):
    """Unmerged in JAX = in torch = merged = the weights plus a matrix of that rank, by numpy.

    A layer whose kernel something reads past the adapter would show here.
    """
    config, lora, params = adapted(name)
    ids = random_ids(config, 2, 19)
    bind, _ = define_model(config, lora)
    plain, _ = define_model(config)
    run = lambda bind: jax.jit(lambda params: bind(params)(ids))  # noqa: E731
    ours = np.asarray(run(bind)(params))
    added = {k: np.array(v) for k, v in params.items() if k not in lora.leaves}
    for layer in lora.layers:
        first, second = (np.asarray(params[leaf]) for leaf in files.adapter_leaves(layer))
        update = lora.alpha / lora.rank * first @ second
        assert np.linalg.matrix_rank(update) == lora.rank
        added[f"{layer}.kernel"] += update
    twin = twin_of(config, lora, params)
    with torch.inference_mode():
        theirs = twin(torch.from_numpy(ids)).numpy()
    model = build_model(config).to(torch.float64).eval()
    model.load_state_dict(torch_lora.merge(twin.state_dict(), lora))
    with torch.inference_mode():
        theirs_merged = model(torch.from_numpy(ids)).numpy()
    forward = run(plain)
    for other in (theirs, theirs_merged, forward(merge(params, lora)), forward(added)):
        assert relative_error(np.asarray(other), ours) <= tolerances.LOGITS["float64"]
    without = np.asarray(forward({k: v for k, v in params.items() if k in added}))
    assert relative_error(without, ours) > 1e-4


def test_200_steps_train_the_adapters_alike_and_nothing_else(x64):
    config, lora, params = adapted("megabyte", lora_rank=3, lora_alpha=6.0)
    twin, optimizer = twin_of(config, lora, params), OPTIMIZERS["adamw"]
    recipe = Recipe(name="x", model=config, train=TrainConfig(lora_rank=3, lora_alpha=6.0))
    parts = trainable(recipe, params)
    assert parts.frozen == params.keys() - set(lora.leaves)
    train = TrainConfig(steps=200, batch_size=4, devices=1, average_decay=0.99)
    batches = ragged_batches(config, 200, 4, 11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "compute_dtype", lambda *_: jnp.dtype("float64"))
        reports, state = run_jax(config, optimizer, train, batches, params, parts, lora)
    build_optimizer(optimizer, twin, parts=parts)  # freezes what does not train
    average = Average(twin, train.average_decay)
    run_torch(twin, optimizer, batches, parts, average.update)
    ours, before = to_torch(state.params), to_torch(params)
    trained = {torch_name(name) for name in lora.leaves}
    worst = 0.0
    for key, theirs in twin.state_dict().items():
        assert (ours[key].tobytes() != before[key].tobytes()) == (key in trained), key
        worst = max(worst, relative_error(ours[key], theirs.numpy()))
    assert state.average
    averages = to_torch(state.average)
    assert averages.keys() == trained
    with average.in_model():
        for key in trained:
            assert relative_error(averages[key], ours[key]) > 1e-3
            worst = max(worst, relative_error(averages[key], twin.state_dict()[key].numpy()))
    assert worst <= tolerances.AFTER_200_STEPS
    assert reports[-1]["loss"] < reports[0]["loss"]
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments == 2 + 2 * sum(params[name].size for name in lora.leaves)
    print(f"200 steps of LoRA, JAX and torch: {worst:.1e}")


@pytest.mark.slow
def test_dropout_is_the_adapters_alone_and_the_same_on_eight_devices():
    config, lora, params = adapted("megabyte", "float32", lora_rank=2, lora_dropout=0.5)
    still, ids = AdamWConfig(learning_rate=1e-12), ragged_batches(config, 2, 8, 11)
    first, one = [], TrainConfig(steps=2, batch_size=8, devices=1)
    for drops, train in (
        (lora, one),
        (lora, replace(one, devices=8, fsdp=2, remat=True)),
        (lora._replace(dropout=0.0), one),
    ):
        reports, _ = run_jax(config, still, train, ids, dict(params), lora=drops)
        first.append(reports[0]["loss"])
    error = abs(first[1] - first[0]) / first[0]
    assert error <= tolerances.DEVICES_AFTER_5_STEPS
    assert abs(first[2] - first[0]) / first[0] > 1e-3
    bind, _ = define_model(config, lora)  # without keys nothing is dropped
    plain, _ = define_model(config, lora._replace(dropout=0.0))
    np.testing.assert_array_equal(bind(params)(ids[0]), plain(params)(ids[0]))
    twin = twin_of(config, lora, params).train()
    tensor = torch.from_numpy(ids[0])
    assert not torch.equal(twin(tensor), twin(tensor))
    assert torch.equal(twin.eval()(tensor), twin(tensor))


def test_adapters_start_as_in_peft():
    config = replace(MEGABYTES["paper"], global_dim=64, local_dim=64, global_heads=4)
    recipe = Recipe(name="x", model=config, train=TrainConfig(lora_rank=16))
    lora = lora_of(recipe, abstract_params(config))
    assert lora and lora.scale == 1 and all(".attention.to_" in name for name in lora.layers)
    inits = define_model(config, lora)[1], define_model(config)[1]
    params, base = jax.jit(lambda: [init(0) for init in inits])()
    assert all((params[name] == value).all() for name, value in base.items())
    model = build_model(config)
    adapt(model, lora)
    for side in (to_torch(params), {k: v.numpy() for k, v in model.state_dict().items()}):
        for layer in lora.layers:
            first, second = (side[torch_name(name)] for name in files.adapter_leaves(layer))
            bound = first.shape[1] ** -0.5
            assert first.shape[0] == 16 and (abs(first) <= bound).all() and not second.any()
            assert first.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_sixteen_bits_do_not_fold_a_norm_past_the_adapter():
    config, lora, params = adapted("megabyte", "float32", **EVERY)
    ids = random_ids(config, 16, 40)[:, :32]
    half = {name: value.astype(jnp.bfloat16) for name, value in params.items()}
    forward = jax.jit(lambda params: define_model(config, lora)[0](params)(ids))
    ours, wide = forward(half), forward(params)
    assert relative_error(np.asarray(ours, np.float32), np.asarray(wide)) < 0.1


TRAIN = [
    "--sequence-length", "16", "--batch-size", "8", "--data", "text", "--log-every", "1",
    "--eval-every", "0", "--checkpoint-every", "2", "--keep-last", "2",
    "--lora-rank", "2", "--lora-targets", "*attention*", "*to_local",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_once):
    """A source, and a run of JAX and one of torch, 4 steps straight, and from its step 2 on."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "text").write_bytes(b"some text of the test " * 400)
    params = random_params(CONFIGS["megabyte"], "float32")
    convert.export_model(CONFIGS["megabyte"], params, folder / "base")
    data = DataConfig(paths=(str(folder / "text"),), sequence_length=16)
    train = TrainConfig(
        steps=4, batch_size=8, log_every=1, eval_every=0, checkpoint_every=2,
        init_from=str(folder / "base"),
        lora_rank=2, lora_targets=("*attention*", "*to_local"),
    )  # fmt: skip
    recipe = Recipe(name="torch", model=CONFIGS["megabyte"], data=data, train=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("straight", "parts"):
            if name == "parts":
                for run in ("", "torch-"):
                    shutil.copytree(f"{run}straight", f"{run}parts")
                    shutil.rmtree(f"{run}parts/checkpoints/4")
            command = ["train", "megabyte_tiny", *TRAIN, "--steps", "4"]
            assert cli.main([*command, "--run-dir", name, "--init-from", "base"]) == 0
            torch_loop.train(recipe, folder / f"torch-{name}")
        assert cli.main(["export", "straight", "--out", "merged"]) == 0
        assert cli.main(["export", "straight", "--out", "adapter", "--adapter"]) == 0
    return folder


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(folder):
    ends = [checkpoint.load_leaves(folder / name) for name in ("straight", "parts")]
    assert ends[0][1].keys() == ends[1][1].keys() and ends[0][2] == 4
    for name, value in ends[0][1].items():
        assert np.asarray(value).tobytes() == np.asarray(ends[1][1][name]).tobytes(), name
    for file in ("model.safetensors", files.MODEL_FILE, files.CONFIG_FILE):
        one, other = (
            (folder / f"torch-{name}" / "checkpoints" / "4" / file).read_bytes()
            for name in ("straight", "parts")
        )
        assert one == other, file
    saved = folder / "torch-straight" / "checkpoints" / "4"
    whole = torch_checkpoint.read_training(folder / "torch-straight", 4)["optimizer"]
    base = bytelm_torch.from_pretrained(folder / "base").state_dict()
    stored = torch_export.read_state(saved)[1]
    assert all(torch.equal(stored[name], value) for name, value in base.items())
    assert len(whole["state"]) == len(stored) - len(base) > 0


@pytest.mark.slow
def test_every_front_door_opens_the_merged_model(folder, capsys):
    """And what an older bytelm says of the files is in words."""
    run = folder / "torch-straight"
    merged = bytelm_torch.from_pretrained(run).state_dict()
    _, ours = convert.load_export(run / "checkpoints" / "4")
    for name, value in to_torch(ours).items():
        assert relative_error(value, merged[name].numpy()) < 1e-6
    _, params, _ = checkpoint.load_run(folder / "straight")
    exported = convert.load_export(folder / "merged")[1]
    assert params.keys() == abstract_params(CONFIGS["megabyte"]).keys()
    assert all((exported[name] == value).all() for name, value in params.items())
    options = ["--data", str(folder / "text")]
    assert cli.main(["eval", str(folder / "straight"), *options]) == 0
    assert cli.main(["eval", str(folder / "torch-straight"), *options]) == 2  # as without adapters
    said = capsys.readouterr()
    assert cli.main(["import", str(run), "--out", str(folder / "imported")]) == 0
    recipe, params, _ = checkpoint.load_run(folder / "imported")
    assert recipe.data.sequence_length == 16
    for name, value in params.items():
        assert (value == ours[name]).all(), name
    assert "bits per byte" in said.out and "PyTorch trained it" in said.err
    fields = json.loads((run / "checkpoints" / "4" / "config.json").read_text())
    assert fields["format_version"] == 2
    with pytest.raises(ValueError, match="format_version=2: has an adapter beside the weights"):
        bytelm_torch.hf.ByteLMConfig(bytelm=fields)
    with checkpoint.open_checkpoints(folder / "straight") as manager:
        assert checkpoint.read_metadata(manager, 4)["version"] == 2
    damaged = folder / "damaged"
    shutil.copytree(run / "checkpoints" / "4", damaged)
    file = damaged / files.MODEL_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    for read in (convert.load_export, bytelm_torch.from_pretrained):
        with pytest.raises(ValueError, match=files.MODEL_FILE):
            read(damaged)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21
def test_peft_loads_the_adapter(folder):
    import peft  # takes seconds

    base = bytelm_torch.hf.from_native(bytelm_torch.from_pretrained(folder / "base"))
    ids = torch.from_numpy(random_ids(CONFIGS["megabyte"], 2, 15)).long()
    merged = bytelm_torch.hf.from_native(bytelm_torch.from_pretrained(folder / "merged"))
    with torch.inference_mode():
        expected, before = merged.eval()(ids).logits, base.eval()(ids).logits
        model = peft.PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
        actual = model(ids).logits
    assert relative_error(actual.numpy(), expected.numpy()) <= tolerances.LOGITS["float32"]
    assert relative_error(actual.numpy(), before.numpy()) > 1e-4
    model.save_pretrained(str(folder / "again"))
    arrays, again = torch_export.TORCH, folder / "again" / files.MODEL_FILE
    with (
        files.open_safetensors(again, arrays) as theirs,
        files.open_safetensors(folder / "adapter" / files.MODEL_FILE, arrays) as ours,
    ):
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor.read(), theirs[name].read()), name


def test_what_does_not_fit_is_refused_by_name(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(each.name for each in folder.iterdir())
    for options, says in {
        "megabyte_tiny --lora-alpha 8": "lora_alpha=8.0: needs lora_rank",
        "megabyte_tiny --lora-rank 2 --lora-dropout 1": "lora_dropout=1.0: must be",
        "megabyte_tiny --lora-rank 999": "train.lora_rank=999: the largest rank of global_tr",
        "megabyte_tiny --init-from adapter": "adapter: holds an adapter without its model",
        "megabyte_tiny --lora-rank 2 --lora-targets to_logits": "to_logits is the output layer",
        "megabyte_tiny --lora-rank 2 --lora-targets *norm": "norm is a norm, which takes no",
        "megabyte_tiny --lora-rank 2 --lora-targets *embed": "is an embedding, which takes no",
        "megabyte_tiny --lora-rank 2 --lora-targets none": "lora_targets=none: matches no layer",
        "lfbyte_tiny --lora-rank 2": "has no attention, the usual target; name others",
        "lfbyte_tiny --lora-rank 2 --lora-targets *base": "is part of an adaptive linear layer",
        "lfbyte_tiny --lora-rank 2 --lora-targets *experts.up": "holds experts, which takes no",
        "lfbyte_tiny --lora-rank 2 --lora-targets *gate": "is the gate of experts, which takes no",
    }.items():
        command = ["train", *options.split(), "--data", "text", "--sequence-length", "16"]
        assert cli.main([*command, "--batch-size", "8", "--steps", "2"]) == 2, options
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, (options, error)
    blt = Recipe(
        name="x", model=CONFIGS["blt"], train=TrainConfig(lora_rank=2, lora_targets=("patcher*",))
    )
    with pytest.raises(ValueError, match="is frozen anyway, which takes no adapter"):
        lora_of(blt, abstract_params(blt.model))
    assert cli.main(["export", "straight", "--out", "x", "--adapter", "--pad-id", "0"]) == 2
    assert "--adapter: an adapter has its model's ids" in capsys.readouterr().err
    command = ["train", "megabyte_tiny", *TRAIN, "--steps", "6", "--run-dir", "straight"]
    command += ["--init-from", "base"]
    assert cli.main([*command, "--lora-alpha", "4"]) == 2
    says = "alpha=4.0: straight was started with 16.0; keep that value or start from its weights: "
    assert f"{says}--init-from straight --run-dir NEW" in capsys.readouterr().err
    assert sorted(each.name for each in folder.iterdir()) == before


def test_layers_are_what_their_names_say(x64):
    """The table of names against the types of the layers, in both packages."""
    for name in CONFIGS:
        config, lora, params = adapted(name)
        twin, (bind, _) = build_model(config), define_model(config, lora)
        model = bind(params)
        for layer in lora.layers:
            assert type(twin.get_submodule(layer)) is torch.nn.Linear, layer
            found = functools.reduce(
                lambda at, part: at[int(part)] if part.isdigit() else getattr(at, part),
                layer.split("."),
                model,
            )
            assert type(found) is LoRALinear and isinstance(lora, LoRA), layer
