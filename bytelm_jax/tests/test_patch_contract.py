"""From an entropy model to a Byte Latent Transformer by the real commands, and the contract."""

import contextlib
import dataclasses
import io
import json
import random
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from bytelm import arguments, data, recipes, runs
from bytelm.config import (
    BLTConfig,
    EntropyConfig,
    MegabyteConfig,
    PatchingContract,
    Recipe,
    from_dict,
    to_dict,
)
from bytelm.metrics import read_metrics
from bytelm.recipe_files import find_recipe
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import llama
from bytelm_jax.models import define_model, patching
from bytelm_jax.tests.test_cli import contents, refused
from bytelm_jax.training import checkpoint
from bytelm_jax.training import patch_calibration as patch_contract
from bytelm_jax.training import step as steps

ENTROPY = ["--dim", "8", "--layers", "1", "--heads", "2", "--hidden-dim", "8", "--window", "16"]
LOCAL = ["--local-dim", "8", "--local-window", "16", "--ngram-rows", "31", "--ngram-sizes", "3"]
ENCODER = ["--encoder-heads", "2", "--encoder-hidden-dim", "8", "--decoder-layers", "1"]
DECODER = ["--decoder-heads", "2", "--decoder-hidden-dim", "8", "--global-dim", "16"]
GLOBAL = ["--global-layers", "1", "--global-heads", "2", "--global-hidden-dim", "8"]
RUN = ["--sequence-length", "64", "--batch-size", "8", "--devices", "1", "--eval-every", "0"]
BLT = ["train", "blt_tiny", *LOCAL, *ENCODER, *DECODER, *GLOBAL, *RUN, "--eval-windows", "8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words, then a part without any structure: two files of other patches."""
    source, folder = random.Random(5), tmp_path_factory.mktemp("text")
    words = ["".join(source.choices("abcdefghé", k=source.randint(2, 7))) for _ in range(40)]
    (folder / "words.txt").write_text(" ".join(source.choices(words, k=4000)), "utf-8")
    (folder / "same.txt").write_text("a" * 4000)
    return folder / "words.txt"


@pytest.fixture(scope="module")
def entropy_run(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("runs") / "entropy"
    train = ["train", "entropy_tiny", *ENTROPY, *RUN, "--steps", "12", "--warmup-steps", "2"]
    assert cli.main([*train, "--data", str(text), "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def calibrated(entropy_run, text):
    argv = ["calibrate", str(entropy_run), "--data", str(text), "--bytes-per-patch", "4.5"]
    assert cli.main([*argv, "--windows", "0"]) == 0
    return entropy_run


@pytest.fixture(scope="module")
def blt_run(calibrated, tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("runs") / "blt"
    source = ["--entropy-from", str(calibrated), "--data", str(text), "--run-dir", str(folder)]
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert cli.main([*BLT, "--steps", "3", "--warmup-steps", "1", *source]) == 0
    note = "note: `bytelm export --format hf-blt` cannot write this "
    (line,) = (x for x in errors.getvalue().splitlines() if x.startswith(note))
    assert "(whole_characters=True: " in line
    return folder


def test_the_threshold_gives_the_mean_through_the_model_s_own_patcher(calibrated, text):
    recipe, params, _ = checkpoint.load_run(calibrated)
    contract = recipe.patching
    assert contract is not None and contract.patcher == "entropy"
    assert abs(contract.mean_length / 4.5 - 1) <= patch_contract.TOLERANCE
    config, params = patch_contract.as_blt(recipe, params)
    config = dataclasses.replace(config, threshold=contract.threshold)
    windows = data.Windows(data.open_corpus([text]), config.vocab, 64, append_eos=True)
    assert patch_contract.measure(config, params, windows, None) == contract
    assert patch_contract.measure(config, params, windows).sampled_bytes == 64 * 64


def test_room_for_all_but_a_thousandth_of_windows():
    """Patches are counted as a budget counts them: the one that starts after a window is none."""
    source = np.random.default_rng(0)
    scores = np.where(np.arange(32) < 2, np.inf, source.random((2_500, 32))).astype("float32")
    counts = patch_contract.patch_counts(scores.reshape(-1)[:-5], 0.7, 32)
    starts = np.pad(scores[:-1] > 0.7, ((0, 0), (0, 1)), constant_values=True)
    plan = patching.plan_patches(jnp.asarray(starts), jnp.ones((2_499, 32), bool), 32)
    np.testing.assert_array_equal(counts, plan.numbers[:, -1])
    for overflow in (0.0, 0.001, 0.2):
        room = patch_contract.room_for(counts, overflow)
        assert room % 8 == 0 and (counts > room).mean() <= overflow
        assert room < 8 + np.quantile(counts, 1 - overflow)


def test_blt_takes_over_what_was_calibrated(calibrated, blt_run, capsys):
    source, calibrated_params, _ = checkpoint.load_run(calibrated)
    recipe, params, _ = checkpoint.load_run(blt_run)
    assert isinstance(recipe.model, BLTConfig) and recipe.model.entropy == source.model
    assert recipe.patching and source.patching
    assert recipe.model.threshold == source.patching.threshold == recipe.patching.threshold
    assert recipe.patching.entropy_model == source.patching.entropy_model
    for name, value in calibrated_params.items():
        np.testing.assert_array_equal(params[f"patcher.{name}"], value)
    with checkpoint.open_checkpoints(blt_run) as manager:
        stored = checkpoint.read_metadata(manager, 3)["recipe"]["patching"]
    assert from_dict(PatchingContract, stored) == recipe.patching
    for record in read_metrics(blt_run / "metrics.jsonl"):
        assert record.get("patch_overflow", 0) == 0
        assert abs(record.get("patch_length", 4.5) / 4.5 - 1) < 0.2


def test_the_same_command_goes_on_without_its_source(blt_run, text):
    before = runs.load_recipe(blt_run)
    argv = [*BLT, "--warmup-steps", "1", "--data", str(text), "--run-dir", str(blt_run)]
    assert cli.main([*argv, "--steps", "3"]) == 0
    assert runs.load_recipe(blt_run) == before


@pytest.mark.slow
def test_three_lengths_compile_three_times(tmp_path, text, monkeypatch):
    """A bucket is a length of rows: the windows' own, and those of the warm-up."""
    shapes, original = [], steps.cross_entropy

    def counted(logits, ids, *rest):
        shapes.append(ids.shape)
        return original(logits, ids, *rest)

    monkeypatch.setattr(steps, "cross_entropy", counted)
    lengths = ["--patcher", "space", "--warmup-lengths", "16", "32", "--warmup-length-steps", "2"]
    argv = [*BLT, *lengths, "--data", str(text), "--run-dir", str(tmp_path / "run")]
    assert cli.main([*argv, "--steps", "7", "--log-every", "1", "--warmup-steps", "1"]) == 0
    assert shapes == [(32, 16), (16, 32), (8, 64)], "traced, and so compiled, once each"
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if "loss" in r] == [*range(1, 8)]
    assert all(1 < r["patch_length"] < 16 for r in records if "loss" in r)


def test_other_data_is_reported_by_name(blt_run, text, capsys):
    assert cli.main(["eval", str(blt_run), "--data", str(text), "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == "" and abs(json.loads(output.out)["bytes_per_patch"] / 4.5 - 1) < 0.2
    assert cli.main(["eval", str(blt_run), "--data", str(text.parent / "same.txt")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bytelm eval: warning: data: mean patch length ")
    assert "(patcher=entropy, threshold=" in line


def test_calibrating_blt_changes_every_checkpoint_at_once(blt_run, text, tmp_path, capsys):
    folder = tmp_path / "again"
    shutil.copytree(blt_run, folder)
    before = contents(folder)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"chat": [{"role": "user", "content": text.read_text()}]}) + "\n")
    argv = ["calibrate", str(folder), "--data", str(text), "--check", str(chats)]
    argv += ["--chat-field", "chat"]
    assert cli.main([*argv, "--bytes-per-patch", "2.5"]) == 0
    output = capsys.readouterr()
    assert output.err == "" and "of --check" in output.out
    after = contents(folder)
    assert {p.name for p in after if after[p] != before.get(p)} == {"config.json"}
    recipe, earlier = checkpoint.load_run(folder, "3")[0], checkpoint.load_run(blt_run)[0]
    assert isinstance(recipe.model, BLTConfig) and isinstance(earlier.model, BLTConfig)
    assert abs(recipe.model.bytes_per_patch / 2.5 - 1) <= patch_contract.TOLERANCE
    assert recipe.model.threshold < earlier.model.threshold
    assert from_dict(Recipe, json.loads((folder / "config.json").read_text())) == recipe


def test_what_an_export_says(blt_run, tmp_path):
    assert cli.main(["export", str(blt_run), "--out", str(tmp_path / "out")]) == 0
    assert cli.main(["import", str(tmp_path / "out"), "--out", str(tmp_path / "run")]) == 0
    ours, again = (runs.load_recipe(folder) for folder in (blt_run, tmp_path / "run"))
    assert again.patching == ours.patching and again.model == ours.model


def test_refusals_say_what_to_do(entropy_run, calibrated, blt_run, text, tmp_path, capsys):
    new = [*BLT, "--data", text, "--run-dir", tmp_path / "new"]
    assert "--entropy-from" in refused(capsys, *new)
    assert "leave it out" in refused(capsys, *new, "--patcher", "space", "--entropy-from", "x")
    assert "no config.json" in refused(capsys, *new, "--entropy-from", tmp_path / "nowhere")
    taken = [*new, "--entropy-from", calibrated]
    assert "model.threshold=2.0" in refused(capsys, *taken, "--threshold", "2")
    bare = tmp_path / "bare"
    shutil.copytree(calibrated, bare)
    recipe = runs.load_recipe(bare)
    runs.save_recipe(bare, dataclasses.replace(recipe, patching=None))
    assert "bytelm calibrate" in refused(capsys, *new, "--entropy-from", bare)
    assert recipe.patching is not None
    other = dataclasses.replace(recipe.patching, entropy_model="0" * 64)
    runs.save_recipe(bare, dataclasses.replace(recipe, patching=other))
    assert "calibrate it again" in refused(capsys, *new, "--entropy-from", bare)
    assert not list((tmp_path / "new").glob("checkpoints/*"))
    on = [*BLT, "--data", text, "--run-dir", blt_run, "--entropy-from", bare]
    assert "leave it out or choose another run_dir" in refused(capsys, *on)
    argv = ["calibrate", calibrated, "--data", text, "--bytes-per-patch"]
    assert "must be at least 1" in refused(capsys, *argv, "0.5")
    assert "the nearest that these data allow" in refused(capsys, *argv, "90")
    with runs.RunLock() as lock:
        assert lock.take(calibrated)
        assert "another process is training there; wait" in refused(capsys, *argv, "4.5")


def test_a_byte_model_of_a_token_model_takes_over_what_was_calibrated(calibrated, tmp_path):
    donor, local, run = (tmp_path / name for name in ("donor", "local.json", "run"))
    fields = {"model_type": "llama", "vocab_size": 5, "hidden_size": 8, "intermediate_size": 8}
    fields |= {"num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": True}
    small = {"ngram_sizes": [3], "ngram_rows": 11, "decoder_layers": 1}
    donor.mkdir()
    (donor / "config.json").write_text(json.dumps(fields))
    local.write_text(json.dumps({"base": "blt_tiny", "model": small}))
    model: Any = find_recipe(str(local)).model
    config = llama.byte_config(model, llama.read_donor(donor))
    shapes = {llama.donor_name(k, config): v for k, v in llama.stack_leaves(config).items()}
    shapes["model.embed_tokens.weight"] = (5, 8)
    weights = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, donor / "model.safetensors")
    how = ["--local", str(local), "--patcher", "entropy", "--entropy-from", str(calibrated)]
    assert cli.main(["import", str(donor), *how, "--out", str(run)]) == 0
    source, theirs, _ = checkpoint.load_run(calibrated)
    recipe, params, _ = checkpoint.load_run(run)
    assert isinstance(recipe.model, BLTConfig) and recipe.model.entropy == source.model
    assert source.patching and recipe.patching == source.patching
    assert recipe.model.threshold == source.patching.threshold
    _, theirs = patch_contract.as_blt(source, theirs)
    for name, value in patch_contract.patcher_params(theirs).items():
        np.testing.assert_array_equal(params[f"patcher.{name}"], value)


def test_a_source_must_reset_as_asked(calibrated, tmp_path):
    source = runs.load_recipe(calibrated)
    lines = dataclasses.replace(source.model, reset_on="newline")
    folder = tmp_path / "lines"
    folder.mkdir()
    runs.save_recipe(folder, dataclasses.replace(source, model=lines))

    def adopt(taken, *argv) -> Any:
        options = ["--entropy-from", str(taken), *argv]
        recipe = arguments.parse_recipe(recipes.blt_tiny(), options, "train", "")
        return patch_contract.adopt(recipe, tmp_path / "new").model

    model = adopt(folder, "--reset-on", "newline")
    assert model.reset_on == "newline" and model.entropy == lines
    assert adopt(calibrated).entropy == source.model
    with pytest.raises(
        ValueError, match=r"entropy.reset_on='newline': .* give --reset-on newline,"
    ):
        adopt(folder)
    with pytest.raises(ValueError, match="an entropy model that was trained with --reset-on new"):
        adopt(calibrated, "--reset-on", "newline")
    others = {"patcher='space'": BLTConfig(patcher="space"), "=megabyte": MegabyteConfig()}
    others |= {"patcher='histogram'": BLTConfig(patcher="histogram")}
    for why, model in others.items():
        runs.save_recipe(folder, dataclasses.replace(source, model=model))
        with pytest.raises(ValueError, match=rf"holds no entropy model \(.*{why}.*name a calib"):
            adopt(folder)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (BLTConfig(patcher="space"), "patcher='space': has no threshold"),
        (BLTConfig(patcher="fixed"), "patcher='fixed': has no threshold"),
        (BLTConfig(patcher="byte"), "patcher='byte': has no threshold"),
        (MegabyteConfig(), "architecture=megabyte: cuts no patches by entropy"),
    ],
)
def test_patchers_without_a_threshold(model, says):
    with pytest.raises(ValueError, match=says):
        patch_contract.as_blt(Recipe(name="x", model=model), {})


def test_thresholds_as_literals():
    never, always = -np.inf, np.inf
    scores = np.array([always, always, 1, never, 5, 3, never, 2], np.float32)
    counts = {}
    for mean in (8.0, 4.0, 8 / 3, 2.0, 8 / 5, 8 / 6, 1.0):
        threshold = patch_contract._threshold(scores, mean)
        counts[mean] = int((scores > threshold).sum())
    assert list(counts.values()) == [2, 2, 3, 4, 5, 6, 6]
    near = np.array([always, 1, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    assert (near > patch_contract._threshold(near, 1.5)).sum() == 2


def test_scores_and_histogram_follow_the_patcher_s_rules():
    """Whole characters, two starts in any case, no patch in the padding; lengths by hand."""
    config = BLTConfig(patcher="word", ngram_sizes=())
    vocab = config.vocab

    class Rows(data.Windows):
        def __init__(self):
            self.length, self.vocab, self.is_masked = 8, vocab, False

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return np.array([*(b + vocab.offset for b in b"a\xc3\xa9 bc"), 3, 3], np.int32)

    contract = patch_contract.measure(config, {}, Rows())
    # s without its padding: BOS | a, é of two bytes, space | b, c
    assert contract.histogram[:4] == (1, 1, 0, 1) and sum(contract.histogram) == 3
    assert contract.sampled_bytes == 7 and contract.entropy_model == ""

    class Lines(Rows):
        def __getitem__(self, index):
            return np.array([*(b + vocab.offset for b in b"a b\nc\n"), 3, 3], np.int32)

    contract = patch_contract.measure(dataclasses.replace(config, reset_on="newline"), {}, Lines())
    # BOS | a, space | b || BOS | c || BOS
    assert contract.histogram[:3] == (5, 1, 0) and contract.sampled_bytes == 7


def test_outside_only_past_a_factor_of_two():
    def contract(count):
        return PatchingContract(
            patcher="space", threshold=0.0, entropy_model="", sampled_bytes=12, histogram=(count,)
        )

    assert patch_contract.outside(contract(4), contract(2)) is None
    assert patch_contract.outside(contract(2), contract(4)) is None
    assert "6.00 bytes where 2.00 are expected (patcher=space)" in str(
        patch_contract.outside(contract(6), contract(2))
    )
    assert patch_contract.outside(contract(2), contract(6)) is not None


def test_the_hash_tells_models_apart():
    config = EntropyConfig(dim=8, layers=1, heads=2, hidden_dim=8)
    params = jax.jit(define_model(config)[1], static_argnums=0)(0)
    known = patch_contract.entropy_model_hash(params)
    assert known == patch_contract.entropy_model_hash(dict(reversed(params.items())))
    name = "norm.scale"
    changed = params | {name: params[name].at[3].add(1e-6)}
    assert patch_contract.entropy_model_hash(changed) != known
    assert patch_contract.entropy_model_hash(params | {name: params[name].astype(jnp.bfloat16)})


def test_recipes_of_the_specification():
    counts = {name: recipes.get(name).model.parameter_count() for name in recipes.names()}
    assert counts["blt_767m"] == 766_579_968 and counts["blt_1b"] == 4_633_127_680
    assert counts["entropy_100m"] == 99_512_064
    tiny = recipes.blt_tiny().model
    assert isinstance(tiny, BLTConfig) and tiny.entropy == recipes.entropy_tiny().model
    recipe = dataclasses.replace(recipes.blt_tiny(), patching=None)
    assert from_dict(Recipe, to_dict(recipe)) == recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reset_on", "mean"),
    [("none", 5.0), pytest.param("newline", 4.0, marks=pytest.mark.slow)],
)
def test_thresholds_of_histograms_need_no_model(text, tmp_path, reset_on, mean):
    recipe = recipes.bytropix_tiny()
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, reset_on=reset_on))
    lines = tmp_path / "lines.txt"
    lines.write_text(text.read_text("utf-8").replace(" ab", "\nab").replace(" b", "\n"), "utf-8")
    windows = data.Windows(data.open_corpus((lines,)), recipe.model.vocab, 64, append_eos=False)
    calibrated = patch_contract.calibrate(recipe, {}, windows, mean, None)
    assert isinstance(recipe.model, BLTConfig) and isinstance(calibrated.model, BLTConfig)
    assert calibrated.patching
    assert abs(calibrated.patching.mean_length / mean - 1) <= patch_contract.TOLERANCE
    assert calibrated.patching.threshold == calibrated.model.threshold != recipe.model.threshold
    assert calibrated.patching.entropy_model == ""
    assert patch_contract.measure(calibrated.model, {}, windows, None) == calibrated.patching
