"""transformers around the torch twins: generation, padding, fine-tuning, and back into JAX."""

import contextlib
import functools
import json
import pickle
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import bytelm_jax
import bytelm_torch
from bytelm import recipes, tolerances
from bytelm.config import LFByteConfig, PatchingContract, to_dict
from bytelm.sampling import SamplerConfig
from bytelm.tokenizer import ByteTokenizer
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert, formats
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.report import relative_error
from bytelm_torch.inference.generate import generate
from bytelm_torch.interop import transformers as hf
from parity_tests.cases import quick
from parity_tests.tiny_models import CONFIGS

TRACED = functools.cache(abstract_params)
PROMPTS = ["Today is", "a b, and c\u00e9!", "<eos>"]


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model through `save_pretrained`, with its tokenizer."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = bytelm_torch.build_model(config)
        made[name] = tmp_path_factory.mktemp(name)
        hf.from_native(model).save_pretrained(made[name])
        hf.tokenizer_for(config).save_pretrained(made[name])
    return made


def loaded(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return model, tokenizer


@pytest.mark.parametrize("name", quick(CONFIGS, "blt", "lfbyte"))
def test_generation(name, folders):
    model, tokenizer = loaded(folders[name])
    assert issubclass(type(model), hf.ByteLMForCausalLM) and type(tokenizer) is hf.ByteLMTokenizer
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model) and type(again.config) is type(model.config)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    new, start = 7, inputs.input_ids.shape[1]
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"num_beams": 2, "do_sample": False, "num_return_sequences": 2},
    ):
        runs = []
        for cached in (True, False):
            torch.manual_seed(1)
            more = {"return_dict_in_generate": True, "output_scores": True, "use_cache": cached}
            runs.append(model.generate(**inputs, max_new_tokens=new, **more, **options))
        assert torch.equal(runs[0].sequences, runs[1].sequences), options
        assert len(runs[0].scores) == len(runs[1].scores) <= new
        for ours, theirs in zip(runs[0].scores, runs[1].scores, strict=True):
            assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))
            error = (ours - theirs)[torch.isfinite(ours)].norm() / ours[torch.isfinite(ours)].norm()
            assert error <= tolerances.OTHER_PLACE["float32"]
    made = model.generate(**inputs, max_new_tokens=new, do_sample=False)[:, start:]
    native = bytelm_torch.from_pretrained(folders[name])
    prompts = [prompt.encode() for prompt in PROMPTS]
    expected = generate(native, prompts, new, SamplerConfig(sampler="greedy"))
    found = [ByteTokenizer(native.config.vocab).to_bytes(row.numpy()) for row in made]
    assert found == expected
    assert len(set(found)) == len(found)


def test_it_stops_at_the_end_of_sequence():
    torch.manual_seed(0)
    native = bytelm_torch.build_model(CONFIGS["megabyte"])
    native.to_logits.bias.data[native.config.vocab.eos_id] += 5.0
    model: Any = hf.from_native(native)
    tokenizer = hf.tokenizer_for(native.config)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    made = model.generate(**inputs, max_new_tokens=18, do_sample=True)
    rows = made[:, inputs.input_ids.shape[1] :].tolist()
    vocab = native.config.vocab
    ends = [row.index(vocab.eos_id) if vocab.eos_id in row else len(row) for row in rows]
    assert len(set(ends)) > 1
    for row, end in zip(rows, ends, strict=True):
        assert set(row[end + 1 :]) <= {vocab.pad_id}
        assert all(vocab.offset <= i < vocab.offset + 256 for i in row[:end])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_moved_by_one_and_padding_changes_none(name, folders):
    model, tokenizer = loaded(folders[name])
    native = bytelm_torch.from_pretrained(folders[name])
    with torch.no_grad():
        for side in ("left", "right"):
            inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side=side)
            logits = model(**inputs).logits
            for row, prompt in enumerate(PROMPTS):
                count = len(prompt.encode())
                at = inputs.attention_mask[row].nonzero()[:, 0]
                assert len(at) == count
                alone = native(inputs.input_ids[row, at][None])[0]
                error = relative_error(logits[row, at[:-1]].numpy(), alone[1:].numpy())
                assert error <= tolerances.OTHER_PLACE["float32"]
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    output = model.eval()(**inputs, labels=labels)
    extra = native.outputs(inputs.input_ids).extra_loss
    assert float(output.loss.detach()) == pytest.approx(
        float(wanted), rel=tolerances.BF16_LOSS if extra.any() else tolerances.LOGITS["float32"]
    )


def sibling(config):
    """The same model in the smallest sizes from 2 on, but for a stack that has no layers."""
    held = {field.name: getattr(config, field.name) for field in fields(config)}
    if "entropy" in held:
        config = replace(config, entropy=sibling(held["entropy"]))
    # A size may depend on another, such as a width on its number of heads: the smaller number that
    # is taken now may allow the next one.
    for name, size in 3 * [item for item in held.items() if type(item[1]) is int]:
        for smaller in (2, 4, 8, 16):
            with contextlib.suppress(ValueError):
                changed = replace(config, **{name: min(size, smaller)})
                if changed.parameter_count() <= config.parameter_count():
                    config = changed
                    break
    return config


SIBLINGS = {sibling(recipes.get(name).model): name for name in recipes.names()}


def test_every_recipe_has_its_sibling():
    small = {name: sibling(recipes.get(name).model) for name in recipes.names()}
    assert set(small.values()) == set(SIBLINGS)
    large = [c.architecture for c in SIBLINGS if c.parameter_count() >= 200_000]
    assert not large, f"{large}: sibling() has found no smaller sizes"
    # Recipes of one shape and several sizes share a sibling; these have one each.
    assert len({small[name] for name in ("bytropix_tiny", "transformer_132m", "blt_1b")}) == 3


@pytest.mark.parametrize("config", SIBLINGS, ids=SIBLINGS.values())
def test_jax_to_torch_to_transformers_to_jax_keeps_every_bit(config, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "abstract_params", TRACED)
    source = np.random.default_rng(1)
    params = {
        name: jnp.asarray(source.standard_normal(leaf.shape), jnp.float32)
        for name, leaf in TRACED(config).items()
    }
    contract = PatchingContract(
        patcher="histogram", threshold=9.0, entropy_model="", sampled_bytes=9, histogram=(1, 4)
    )
    extra: dict[str, Any] = {"training_length": 24}
    extra |= {"patching": to_dict(contract)} if hasattr(config, "patcher") else {}
    convert.export_model(config, params, tmp_path / "export", extra)
    native = bytelm_torch.from_pretrained(tmp_path / "export")
    bytelm_torch.save_pretrained(native, tmp_path / "torch")
    native = bytelm_torch.from_pretrained(tmp_path / "torch")
    hf.from_native(native).save_pretrained(tmp_path / "hf")
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")
    again, back = formats.import_any(tmp_path / "again")
    assert again == config and back.keys() == params.keys()
    for name, value in back.items():
        assert np.asarray(value).tobytes() == np.asarray(params[name]).tobytes(), name
    assert formats.stored_extra(tmp_path / "again") == extra
    assert (tmp_path / "torch" / "config.json").read_bytes() == (
        tmp_path / "export" / "config.json"
    ).read_bytes()


def test_the_example_in_the_guide_saves_model_and_tokenizer(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "pytorch.md").read_text("utf-8")
    [code] = [c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import hf" in c]
    bytelm_torch.save_pretrained(
        bytelm_torch.build_model(CONFIGS["entropy"]), tmp_path / "exports/tiny"
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    _, tokenizer = loaded("hf/tiny")
    assert tokenizer("def ").input_ids == names["tokenizer"]("def ").input_ids


def test_shards_are_an_export(folders, tmp_path, capsys):
    model, tokenizer = loaded(folders["entropy"])
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    expected = {name: value.numpy() for name, value in model.model.state_dict().items()}
    theirs = bytelm_torch.from_pretrained(tmp_path / "hf").state_dict()
    config, ours = formats.import_any(tmp_path / "hf")
    assert config == CONFIGS["entropy"]
    ours = {name: each.read() for name, each in convert.in_torch_layout(ours).items()}
    assert bytelm_jax.from_pretrained(tmp_path / "hf").config == config
    assert expected.keys() == theirs.keys() == ours.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(theirs[name].numpy(), value)
        np.testing.assert_array_equal(ours[name], value)
    assert cli.main(["import", str(tmp_path / "hf"), "--out", str(tmp_path / "run")]) == 0
    arguments = ["parity", str(tmp_path / "hf"), "--dtype", "float32", "--rows", "1"]
    assert cli.main([*arguments, "--length", "9"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("name", CONFIGS)
def test_programs_find_the_longest_input_where_there_is_one(name, folders, tmp_path):
    """As lm-evaluation-harness asks for it: attributes of the configuration, then the tokenizer."""
    model, tokenizer = loaded(folders[name])
    limit = CONFIGS[name].longest_input
    asked = [
        a for a in ("n_positions", "max_position_embeddings", "n_ctx") if hasattr(model.config, a)
    ]
    if limit is None:
        assert not asked
        assert tokenizer.model_max_length == 1000000000000000019884624838656
        return
    assert asked == ["max_position_embeddings"]
    longest = model.config.max_position_embeddings
    assert longest == tokenizer.model_max_length == limit - 1
    ids = torch.full((1, longest), ord("a") + CONFIGS[name].vocab.offset)
    assert torch.isfinite(model(ids).logits).all()
    with pytest.raises(ValueError, match="no room to predict what follows 32 ids"):
        model(torch.cat([ids, ids[:, :1]], dim=1))
    assert tokenizer("x" * 99, truncation=True, return_tensors="pt").input_ids.shape == ids.shape
    fields = json.loads((folders[name] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 7}))
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == longest


def test_a_fine_tuned_model_goes_back_into_jax(folders, tmp_path):
    model, tokenizer = loaded(folders["megabyte"])
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    texts = [tokenizer(text) for text in ("hello world, hello", "the quick brown fox", "abc") * 9]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=texts, data_collator=collator)
    trainer.train()
    losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 1
    trainer.save_model(str(tmp_path / "tuned"))
    config, params = formats.import_any(tmp_path / "tuned")
    bind, _ = define_model(config)
    ids = np.frombuffer(b"hello world, hello there", np.uint8).astype(np.int32)[None]
    ours = np.asarray(bind(params)(jnp.asarray(ids)))
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(ids)).logits
    error = relative_error(ours[:, 1:], theirs[:, :-1].numpy())
    assert error <= tolerances.LOGITS["float32"]
    moved = model.model.state_dict()
    assert not any(
        torch.equal(moved[name], before[name]) for name in before if "position" not in name
    )


def test_the_tokenizer_never_loses_a_byte(folders):
    _, tokenizer = loaded(folders["blt"])
    text = "".join(map(chr, range(1, 300))) + " <pad><eos> two  spaces \U0001f600"
    ids = tokenizer(text).input_ids
    assert [i - 4 for i in ids] == list(text.encode())
    assert tokenizer.decode(ids) == text
    vocab = CONFIGS["blt"].vocab
    row = [vocab.pad_id, vocab.bos_id, *ids[:3], vocab.eos_id]
    assert tokenizer.decode(row) == "<pad><bos>\x01\x02\x03<eos>"
    assert tokenizer.decode(row, skip_special_tokens=True) == "\x01\x02\x03"
    assert tokenizer.get_vocab()["A"] == ord("A") + 4 and len(tokenizer.get_vocab()) == 260


def test_what_cannot_work_is_refused(folders):
    with pytest.raises(ValueError, match="causal=False: generation needs a causal model"):
        hf.LFByteForCausalLM(hf.LFByteLMConfig(bytelm=to_dict(LFByteConfig.original())))
    with pytest.raises(ValueError, match=r"bytelm.architecture='blt': must be 'megabyte'"):
        hf.MegabyteLMConfig(bytelm=to_dict(CONFIGS["blt"]))
    with pytest.raises(ValueError, match="model=Linear: must be of build_model"):
        hf.from_native(torch.nn.Linear(2, 2))
    model, tokenizer = loaded(folders["megabyte"])
    inputs = tokenizer("x" * 30, return_tensors="pt")
    for cached in (True, False):
        with pytest.raises(ValueError, match="max_length=32: "):
            model.generate(**inputs, max_new_tokens=9, use_cache=cached, eos_token_id=300)
    model.model.to_logits.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"^to_logits\.bias: holds NaN or infinity; "):
        model.save_pretrained(folders["megabyte"])
