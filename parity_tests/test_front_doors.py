"""`import bytelm_jax` and `import bytelm_torch` offer the same verbs, and they give the same."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bytelm
import bytelm_jax
import bytelm_jax.models.interface
import bytelm_torch
import bytelm_torch.models.interface
from bytelm import runs
from bytelm.config import DataConfig, EntropyConfig, MegabyteConfig, PatchingContract, Recipe
from bytelm.data import open_corpus
from bytelm.metrics import METRIC
from bytelm.tolerances import LOGITS
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.training import checkpoint as jax_checkpoint
from bytelm_torch.training import checkpoint
from bytelm_torch.training.average import Average
from parity_tests.cases import quick
from parity_tests.twins import MEGABYTES

TEXT = "def é(self):\n  return 🎉\n".encode()
ENTROPY = EntropyConfig(dim=8, layers=1, heads=2, hidden_dim=16, reset_on="newline")
CONTRACT = PatchingContract(
    patcher="entropy", threshold=5.1, entropy_model="", sampled_bytes=4, histogram=(4,)
)
TINY = MegabyteConfig(
    patch_size=4,
    global_dim=8,
    local_dim=8,
    max_length=16,
    global_layers=1,
    global_heads=2,
    local_layers=1,
    local_heads=2,
    init_std=0.3,
)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_both_packages_offer_the_same_names():
    ours, theirs = set(bytelm_jax.__all__), set(bytelm_torch.__all__)
    shared = set(bytelm.__all__)
    assert shared <= ours & theirs
    assert ours - theirs == {"split_model"}  # a torch module is its own parameters
    assert theirs - ours == {"EnhancedSGD"}  # what the original calls `q_learning_sgd`
    for name in shared:
        assert getattr(bytelm_jax, name) is getattr(bytelm_torch, name) is getattr(bytelm, name)
    for name in ("evaluate", "inspect", "generate", "cross_entropy", "save_pretrained"):
        ours, theirs = (getattr(package, name) for package in (bytelm_jax, bytelm_torch))
        ours, theirs = (list(inspect.signature(function).parameters) for function in (ours, theirs))
        assert ours == theirs


def test_every_model_answers_about_its_patches():
    for models in (bytelm_jax.models, bytelm_torch.models):
        assert all(issubclass(kind, models.interface.ByteModel) for kind in get_args(models.Model))


ORDERS = """
import inspect, sys
import jax, optax, flax.nnx, torch  # once for all orders, for they take seconds

def afresh():
    for name in [name for name in sys.modules if name.startswith("bytelm")]:
        del sys.modules[name]

def is_both(thing, name, also):
    assert callable(thing) and name in str(inspect.signature(thing)), thing
    assert hasattr(thing, also), thing

for package, module, parameter, other in (
    ("bytelm_torch", "generate", "prompts", "stream"),
    ("bytelm_torch", "q_learning", "controller", "EnhancedSGD"),
    ("bytelm_jax", "q_learning", "controller", "q_learning_sgd"),
):
    front, inside = f"from {package} import {module}", f"from {package}.{module} import {other}"
    dotted, named = f"import {package}.{module}", f"import {package}.{module} as {module}"
    whole = f"import {package}; {module} = {package}.{module}"
    for lines in ([front, inside], [inside, front], [whole, dotted], [dotted, whole], [named]):
        afresh()
        names = {}
        exec(";".join(lines), names)
        is_both(names[module], parameter, other)
        is_both(getattr(sys.modules[package], module), parameter, other)
print("ok")
"""


def test_functions_and_modules_of_one_name_are_both_there_in_any_order():
    command = [sys.executable, "-c", ORDERS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "ok\n", done.stderr


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Two exports in float64, one of each package; the second knows its patches and windows."""
    folder = tmp_path_factory.mktemp("exports")
    config = replace(MEGABYTES["in_action"], reset_on="document")
    shapes, source = abstract_params(config).items(), np.random.default_rng(0)
    with jax.enable_x64(True):
        params = {name: jnp.asarray(source.normal(0, 0.3, leaf.shape)) for name, leaf in shapes}
        model = define_model(config)[0](params)
        bytelm_jax.save_pretrained(model, str(folder / "megabyte"), {"note": 1})
    torch.manual_seed(0)
    entropy = bytelm_torch.build_model(ENTROPY).double()
    entropy.patching, entropy.training_length = CONTRACT, 24
    bytelm_torch.save_pretrained(entropy, folder / "entropy")
    return folder


@pytest.mark.parametrize("name", quick(["megabyte", "entropy"], "entropy"))
def test_both_packages_say_the_same_of_an_export(name, exports, tmp_path, x64):
    ours = bytelm_jax.from_pretrained(str(exports / name))
    theirs = bytelm_torch.from_pretrained(exports / name)
    assert ours.patching == theirs.patching == (CONTRACT if name == "entropy" else None)
    assert ours.training_length == theirs.training_length == (24 if name == "entropy" else 0)

    # One document, several, and files; rows that the windows leave unfilled.
    (tmp_path / "file").write_bytes(TEXT)
    for data in (TEXT, [TEXT, b"", b"second"], open_corpus([tmp_path])):
        options = {"length": 16, "batch_size": 3}
        mine = bytelm_jax.evaluate(ours, data, **options)
        other = bytelm_torch.evaluate(theirs, data, **options)
        size = len(data) if isinstance(data, bytes) else len(TEXT) + 6 * isinstance(data, list)
        assert mine.count == other.count == size
        np.testing.assert_allclose(mine.bits_per_byte, other.bits_per_byte, LOGITS["float64"])

    mine, other = bytelm_jax.inspect(ours, TEXT), bytelm_torch.inspect(theirs, TEXT)
    for field in ("surprise", "entropy"):
        np.testing.assert_allclose(getattr(mine, field), getattr(other, field), LOGITS["float64"])
    np.testing.assert_array_equal(mine.starts, other.starts)
    assert 2 < mine.patches < len(TEXT) and mine.describe() == other.describe()
    # What is inspected is what an evaluation of one window adds up.
    whole = bytelm_torch.evaluate(theirs, TEXT, length=64)
    np.testing.assert_allclose(other.surprise.mean(), whole.bits_per_byte, LOGITS["float64"])
    bytelm_jax.save_pretrained(ours, tmp_path / "again")
    again = bytelm_torch.from_pretrained(tmp_path / "again")
    known = theirs.patching, theirs.training_length
    assert (again.patching, again.training_length) == known
    # Windows are as long as those of the training, where the export says it.
    short, usual = (bytelm_torch.evaluate(theirs, TEXT * 2, length) for length in (24, None))
    assert (usual == short) is (name == "entropy")

    greedy = bytelm_jax.SamplerConfig(sampler="greedy")
    prompts = [b"def ", b""]
    mine = bytelm_jax.generate(ours, prompts, 6, greedy)
    assert mine == bytelm_torch.generate(theirs, prompts, 6, greedy)

    logits, ids = ours(jnp.asarray([[65, 66, 257]])), torch.tensor([[65, 66, 257]])
    mine, count = bytelm_jax.cross_entropy(logits, ids.numpy(), pad_id=257)
    other, number = bytelm_torch.cross_entropy(theirs(ids), ids, pad_id=257)
    assert int(count) == int(number) == 2
    np.testing.assert_allclose(float(mine), float(other.detach()), LOGITS["float64"])


def test_the_dtype_asked_for_leaves_norms_wide(exports):
    ours = bytelm_jax.from_pretrained(exports / "entropy", "bfloat16")
    theirs = bytelm_torch.from_pretrained(exports / "entropy", torch.bfloat16)
    dtypes = {name: value.dtype.name for name, value in bytelm_jax.split_model(ours)[1].items()}
    assert dtypes == {
        parameter.bytelm_path: str(parameter.dtype).removeprefix("torch.")
        for parameter in theirs.parameters()
    }
    assert set(dtypes.values()) == {"bfloat16", "float32"}
    for dtype, says in (("float64", "64-bit mode is off"), ("int8", "choose float32")):
        with pytest.raises(ValueError, match=f"dtype={dtype}: .*{says}"):
            bytelm_jax.from_pretrained(exports / "entropy", dtype)


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory):
    """A run folder of PyTorch, of two checkpoints, the first of which is the better one."""
    folder = tmp_path_factory.mktemp("runs") / "torch"
    recipe = Recipe(name="tiny", model=TINY, data=DataConfig(sequence_length=12))
    (folder / "checkpoints").mkdir(parents=True)
    runs.save_recipe(folder, recipe)
    lines = []
    for step, bits in ((3, 2.0), (12, 2.5)):
        torch.manual_seed(step)
        model = bytelm_torch.build_model(TINY)
        optimizer, none = bytelm_torch.build_optimizer(recipe.optimizer, model), Average(model, 0.0)
        checkpoint.save(folder, step, model, optimizer, recipe, "", {METRIC: bits}, none)
        lines.append(json.dumps({"step": step, METRIC: bits}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_a_run_of_torch_opens_in_both(torch_run):
    for which, step in (("latest", 12), ("best", 3), ("3", 3), (12, 12)):
        theirs = bytelm_torch.from_pretrained(torch_run, checkpoint=which)
        ours = bytelm_jax.from_pretrained(str(torch_run), checkpoint=which)
        assert ours.training_length == theirs.training_length == 12
        _, params = bytelm_jax.split_model(ours)
        exported = bytelm_torch.from_pretrained(torch_run / "checkpoints" / str(step))
        for name, parameter in exported.named_parameters():
            assert torch.equal(parameter, theirs.get_parameter(name))
        np.testing.assert_array_equal(params["to_logits.bias"], exported.to_logits.bias.detach())
    for package in (bytelm_jax, bytelm_torch):
        with pytest.raises(ValueError, match=r"checkpoint=4: choose latest, best or one of"):
            package.from_pretrained(torch_run, checkpoint=4)
        export = torch_run / "checkpoints" / "3"
        with pytest.raises(ValueError, match=r"checkpoint=best: .* is not a run folder"):
            package.from_pretrained(export, checkpoint="best")


def test_a_run_of_jax_opens_in_jax_and_is_refused_by_torch(tmp_path):
    model = bytelm_jax.build_model(ENTROPY)
    _, params = bytelm_jax.split_model(model)
    run = tmp_path / "run"
    recipe = Recipe(name="tiny", model=ENTROPY, patching=CONTRACT)
    jax_checkpoint.create_run(run, recipe, params)
    opened = bytelm_jax.from_pretrained(str(run))
    assert opened.patching == CONTRACT and opened.training_length == 512
    for name, value in bytelm_jax.split_model(opened)[1].items():
        np.testing.assert_array_equal(value, params[name])
    with pytest.raises(ValueError) as refused:
        bytelm_torch.from_pretrained(run)
    assert f"`bytelm export {run} --out DIR`" in str(refused.value)
    for package in (bytelm_jax, bytelm_torch):
        (tmp_path / "empty" / "checkpoints").mkdir(parents=True, exist_ok=True)
        with pytest.raises(ValueError, match="no checkpoint there; train first"):
            package.from_pretrained(tmp_path / "empty")


@pytest.mark.parametrize("package", [bytelm_jax, bytelm_torch])
def test_what_cannot_be_opened_evaluated_or_inspected(package, torch_run, tmp_path):
    model, odd = package.from_pretrained(torch_run), tmp_path / "odd"
    bytelm_torch.save_pretrained(bytelm_torch.build_model(TINY), odd, {"training_length": True})
    for call, says in (
        (lambda: package.evaluate(model, [b""]), "corpus: holds no bytes"),
        (lambda: package.evaluate(model, TEXT, 17), "length=17: this model sees at most 16 bytes"),
        (lambda: package.inspect(model, b""), "text: is empty"),
        (lambda: package.inspect(model, b"x" * 17), "text: 17 bytes; this model sees 16 at most"),
        (lambda: package.from_pretrained(odd), "extra.training_length=True: must be a number of"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
