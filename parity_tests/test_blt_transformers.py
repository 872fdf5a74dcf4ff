"""The Byte Latent Transformer against an independent implementation, transformers' own.

Its cache raises, batches mix their rows, and given lengths must say whether the next byte starts a
patch; so rows go one by one, without cache, with lengths that its patcher made.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bytelm.config import BLTConfig, EntropyConfig
from bytelm.sampling import SamplerConfig
from bytelm.tolerances import LOGITS
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert
from bytelm_jax.interop import hf_blt as convert_blt
from bytelm_jax.interop.convert import to_torch
from bytelm_jax.interop.hf_blt import (
    blt_config_from_hf,
    blt_config_to_hf,
    export_hf_blt,
    hf_blt_names,
    import_hf_blt,
)
from bytelm_jax.layers import rotary as jax_rotary
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.report import relative_error
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.training import checkpoint, starting
from bytelm_jax.training.checkpoint import load_run
from bytelm_torch.inference.generate import generate
from bytelm_torch.layers import rotary as torch_rotary
from bytelm_torch.models import patching
from bytelm_torch.models.entropy import shift_right
from parity_tests.patch_thresholds import splitting_threshold
from parity_tests.starts import begun_from

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="the reference, transformers 5.23, is not installed"
)

LENGTH = 40
traced = functools.cache(abstract_params)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Shapes are the same every time, and tracing a model takes seconds."""
    for module in (checkpoint, convert_blt):
        monkeypatch.setattr(module, "abstract_params", traced)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no window": {"local_attention_window_len": None, "window": None},
    "k = 1, one table": {
        "cross_attn_k": 1,
        "encoder_hash_byte_group_size": [8],
        "wide": 16,
    },
    "k = 4, odd order": {
        "cross_attn_k": 4,
        "encoder_hash_byte_group_size": [6, 3, 5],
        "encoder_hash_byte_group_nb_functions": 3,
        "wide": 64,
    },
    "grouped heads": {"heads": 4, "kv_heads": 2, "decoder_layers": 1},
    "all primes": {"encoder_hash_byte_group_nb_functions": 11, "encoder_layers": 2},
}


def reference_config(
    wide: int = 24,
    heads: int = 2,
    kv_heads: int | None = None,
    window: int | None = 7,
    encoder_layers: int = 1,
    decoder_layers: int = 3,
    **top: Any,
) -> Any:
    """A small configuration of transformers; `top` holds fields of its own."""
    top = {"local_attention_window_len": 9, "cross_attn_k": 2, **top}
    stack = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    local = {**stack, "hidden_size": 16, "cross_attn_k": top["cross_attn_k"]}
    local |= {"hidden_size_global": wide}
    return transformers.BltConfig(
        encoder_hash_byte_group_vocab=211,
        encoder_config={**local, "num_hidden_layers": encoder_layers},
        decoder_config={**local, "num_hidden_layers": decoder_layers, "intermediate_size": 20},
        global_config={
            **stack,
            "hidden_size": wide,
            "num_hidden_layers": 2,
            "intermediate_size": 28,
        },
        patcher_config={
            **stack,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "intermediate_size": 20,
            "sliding_window": window,
        },
        **top,
    )


@functools.cache
def reference(name: str) -> Any:
    """A transformers model with random weights, norms included, and a threshold that splits."""
    torch.manual_seed(0)
    model = transformers.BltForCausalLM(reference_config(**CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        entropies, _, _ = model.model.patcher(shifted(), use_cache=False)
    model.config.patching_threshold = splitting_threshold(entropies)
    return model


def ids() -> torch.Tensor:
    text = "In Xanadü, 1797 — did Kubla Khan A stately pleasure-dome decree".encode()
    return torch.tensor([list(text[:LENGTH])]) + 4


def shifted(row: torch.Tensor | None = None) -> torch.Tensor:
    return shift_right(ids() if row is None else row, 1)


def relative(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def run_reference(model: Any, row: torch.Tensor) -> tuple[Any, list[int], Any]:
    """Entropies, patch lengths and logits of one row."""
    with torch.no_grad():
        entropies, lengths, _ = model.model.patcher(
            shifted(row),
            use_cache=False,
            patch_size=model.config.patch_size,
            threshold=model.config.patching_threshold,
        )
        logits = model(shifted(row), patch_lengths=lengths, use_cache=False).logits
    return entropies, lengths[0].tolist(), logits


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_entropies_lengths_and_logits(name, tmp_path):
    model = reference(name)
    config, params = import_hf_blt(save(model, tmp_path))
    twin = make_twin(config, params)
    seen = set()
    for length in (1, 2, 3, LENGTH - 1, LENGTH):
        row = ids()[:, :length]
        entropies, lengths, logits = run_reference(model, row)
        with torch.no_grad():
            ours = twin.entropies(shifted(row))
            starts = patching.patch_starts(twin.config, shifted(row), ours)
            actual = twin(row)
        edges = np.flatnonzero(starts[0]).tolist()
        assert np.diff([*edges, max(length, edges[-1])]).tolist() == lengths
        assert relative(ours, entropies) <= LOGITS["float32"]
        assert relative(actual, logits) <= LOGITS["float32"]
        seen.update(lengths)
    assert len(seen) > 3, "patches of several lengths were compared"


@pytest.mark.parametrize("name", ["plain", "k = 4, odd order"])
def test_the_jax_model_too(name, tmp_path):
    model = reference(name)
    config, params = import_hf_blt(save(model, tmp_path))
    bind, _ = define_model(config)
    _, _, logits = run_reference(model, ids())
    ours = jax.jit(lambda params, ids: bind(params)(ids))(params, ids().numpy().astype(np.int32))
    assert relative(ours, logits) <= LOGITS["float32"]


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_angles_at_position_4095_are_those_of_transformers(head_dim, theta):
    hf = transformers.BltConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    embedding = transformers.models.blt.modeling_blt.BltRotaryEmbedding(hf)
    expected = embedding(torch.zeros(1), torch.tensor([[4095]]))
    ours = jax_rotary.rotation(jnp.array([[4095]]), head_dim, theta, np.dtype("float32"))
    twin = torch_rotary.rotation(torch.tensor([[4095]]), head_dim, theta, torch.float32)
    for part, (cos_sin, ours_part, twin_part) in enumerate(zip(expected, ours, twin, strict=True)):
        pairs = cos_sin[..., ::2].numpy()  # transformers repeats the angle of each pair
        assert relative_error(np.asarray(ours_part), pairs) <= LOGITS["float32"], part
        assert relative_error(twin_part.numpy(), pairs) <= LOGITS["float32"], part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_there_and_back_bit_for_bit(dtype, tmp_path):
    model = transformers.BltForCausalLM(reference("grouped heads").config).to(dtype)
    source = save(model, tmp_path / "theirs", max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    config, params = import_hf_blt(source)
    export_hf_blt(config, params, tmp_path / "ours")
    back = transformers.BltForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    again_config, again = import_hf_blt(tmp_path / "ours")
    assert again_config == config
    for key, tensor in model.state_dict().items():
        other = back.state_dict()[key]
        assert other.dtype is dtype and torch.equal(other, tensor), key
    for key, value in to_torch(params).items():
        assert value.tobytes() == to_torch(again)[key].tobytes(), key
    assert blt_config_from_hf(model.config.to_dict()) == config


def test_transformers_alone_generates_from_an_export(tmp_path):
    config, params = import_hf_blt(save(reference("plain"), tmp_path / "theirs"))
    export_hf_blt(config, params, tmp_path / "ours")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "".join(map(chr, range(300))) + " <s></s><pad> two  spaces \U0001f600\n"
    ids = tokenizer(text).input_ids
    assert ids == [1, *(byte + 4 for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode([1, 2, 3]) == "<s></s><pad>" and tokenizer.padding_side == "left"
    model = transformers.BltForCausalLM.from_pretrained(tmp_path / "ours").eval()
    greedy, twin = SamplerConfig(sampler="greedy"), make_twin(config, params)
    for prompt in ("In Xanad", "\u00fc"):
        inputs = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0]
        expected = generate(twin, [prompt.encode()], 9, greedy)[0]
        assert [i - 4 for i in made[inputs.input_ids.shape[1] :].tolist()] == list(expected)
    settings = model.generation_config
    assert settings.use_cache is False and settings.suppress_tokens == [0, 1, 3]
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_there_and_back_through_the_commands(dtype, tmp_path, capsys):
    model = transformers.BltForCausalLM(reference("grouped heads").config).to(dtype)
    model.lm_head.weight.data.div_(3)  # so that float32 cannot hold what was float64
    source = save(model, tmp_path / "theirs", max_shard_size="20KB")
    assert cli.main(["import", str(source), "--out", str(tmp_path / "run")]) == 0
    export = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "ours")]
    hf_blt = [*export, "--format", "hf-blt", "--max-shard-size", "20KB", "--license", "mit"]
    assert cli.main(hf_blt) == 0
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    card = (tmp_path / "ours" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "BltForCausalLM.from_pretrained" in card
    assert ("float64 was rounded" in capsys.readouterr().err) is (dtype is torch.float64)
    back = transformers.BltForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor.float()), key
    config, params = import_hf_blt(source, convert.Float32Cast())
    recipe, restored, _ = load_run(tmp_path / "run")
    assert recipe.model == config
    begun = starting.load_start(begun_from(str(source), config))[1]  # without the import
    for key, value in params.items():
        assert np.asarray(value).tobytes() == np.asarray(restored[key]).tobytes(), key
        assert np.asarray(value).tobytes() == np.asarray(begun[key]).tobytes(), key


@pytest.mark.slow
def test_the_1b_shape_name_by_name():
    config = BLTConfig(whole_characters=False, patch_budget=1.0)
    fields = blt_config_to_hf(config)
    with torch.device("meta"):
        model = transformers.BltForCausalLM(transformers.BltConfig(**fields))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    names, shapes = hf_blt_names(config), abstract_params(config)
    renamed = {
        names[key]: leaf.shape[::-1] if key.endswith("kernel") else leaf.shape
        for key, leaf in shapes.items()
    }
    assert renamed == theirs
    assert sum(leaf.size for leaf in shapes.values()) == config.parameter_count() == 4_633_127_680
    assert BLTConfig(encoder_hidden_dim=2816).parameter_count() == 4_633_391_872
    assert blt_config_from_hf(fields) == config
    assert blt_config_from_hf({"model_type": "blt"}) == config, "defaults, where left out"


def test_what_cannot_be_the_same_is_refused_by_name(tmp_path):
    fields = json.loads((save(reference("plain"), tmp_path) / "config.json").read_text())
    wrong: list[tuple[str, Any]] = [
        ("encoder_config.cross_attn_all_layers", True),
        ("decoder_config.cross_attn_all_layers", False),
        ("decoder_config.hidden_act", "gelu"),
        ("global_config.rms_norm_eps", 1e-6),
        ("global_config.head_dim", 6),
        ("patcher_config.dropout", 0.1),
        ("max_patch_length", 8),
        ("patching_mode", "space"),
        ("tie_word_embeddings", True),
    ]
    for field, value in wrong:
        changed = json.loads(json.dumps(fields))
        part, _, leaf = field.rpartition(".")
        (changed[part] if part else changed)[leaf] = value
        with pytest.raises(ValueError, match=f"^{field}="):
            blt_config_from_hf(changed)
    lines = {"reset_on": "newline", "entropy": EntropyConfig(reset_on="newline")}
    for change in ({"patcher": "space"}, {"whole_characters": True}, {"ngram_sizes": ()}, lines):
        with pytest.raises(ValueError, match=f"^{next(iter(change))}="):
            blt_config_to_hf(BLTConfig(**{"whole_characters": False, **change}))


def test_a_damaged_folder_is_refused_in_one_line(tmp_path):
    folder = save(reference("plain"), tmp_path, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=shard.name):
        import_hf_blt(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        import_hf_blt(folder)
    with pytest.raises(ValueError, match=r"config\.json"):
        import_hf_blt(tmp_path / "nowhere")
