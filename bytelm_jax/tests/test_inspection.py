"""`bytelm inspect`: its numbers against the model's own, its patches against the patchers'."""

import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import bytelm_jax
from bytelm.config import (
    BLTConfig,
    ByteVocab,
    EntropyConfig,
    LFByteConfig,
    MegabyteConfig,
    Recipe,
)
from bytelm.data import Windows, open_corpus
from bytelm_jax.cli import main as cli
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.tools import inspection
from bytelm_jax.training import checkpoint
from bytelm_jax.training import patch_calibration as patch_contract
from bytelm_jax.training.pretrained import model_of

TEXT = "def é(self):\n  🎉".encode()
SIZES: dict[str, Any] = {"global_dim": 8, "local_dim": 16, "global_heads": 2, "local_heads": 2}
MEGABYTE = MegabyteConfig(
    patch_size=4, global_layers=1, local_layers=1, max_length=64, vocab=ByteVocab(), **SIZES
)
ENTROPY = EntropyConfig(dim=8, layers=1, heads=2, hidden_dim=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection") / "run"
    checkpoint.create_run(folder, Recipe(name="tiny", model=MEGABYTE), random_params(MEGABYTE))
    return folder


def random_params(config):
    source = np.random.default_rng(1)
    shapes = abstract_params(config).items()
    return {k: jnp.asarray(source.normal(0, 0.3, v.shape), v.dtype) for k, v in shapes}


def shown(capsys, *argv):
    assert cli.main(["inspect", *map(str, argv)]) == 0
    return capsys.readouterr()


def test_surprise_and_entropy_are_those_of_the_model(run, capsys):
    inspected = json.loads(shown(capsys, TEXT.decode(), "--model", run, "--json").out)
    ids = np.zeros((1, 64), np.int32) + MEGABYTE.vocab.pad_id
    ids[0, : len(TEXT)] = np.frombuffer(TEXT, np.uint8) + MEGABYTE.vocab.offset
    bind, _ = define_model(MEGABYTE)
    logits = jax.jit(lambda params, ids: bind(params)(ids))(random_params(MEGABYTE), ids)
    logits = np.asarray(logits[0, : len(TEXT)], np.float64)
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    bits = -np.log2(chances[np.arange(len(TEXT)), ids[0, : len(TEXT)]])
    np.testing.assert_allclose(inspected["surprise"], bits, rtol=1e-5)
    expected = -(chances * np.log2(chances)).sum(axis=1)
    np.testing.assert_allclose(inspected["entropy"], expected, rtol=1e-5)
    assert inspected["bytes"] == list(TEXT)
    assert inspected["starts"] == [t % 4 == 0 for t in range(len(TEXT))]


def test_patches_of_lines_start_over(run, capsys):
    argv = ["ab\ncdefgh", "--model", run, "--json", "--reset-on", "newline"]
    assert np.flatnonzero(json.loads(shown(capsys, *argv).out)["starts"]).tolist() == [0, 3, 7]


def test_patches_of_an_entropy_model_are_those_that_it_was_calibrated_for(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"the cat and the hat, and the bat sat on that mat")
    windows = Windows(open_corpus((path,)), ENTROPY.vocab, 64, append_eos=False)
    params = random_params(ENTROPY)
    recipe = Recipe(name="tiny", model=ENTROPY)
    assert "not calibrated yet" in inspection.inspect(model_of(recipe, params), b"the").describe()
    calibrated = patch_contract.calibrate(recipe, params, windows, 4.08, None)
    blt, named = patch_contract.as_blt(calibrated, params)
    scores = patch_contract.boundary_scores(blt, named, windows, None)
    inspected = inspection.inspect(model_of(calibrated, params), path.read_bytes())
    # The contract cuts s = [BOS, bytes]; the patch of BOS is no byte's.
    assert calibrated.patching
    wanted = scores[1:] > calibrated.patching.threshold
    assert inspected.starts is not None and 8 <= inspected.patches <= 16
    np.testing.assert_array_equal(inspected.starts[: len(wanted)], wanted)
    text = inspected.describe()
    assert f"{inspected.patches} patches of" in text and "patcher entropy, threshold" in text


def test_patches_of_a_byte_latent_transformer_are_its_own():
    model = BLTConfig(
        patcher="space",
        entropy=ENTROPY,
        ngram_sizes=(3,),
        ngram_rows=16,
        local_dim=8,
        global_dim=16,
        encoder_heads=2,
        decoder_heads=2,
        global_heads=2,
        decoder_layers=1,
        global_layers=1,
        encoder_hidden_dim=8,
        decoder_hidden_dim=8,
        global_hidden_dim=8,
    )
    recipe = Recipe(name="tiny", model=model)
    inspected = inspection.inspect(model_of(recipe, random_params(model)), b"ab cde f  g")
    assert inspected.starts is not None
    assert np.flatnonzero(inspected.starts).tolist() == [0, 3, 7, 9]
    assert np.isfinite(inspected.surprise).all() and (inspected.entropy > 0).all()


def test_colours_are_off_where_nobody_sees_them(run, capsys):
    output = shown(capsys, TEXT.decode(), "--model", run).out
    assert "\x1b" not in output
    lines = output.splitlines()
    bits = float(lines[0].split(":")[1].split()[0])
    assert "5 patches of 4.00 bytes (of fixed length)" in lines[0] and 0 < bits < 99
    assert lines[1:3] == ["def │é(s│elf)│:⏎", "  │🎉"]
    assert [line.split()[0] for line in lines[4:]] == ["0", "4", "8", "12", "16"]
    assert lines[4].split()[1:4:2] == ["│", lines[4].split()[3]] and "def " in lines[4]
    console = Console(force_terminal=True, color_system="truecolor", width=200)
    recipe, params, _ = checkpoint.load_run(run)
    inspected = inspection.inspect(model_of(recipe, params), TEXT)
    with console.capture() as capture:
        console.print(inspection.paint_text(inspected))
    red, green, blue = inspection.shade(float(inspected.surprise[0]))
    assert f"48;2;{red};{green};{blue}m" in capture.get()


def test_control_codes_and_broken_bytes_do_not_reach_the_terminal(run, capsys, tmp_path):
    file = tmp_path / "bytes"
    file.write_bytes(b"a\xff\x00\x1b[31m\xc3")
    output = shown(capsys, file, "--model", run).out
    assert "\x1b" not in output and "\\xff\\x00\\x1b" in output and "\\xc3" in output
    assert "9 bytes" in output


def test_a_long_file_is_cut_and_says_so(run, capsys, tmp_path):
    file = tmp_path / "long.txt"
    file.write_bytes(b"x" * 2000)
    captured = shown(capsys, file, "--model", run, "--max-bytes", "10", "--no-table")
    assert captured.out.startswith("10 bytes")
    assert captured.err == f"bytelm inspect: {file}: the first 10 of 2,000 bytes (--max-bytes)\n"
    captured = shown(capsys, file, "--model", run)
    assert captured.out.startswith("64 bytes") and "(the model's max_length)" in captured.err


def test_refusals(run, capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.touch()
    for argv, says in (
        (["", "--model", run], "TEXT: is empty"),
        ([empty, "--model", run], "empty: is empty"),
        (["a", "--model", tmp_path], "no config.json there"),
        (["a", "--model", run, "--max-bytes", "0"], "--max-bytes 0: must be at least 1"),
    ):
        assert cli.main(["inspect", *map(str, argv)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    sees = bytelm_jax.build_model(LFByteConfig(embed_dim=8, num_layers=1, causal=False))
    with pytest.raises(ValueError, match=r"model.causal=False"):
        inspection.inspect(sees, TEXT)
    recipe, params, _ = checkpoint.load_run(run)
    with pytest.raises(ValueError, match="text: 65 bytes; this model sees 64 at most"):
        inspection.inspect(model_of(recipe, params), b"x" * 65)


def test_the_scale_of_colours():
    assert inspection.shade(0.0) == (120, 240, 138)
    assert inspection.shade(8.0) == inspection.shade(math.inf) == (240, 120, 138)
    pieces = list(inspection.characters(b"a\xc3\xa9\xff\xe2\x82"))
    assert pieces == [
        (0, b"a", "a"),
        (1, b"\xc3\xa9", "é"),
        (3, b"\xff", None),
        (4, b"\xe2", None),
        (5, b"\x82", None),
    ]


def test_the_rule_of_patches_is_told():
    """An entropy model has none before it is calibrated."""
    assert ENTROPY.patch_rule() == "no patches: not calibrated yet"
    assert ENTROPY.patch_rule(2.0) == "patcher entropy, threshold 2 nats"
    histogram = BLTConfig(patcher="histogram", threshold=9.25)
    assert histogram.patch_rule(2.0) == "patcher histogram, threshold 9.25 bits per patch"
    assert BLTConfig(patcher="space").patch_rule() == "patcher space"
    assert LFByteConfig().patch_rule() == "no patches in this architecture"
