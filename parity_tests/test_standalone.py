"""A folder of `bytelm export --format hf` in a process that cannot import this library."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import bytelm_torch
from bytelm import tolerances
from bytelm.config import Recipe
from bytelm.model_card import model_card
from bytelm.modeling import modeling_code
from bytelm.sampling import SamplerConfig
from bytelm_jax.interop import hf_folder
from bytelm_jax.interop.convert import load_export
from bytelm_jax.models import abstract_params
from parity_tests.tiny_models import CONFIGS
from parity_tests.twins import random_ids

PROMPT = "h\u00e9 <eos>"
GREEDY = SamplerConfig(temperature=0.0)
NEW = 9
ALONE = """
import sys
for name in ("bytelm", "bytelm_torch", "bytelm_jax", "jax", "flax", "jaxtyping"):
    sys.modules[name] = None  # an import of it fails

import json, numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = torch.from_numpy(np.load(f"{folder}.npy")).long()
    with torch.no_grad():
        np.save(f"{folder}.logits.npy", model(ids).logits.numpy())
    inputs = tokenizer("PROMPT", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].tolist()
    print(json.dumps([type(model).__name__, inputs.input_ids[0].tolist(), made]))
""".replace("PROMPT", PROMPT).replace("NEW", str(NEW))


@functools.cache
def params_of(name):
    """Random parameters without compiling anything: no kernel is small, no norm is 1."""
    source, params = np.random.default_rng(0), {}
    for leaf, like in abstract_params(CONFIGS[name]).items():
        value = 0.3 * source.standard_normal(like.shape) + leaf.endswith("scale")
        params[leaf] = jnp.asarray(value, "float32")
    return params


def written(name, folder, **options):
    config = CONFIGS[name]
    card = functools.partial(model_card, Recipe(name=name, model=config), 0, "mit", [])
    return hf_folder.export_hf(config, params_of(name), folder, card, {"step": 3}, **options)


def test_a_process_without_this_library_computes_the_same(tmp_path):
    models = {}
    for name in ("megabyte", "blt"):
        folder = tmp_path / name
        # The second in shards, one of which holds a tensor that is larger than a shard may be.
        options = {"max_shard_bytes": 20_000} if name == "blt" else {}
        files = written(name, folder, **options)
        assert files == sorted(os.listdir(folder))
        assert ("model.safetensors" in files) == (name == "megabyte")
        models[name] = bytelm_torch.from_pretrained(folder)  # it is an export as well
        np.save(f"{folder}.npy", random_ids(CONFIGS[name], 2, 31))
    folders = [str(tmp_path / name) for name in models]
    place = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *folders],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | place,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, model), line in zip(models.items(), done.stdout.splitlines(), strict=True):
        kind, prompt, made = json.loads(line)
        vocab, text = CONFIGS[name].vocab, PROMPT.encode()
        assert kind == f"{type(model).__name__}ForCausalLM"
        assert prompt == [byte + vocab.offset for byte in text]
        new = [i for i in made[len(text) :] if i != vocab.eos_id]
        (ours,) = bytelm_torch.generate(model, [text], NEW, GREEDY)
        assert bytes(i - vocab.offset for i in new) == ours
        ids = torch.from_numpy(np.load(tmp_path / f"{name}.npy"))
        with torch.no_grad():
            expected = model(ids).numpy()[:, 1:]
        theirs = np.load(tmp_path / f"{name}.logits.npy")[:, :-1]
        np.testing.assert_allclose(theirs, expected, atol=tolerances.STANDALONE_LOGITS, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_code_of_a_model_imports_nothing_of_this_library(name):
    code = modeling_code(CONFIGS[name])
    compile(code, "modeling_bytelm.py", "exec")
    for word in ("import bytelm", "from bytelm", "jaxtyping", "import jax", "Optimizer("):
        assert word not in code
    others = {type(c).__name__ for c in CONFIGS.values()} - {type(CONFIGS[name]).__name__}
    kept = {other for other in others if f"class {other}" in code}
    # The entropy model is the patcher of a BLT, whose rules it asks for where patches start.
    assert kept <= {"EntropyConfig", "BLTConfig"} and not (name == "megabyte" and kept)


def test_shards_hold_the_same_tensors(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    written("megabyte", whole)
    written("megabyte", parts, max_shard_bytes=20_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    expected = load_file(whole / "model.safetensors")
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and set(index["weight_map"]) == set(expected)
    for shard in shards:
        held = load_file(parts / shard)
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 20_000
        for name, value in held.items():
            assert index["weight_map"][name] == shard
            np.testing.assert_array_equal(value, expected.pop(name))
    assert not expected
    _, params = load_export(parts)
    for name, value in params_of("megabyte").items():
        np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(value))
    written("megabyte", parts)  # in place of the shards
    assert not list(parts.glob("*index*")) and (parts / "model.safetensors").is_file()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out: holds notes.txt, which an export does not"):
        written("megabyte", out)
    assert os.listdir(out) == ["notes.txt"]
    encoder = replace(CONFIGS["lfbyte"], causal=False)
    with pytest.raises(ValueError, match="causal=False: generation needs a causal model"):
        hf_folder.export_hf(encoder, params_of("lfbyte"), tmp_path / "encoder", str)
    assert os.listdir(tmp_path) == ["out"]
