"""`bytelm compress` in both packages: lossless, as short as the model's code length, one place."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import bytelm_torch
from bytelm.compression import codec
from bytelm.config import MegabyteConfig, ModelConfig, Recipe
from bytelm_jax.cli import main as cli
from bytelm_jax.inference.compression import compression_place as place_of_jax
from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tests.test_cli import refused
from bytelm_jax.training import checkpoint
from bytelm_torch import compress as torch_compress
from bytelm_torch import decompress as torch_decompress
from bytelm_torch.inference.compression import compression_place as place_of_torch
from parity_tests.cases import quick
from parity_tests.tiny_models import CONFIGS

WINDOW, STREAMS = 24, 4
MODELS: dict[str, ModelConfig] = {
    **{name: config for name, config in CONFIGS.items() if config.causal},
    "resets": replace(CONFIGS["megabyte"], reset_on="newline"),
}
TEXT = "Lines of text,\nκαὶ ἄλλα ψεύδεα.\n".encode() * 7 + bytes(range(40))


def build(name: str) -> tuple[Any, Any]:
    """Both twins, with logits that are far from flat: of a standard deviation of 2."""
    bind, init = define_model(MODELS[name])
    params = dict(jax.jit(init, static_argnums=0)(0))
    twin = make_twin(MODELS[name], params)
    with torch.no_grad():
        scale = 2 / float(twin(torch.tensor([list(TEXT[:WINDOW])])).std())
        twin.to_logits.weight *= scale
    params["to_logits.kernel"] *= scale
    return bind(params), twin


@pytest.mark.parametrize("name", quick(MODELS, "megabyte", "lfbyte"))
def test_every_architecture_restores_at_the_code_length_of_eval(name, tmp_path):
    ours, theirs = build(name)
    content = TEXT[: len(TEXT) if name == "megabyte" else 4 * WINDOW - 5]
    (tmp_path / "plain").write_bytes(content)
    window = min(WINDOW, MODELS[name].longest_input or WINDOW)
    whole = bytelm_torch.evaluate(theirs, content, window).nats / math.log(2) / 8
    exact = bits_among_bytes(theirs, content, window) / 8  # the coder knows that pads never come
    assert exact <= whole * (1 + 1e-6)
    for place in place_of_jax(ours), place_of_torch(theirs):
        payload = payload_of(place, tmp_path, content, window)
        assert payload <= whole * 1.001 + 64 * STREAMS
        assert exact * 0.999 <= payload <= exact * 1.001 + 4 * STREAMS + 16


def bits_among_bytes(model: Any, content: bytes, window: int) -> float:
    """The code length of `content` where ids that are no bytes are ruled out."""
    vocab, bits = model.config.vocab, 0.0
    for begin in range(0, len(content), window):
        values = torch.tensor(list(content[begin : begin + window]))
        with torch.inference_mode():
            logits = model(values[None] + vocab.offset)[0].double()
        chances = logits[:, vocab.offset : vocab.offset + 256].log_softmax(dim=-1)
        bits -= float(chances.gather(1, values[:, None]).sum()) / math.log(2)
    return bits


def payload_of(place: codec.Place, folder: Path, content: bytes, window: int) -> int:
    """Bytes of the coder, even where it would be stored; checks that the content comes back."""
    header = folder / "x.blm"
    with open(folder / "plain", "rb") as source, open(header, "w+b") as sink:
        codec._write_coded(source, sink, place, (len(content), window, STREAMS), 1 << 40)
    codec.decompress_file(header, folder / "back", place)
    assert (folder / "back").read_bytes() == content
    return header.stat().st_size - len(codec.inspect_file(header).pack())


# ---- the commands ---------------------------------------------------------------------------

CONFIG = MegabyteConfig(
    patch_size=4, global_dim=8, local_dim=16, global_layers=1, local_layers=1, global_heads=2,
    local_heads=2, max_length=64,
)  # fmt: skip
CONTENT = b"aaaaaaab" * 80 + b"\xff\x00\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run folder, its export and a run of another model; they expect the letter a."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("run", "other")):
        params = dict(jax.jit(define_model(CONFIG)[1], static_argnums=0)(seed))
        params["to_logits.bias"] = params["to_logits.bias"].at[ord("a")].set(6.0)
        recipe = Recipe(name="made", model=CONFIG)
        recipe = replace(recipe, data=replace(recipe.data, sequence_length=60))
        checkpoint.create_run(folder / name, recipe, params)
    assert cli.main(["export", str(folder / "run"), "--out", str(folder / "export")]) == 0
    return folder


def test_the_command_restores_in_another_process(models, tmp_path, capsys):
    plain, packed = tmp_path / "plain", tmp_path / "plain.blm"
    plain.write_bytes(CONTENT)
    assert cli.main(["compress", str(plain), "--model", str(models / "run")]) == 0
    line = capsys.readouterr().out
    assert f"wrote {packed}: {len(CONTENT)} bytes, compressed {packed.stat().st_size}" in line
    header = codec.inspect_file(packed)
    assert header.is_coded and packed.stat().st_size < len(CONTENT) and header.window == 60
    assert {"backend", "jaxlib", "device", "cpu"} <= set(header.machine)
    command = ["decompress", packed, "--model", models / "run", "--out", tmp_path / "back"]
    program = [sys.executable, "-c", _SAME_SETTINGS, *map(str, command)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back").read_bytes() == CONTENT

    def line_of(*argv: Any) -> str:
        line = refused(capsys, *argv, "--out", tmp_path / "new")
        assert not (tmp_path / "new").exists()
        return line

    named = ("decompress", packed, "--model")
    assert "another model" in line_of(*named, models / "other")
    assert "not a compressed file" in line_of("decompress", plain, "--model", models / "run")
    packed.write_bytes(packed.read_bytes()[:-1])
    assert "cut short" in line_of(*named, models / "run")
    assert "exists" in refused(capsys, *named, models / "run")
    small = ("compress", plain, "--model", models / "run")
    assert "streams=0" in line_of(*small, "--streams", 0)
    assert "window=65" in line_of(*small, "--window", 65)


_SAME_SETTINGS = """
import sys, jax
jax.config.update("jax_default_matmul_precision", "highest")
from bytelm_jax.cli import main
sys.exit(main.main(sys.argv[1:]))
"""


def test_the_command_of_torch(models, tmp_path, capsys, monkeypatch):
    plain, packed, export = tmp_path / "plain", tmp_path / "x.blm", models / "export"
    plain.write_bytes(CONTENT)
    model = ["--model", str(export)]
    assert torch_compress.main([str(plain), *model, "--out", str(packed)]) == 0
    header = codec.inspect_file(packed)
    assert header.is_coded and header.window == 60  # the export says how long training windows were
    assert torch_decompress.main([str(packed), *model]) == 0
    assert (tmp_path / "x").read_bytes() == CONTENT
    capsys.readouterr()

    def line_of(file: Path) -> str:
        out = ["--out", str(tmp_path / "new")]
        assert torch_decompress.main([str(file), *model, *out]) == 2
        assert not (tmp_path / "new").exists()
        output = capsys.readouterr()
        assert output.out == "" and output.err.count("\n") == 1
        return output.err

    good = packed.read_bytes()
    packed.write_bytes(good[:-30] + bytes([good[-30] ^ 4]) + good[-29:])
    assert "damaged" in line_of(packed)
    assert "No such file" in line_of(tmp_path / "none")
    packed.write_bytes(good)
    kernels = "bytelm_torch.inference.compression.instruction_set"
    monkeypatch.setattr(kernels, lambda: "another processor")
    assert "here it is another processor" in line_of(packed)


def test_the_digest_of_a_model_is_of_its_every_bit():
    digests = set()
    for name, change in ("megabyte", 0.0), ("megabyte", 1e-6), ("resets", 0.0):
        ours, theirs = build(name)
        kernel = ours.to_logits.kernel
        kernel.set_value(kernel[...] + np.float32(change))
        with torch.no_grad():
            theirs.to_logits.weight += change
        for place in place_of_jax(ours), place_of_torch(theirs):
            digests.add(place.predictor(1, 8).model_digest)
    assert len(digests) == 6


def test_an_encoder_cannot_compress():
    config = replace(CONFIGS["lfbyte"], causal=False)
    bind, init = define_model(config)
    params = jax.jit(init, static_argnums=0)(0)
    for place, model in (place_of_jax, bind(params)), (place_of_torch, make_twin(config, params)):
        with pytest.raises(ValueError, match="causal=False"):
            place(model)
