"""Token models of the Llama family as BLT's global transformer, against transformers' layers."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import bytelm_jax
import bytelm_torch
from bytelm import SamplerConfig
from bytelm.config import DONORS, BLTConfig
from bytelm.metrics import read_metrics
from bytelm.positions import rope_frequencies
from bytelm.runs import load_recipe
from bytelm.tolerances import LOGITS
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import hf_blt, llama
from bytelm_jax.models import abstract_params
from bytelm_jax.tests.test_docs import blocks, run_line
from bytelm_jax.training import checkpoint
from parity_tests.donors import (
    FAMILIES,
    LOCAL,
    SIZES,
    compare_layers,
    make_donor,
    make_exact,
    pass_through,
    read_layers,
    save_donor,
    save_tokenizer,
    write_local,
)

pytest.importorskip(
    "transformers", minversion="5.23", reason="the reference, transformers 5.23, is not installed"
)
traced = functools.cache(abstract_params)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Shapes are the same every time, and tracing a model takes seconds."""
    monkeypatch.setattr(llama, "abstract_params", traced)


CASES = [(family, "float64") for family in FAMILIES] + [("llama", "float32")]
MORE = [(family, "float32") for family in FAMILIES if family != "llama"]


@pytest.mark.parametrize(
    ("family", "dtype"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_the_layers_are_those_of_transformers(family, dtype, tmp_path):
    """In float64 with exact norms and rotations; in float32 as transformers has them."""
    with jax.enable_x64(dtype == "float64"):
        model = make_donor(family, dtype=getattr(torch, dtype))
        save_donor(model, tmp_path)
        reference = make_exact(model) if dtype == "float64" else model
        for what, error in compare_layers(reference, *read_layers(tmp_path), dtype):
            assert error <= LOGITS[dtype], what


@pytest.mark.slow
def test_a_donor_goes_through_import_a_step_and_export(tmp_path, capsys):
    """Its layers arrive as they were saved, in shards of bfloat16; all of them train."""
    donor = make_donor("llama", dtype=torch.bfloat16)
    save_donor(donor, tmp_path / "donor", max_shard_size="4KB")
    assert len(list((tmp_path / "donor").glob("*.safetensors"))) > 2
    wrote = pass_through(tmp_path / "donor", tmp_path)
    assert "of them from llama" in capsys.readouterr().out
    recipe, params, _ = checkpoint.load_run(wrote["imported"])
    after = checkpoint.load_run(wrote["trained"])[1]
    config = recipe.model
    assert isinstance(config, BLTConfig) and config.global_block.head_dim == 8
    held = {name: tensor.float().numpy() for name, tensor in donor.state_dict().items()}
    moved = set()
    for name, value in params.items():
        if name.startswith(llama.STACK):
            expected = llama.in_our_layout(name, held[llama.donor_name(name, config)], config)
            np.testing.assert_array_equal(value, expected)
        moved |= {name} if (after[name] != value).any() else set()
    assert moved == set(params)
    exported = bytelm_torch.from_pretrained(wrote["exported"])
    assert exported.config.global_block == config.global_block


YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROTATIONS: list[dict[str, Any]] = [
    {"rope_theta": 7.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 7.0},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 7.0}},
    {"rope_scaling": {}, "rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0},
    {
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32},
        "original_max_position_embeddings": 16,
    },
]


@pytest.mark.parametrize("fields", ROTATIONS)
def test_rotations_are_found_where_transformers_finds_them(fields, tmp_path):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    (tmp_path / "config.json").write_text(json.dumps(SIZES | fields | {"model_type": "llama"}))
    block = llama.read_donor(tmp_path).sizes["global_block"]
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SIZES | fields)).inv_freq.numpy()
    np.testing.assert_allclose(rope_frequencies(4, block.rope_theta, block), theirs, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_are_where_transformers_has_them(family, tmp_path):
    """Not all families read `attention_bias`; "swish" is another name of "silu"."""
    fields = {"attention_bias": True, "hidden_act": "swish"}
    model = make_donor(family, **fields)
    save_donor(model, tmp_path)
    names = {name.split(".", 3)[-1] for name in model.state_dict() if name.endswith(".bias")}
    (qkv, out) = ({f"self_attn.{each}_proj.bias" for each in kind} for kind in ("qkv", "o"))
    expected = {"none": set(), "qkv": qkv, "all": qkv | out}
    assert names == expected[llama.read_donor(tmp_path).sizes["global_block"].bias]


def test_fields_of_any_type_are_read_or_refused(tmp_path):
    """The families of `bytelm.config.DONORS` are those that the import knows."""
    assert tuple(llama.FAMILIES) == DONORS
    nested = {"rope_theta": 7.0, "rope_type": "default", "partial_rotary_factor": 1.0}
    known = dict(llama.FAMILIES["llama"].defaults) | {"rope_scaling": {}, "rope_theta": 7.0}
    known |= SIZES | {"model_type": "llama", "original_max_position_embeddings": 64}
    changes = [{name: value} for name in known for value in WRONG]
    changes += [{"rope_parameters": LLAMA3 | nested | {n: v}} for n in nested for v in WRONG]
    changes += [{"rope_parameters": LLAMA3 | {name: value}} for name in LLAMA3 for value in WRONG]
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps(known | change))
        with contextlib.suppress(ValueError):
            llama.read_donor(tmp_path)


WRONG = (None, True, 0, float("nan"), 10**400, "x", ["llama"], {"x": {}})


def test_a_donor_that_automodel_saved_is_the_same(tmp_path):
    """Its names lack the beginning `model.`, and its output layer is not there."""
    model = make_donor("llama", dtype=torch.float32)
    whole = read_layers(save_donor(model, tmp_path / "whole"))[1]
    bare = read_layers(save_donor(model.model, tmp_path / "bare"))[1]
    assert whole.keys() == bare.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, bare[name])


REFUSED = {
    "model_type": ("gemma", "only llama, qwen2, qwen3, olmo2 can be imported"),
    "hidden_act": ("gelu", "only 'silu' can be imported"),
    "mlp_bias": (True, "mlp_bias=True: only False can be imported"),
    "rope_parameters": (YARN, "rope_parameters.rope_type='yarn': only 'default'"),
    "rope_scaling": (YARN, "rope_scaling.rope_type='yarn': only 'default'"),
    "layer_types": (["sliding_attention"], "layer_types: holds 'sliding_attention'"),
    "quantization_config": ({"bits": 4}, "quantization_config="),
    "num_key_value_heads": (3, "num_key_value_heads=3: must divide 4 heads"),
    "num_hidden_layers": (10**6, "num_hidden_layers=1000000: the files hold"),
    "hidden_size": (10**12, "config.json: hidden_size=1000000000000: "),
    "rms_norm_eps": (0.0, "config.json: rms_norm_eps=0.0: must be above 0"),
    "vocab_size": (41, "donor: lm_head.weight: shape (40, 16); expected (41, 16)"),
    "attention_bias": (False, "donor: model.layers.0.self_attn.k_proj.bias: unexpected"),
}


def test_what_cannot_be_expressed_is_refused_by_name_before_anything_is_written(tmp_path, capsys):
    donor, out = save_donor(make_donor("llama"), tmp_path / "donor"), tmp_path / "out"
    local, config = write_local(tmp_path), json.loads((donor / "config.json").read_text())
    command = ["import", str(donor), "--out", str(out), "--local", str(local)]
    capsys.readouterr()

    def refused(*command):
        assert cli.main([*command]) == 2
        assert not out.exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    for field, (value, why) in REFUSED.items():
        (donor / "config.json").write_text(json.dumps(config | {field: value}))
        assert why in refused(*command, "--format", "llama"), field
    (donor / "config.json").write_text(json.dumps(config))
    shard = donor / "model-00001-of-00001.safetensors"
    (donor / "model.safetensors").rename(shard)
    assert "model.safetensors.index.json: missing; it belongs to the 1 shards" in refused(*command)
    shard.rename(donor / "model.safetensors")
    assert "--local: name a recipe of BLT" in refused(*command[:-2])
    assert "is megabyte; name a recipe of blt" in refused(*command[:-1], "megabyte_tiny")
    assert "needs a trained entropy model" in refused(*command, "--patcher", "entropy")
    assert "feedforward='spline'" in refused(*command[:-1], "bytropix_tiny", "--patcher", "space")
    assert "--local: needs --format llama" in refused(*command, "--format", "bytelm")
    start = ["train", str(local), "--init-from", str(donor), "--run-dir", str(out)]
    assert "bytelm import --format llama" in refused(*start)
    hint = f"`bytelm import {donor} --format llama --local RECIPE --out RUN` makes a byte model"
    assert hint in refused("generate", str(donor))
    for kind in ("gpt2", ["llama"]):
        (donor / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        why = f"model_type={kind!r}: only llama, qwen2, qwen3, olmo2"
        assert why in refused("generate", str(donor))
        for options in (command, command[:-2], [*command[:-2], "--format", "llama", *command[-2:]]):
            assert why in refused(*options)
    (donor / "config.json").write_text(json.dumps(config))
    model = llama.byte_config(LOCAL, llama.read_donor(donor))
    with pytest.raises(ValueError, match="head_dim=8: transformers' BLT has no such"):
        hf_blt.export_hf_blt(model, {}, out)


@pytest.mark.slow
def test_every_command_of_the_guide(tmp_path, monkeypatch, capsys):
    """One after the other, as a reader does, with tiny models and few steps."""
    monkeypatch.chdir(tmp_path)
    text = "Some words of a text, and some more of them. " * 90
    save_donor(make_donor("llama", dtype=torch.float32, vocab_size=300), tmp_path / "donor")
    save_tokenizer(tmp_path / "donor", text)
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text(text)
    for line in blocks("donors.md", "bash").splitlines():
        few = line.replace(" 200", " 4").replace(" 100", " 2")
        assert run_line(few) == 0, (line, capsys.readouterr().err)
    records = read_metrics(Path("runs/aligned/metrics.jsonl"))
    assert any("validation_alignment_loss" in record for record in records)
    ours, theirs = (load_recipe(Path("runs") / name) for name in ("aligned", "aligned-torch"))
    assert (ours.optimizer, ours.train.batch_size) == (theirs.optimizer, theirs.train.batch_size)
    assert ours.data.sequence_length == theirs.data.sequence_length
    before, after = (checkpoint.load_run(Path("runs") / n)[1] for n in ("aligned", "bytes"))
    moved = {name for name, value in after.items() if (value != before[name]).any()}
    assert moved == {name for name in before if not name.startswith(llama.STACK)}
    patches_by_entropy(Path("runs/by-entropy"))


def patches_by_entropy(imported: Path) -> None:
    """Training keeps the import's entropy model; both packages write the same with its patches."""
    run, export = Path("runs/trained-by-entropy"), Path("exports/by-entropy")
    few = ["--steps", "2", "--batch-size", "2", "--sequence-length", "64", "--devices", "1"]
    start = ["--init-from", str(imported), "--data", "books/", "--run-dir", str(run)]
    assert cli.main(["train", "blt_tiny", *few, *start]) == 0
    assert cli.main(["export", str(run), "--out", str(export)]) == 0
    (first, before, _), (last, after, _) = map(checkpoint.load_run, (imported, run))
    assert first.patching and last.model == first.model
    assert last.patching and last.patching.threshold == first.patching.threshold
    kept = {name for name, value in after.items() if (value == before[name]).all()}
    assert kept == {name for name in before if name.startswith("patcher.")}
    asked = [b"Some words of"], 12, SamplerConfig(sampler="greedy")
    written = bytelm_jax.generate(bytelm_jax.from_pretrained(export), *asked)
    assert bytelm_torch.generate(bytelm_torch.from_pretrained(export), *asked) == written
