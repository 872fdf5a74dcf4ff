"""Byte Latent Transformers of Hugging Face transformers (`BltForCausalLM`) to files and back.

A folder holds `config.json` and either `model.safetensors` or shards of it with their index. Names
and configuration are translated here; layouts and strictness are those of `convert.py`. Settings
that only one of the two libraries has are refused with an error that names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from bytelm import export
from bytelm.config import BLTConfig, ByteVocab, EntropyConfig, require
from bytelm.folders import check_replaceable, replace_folder
from bytelm.shards import is_weights_file, weight_writers
from bytelm_jax.interop import convert
from bytelm_jax.interop.hf_tokenizer import (
    BLT_SPECIALS,
    special_ids,
    suppressed_ids,
    tokenizer_files,
)
from bytelm_jax.models import Params, abstract_params

# Fields that a transformers of any version omits from config.json when they equal the default.
_STACK = {"rms_norm_eps": 1e-5, "dropout": 0.0, "hidden_act": "silu", "num_key_value_heads": None}
_LOCAL = {"vocab_size": 260, "hidden_size": 1024, "num_attention_heads": 16}
_LOCAL |= {"cross_attn_k": 2, "hidden_size_global": 2048, **_STACK}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "encoder_config": _LOCAL
    | {"num_hidden_layers": 1, "intermediate_size": None, "cross_attn_all_layers": False},
    "decoder_config": _LOCAL
    | {"num_hidden_layers": 9, "intermediate_size": 2816, "cross_attn_all_layers": True},
    "global_config": _STACK
    | {"hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 25}
    | {"intermediate_size": 5632},
    "patcher_config": _STACK
    | {"vocab_size": 260, "hidden_size": 768, "num_hidden_layers": 14, "num_attention_heads": 12}
    | {"intermediate_size": 2048, "sliding_window": 512},
}
_TOP = {
    "vocab_size": 260,
    "patch_in_forward": True,
    "patch_size": 4,
    "patching_mode": "entropy",
    "patching_threshold": 1.335442066192627,
    "max_patch_length": None,
    "local_attention_window_len": 512,
    "cross_attn_k": 2,
    "encoder_hash_byte_group_size": None,
    "encoder_hash_byte_group_vocab": 500_002,
    "encoder_hash_byte_group_nb_functions": 1,
    "tie_word_embeddings": False,
}
_THETA = {"patcher_config": 10_000.0}  # and 500,000 elsewhere
_GROUPS = (3, 4, 5, 6, 7, 8)

_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "cross_attn_k", "hidden_size_global")
_SIZES += ("num_hidden_layers", "patch_size", "encoder_hash_byte_group_vocab")
_SIZES += ("encoder_hash_byte_group_nb_functions",)
_SIZES_OR_NONE = ("intermediate_size", "num_key_value_heads", "sliding_window", "max_patch_length")
_SIZES_OR_NONE += ("local_attention_window_len", "head_dim")
_NUMBERS = ("rms_norm_eps", "dropout", "patching_threshold", "rope_theta")


# ---- names ----------------------------------------------------------------------------------

_MODULES = {
    "patcher.transformer.layers": "model.patcher.layers",
    "patcher.embed": "model.patcher.embed_tokens",
    "patcher.norm": "model.patcher.norm",
    "patcher.to_logits": "model.patcher.lm_head",
    "encoder.embed": "model.local_encoder.embed_tokens",
    "encoder.ngrams": "model.encoder_hash_tok_embedding",
    "encoder.transformer.layers": "model.local_encoder.layers",
    "encoder.to_queries": "model.local_encoder.patch_embedding_projection",
    "encoder.cross_attention": "model.local_encoder.cross_attn_layers.0",
    "to_global": "model.global_transformer.token_embedding_projection",
    "global_transformer.layers": "model.global_transformer.layers",
    "decoder.to_memory": "model.local_decoder.patch_embedding_projection",
    "decoder.cross_attentions": "model.local_decoder.cross_attn_layers",
    "decoder.transformer.layers": "model.local_decoder.layers",
    "decoder.norm": "model.local_decoder.norm",
    "to_logits": "lm_head",
}
_IN_LAYER = {
    ".attention.norm": ".input_layernorm",
    ".attention.": ".self_attn.",
    ".feedforward.norm": ".post_attention_layernorm",
    ".feedforward.gate": ".mlp.gate_proj",
    ".feedforward.up": ".mlp.up_proj",
    ".feedforward.down": ".mlp.down_proj",
    ".to_q": ".q_proj",
    ".to_k": ".k_proj",
    ".to_v": ".v_proj",
    ".to_out": ".o_proj",
}


def hf_blt_names(config: BLTConfig) -> dict[str, str]:
    """The name of each of our parameters in transformers' state dict."""
    return {name: _foreign_module(name) + ".weight" for name in abstract_params(config)}


def _foreign_module(name: str) -> str:
    """`encoder.cross_attention.to_q.kernel` → `model.local_encoder.cross_attn_layers.0.q_proj`."""
    module = name.rpartition(".")[0]
    ours = next(m for m in _MODULES if module == m or module.startswith(m + "."))
    rest = module[len(ours) :]
    for part, foreign in _IN_LAYER.items():
        rest = rest.replace(part, foreign)
    return _MODULES[ours] + rest


# ---- configuration --------------------------------------------------------------------------


def blt_config_from_hf(fields: Mapping[str, Any]) -> BLTConfig:
    """The configuration that a transformers `config.json` describes.

    The patch budget is that of transformers, which has none. Raises `ValueError`, naming the field,
    for settings that have no equivalent here.
    """
    _check_kinds(fields, "")
    top = _TOP | dict(fields)
    require(
        top.get("model_type", "blt") == "blt",
        f"model_type={top.get('model_type')!r}: must be 'blt'",
    )
    parts = {name: known | dict(top.get(name) or {}) for name, known in _DEFAULTS.items()}
    encoder, decoder = parts["encoder_config"], parts["decoder_config"]
    wide, patcher = parts["global_config"], parts["patcher_config"]
    by_entropy = bool(top["patch_in_forward"])
    _refuse_differences(top, parts, by_entropy)
    vocab = ByteVocab(size=top["vocab_size"], offset=4, pad_id=3, bos_id=1, eos_id=2)
    entropy = EntropyConfig(vocab=vocab)
    if by_entropy:
        entropy = EntropyConfig(
            vocab=vocab,
            dim=patcher["hidden_size"],
            layers=patcher["num_hidden_layers"],
            heads=patcher["num_attention_heads"],
            kv_heads=_kv_heads(patcher),
            hidden_dim=_hidden(patcher),
            window=patcher["sliding_window"] or 0,
            rope_theta=_theta(patcher, "patcher_config"),
        )
    return BLTConfig(
        vocab=vocab,
        patcher="entropy" if by_entropy else "byte",
        threshold=float(top["patching_threshold"]),
        patch_size=top["patch_size"],
        whole_characters=False,
        patch_budget=1.0,
        entropy=entropy,
        ngram_sizes=tuple(top["encoder_hash_byte_group_size"] or _GROUPS),
        ngram_functions=top["encoder_hash_byte_group_nb_functions"],
        ngram_rows=top["encoder_hash_byte_group_vocab"],
        patch_queries=top["cross_attn_k"],
        local_dim=encoder["hidden_size"],
        local_window=top["local_attention_window_len"] or 0,
        encoder_layers=encoder["num_hidden_layers"],
        encoder_heads=encoder["num_attention_heads"],
        encoder_kv_heads=_kv_heads(encoder),
        encoder_hidden_dim=_hidden(encoder),
        decoder_layers=decoder["num_hidden_layers"],
        decoder_heads=decoder["num_attention_heads"],
        decoder_kv_heads=_kv_heads(decoder),
        decoder_hidden_dim=_hidden(decoder),
        global_dim=wide["hidden_size"],
        global_layers=wide["num_hidden_layers"],
        global_heads=wide["num_attention_heads"],
        global_kv_heads=_kv_heads(wide),
        global_hidden_dim=_hidden(wide),
        rope_theta=_theta(encoder, "encoder_config"),
    )


def _check_kinds(fields: Mapping[Any, Any], where: str) -> None:
    """Raises `ValueError` for the first field that is read here and has the wrong type."""
    for key, value in fields.items():
        name = str(key)
        inside, kind, good = name.endswith("_config") or name.startswith("rope_p"), "", True
        if name in _SIZES or (name in _SIZES_OR_NONE and value is not None):
            least = 0 if "window" in name else 1
            kind = f"a whole number from {least} on"
            good = type(value) is int and value >= least
        elif name in _NUMBERS:
            kind, good = "a number", type(value) in (int, float)
        elif name == "encoder_hash_byte_group_size" and value is not None:
            whole = isinstance(value, list) and all(type(size) is int for size in value)
            kind, good = "a list of whole numbers", whole
        elif (inside or name == "rope_scaling") and value is not None:
            kind, good = "an object", isinstance(value, dict)
        require(good, f"{where}{name}={value!r:.100}: must be {kind}")
        if isinstance(value, dict):
            _check_kinds(value, f"{where}{name}.")


def _refuse_differences(top: dict[str, Any], parts: dict[str, Any], by_entropy: bool) -> None:
    """Raises `ValueError` for the first field whose value has no equivalent here."""
    encoder, wide = parts["encoder_config"], parts["global_config"]
    needed: list[tuple[str, Any, Any]] = [
        ("tie_word_embeddings", top["tie_word_embeddings"], False),
        ("max_patch_length", top["max_patch_length"], None),
        ("encoder_config.cross_attn_all_layers", encoder["cross_attn_all_layers"], False),
    ]
    decoder = parts["decoder_config"]
    needed += [
        ("decoder_config.cross_attn_all_layers", decoder["cross_attn_all_layers"], True),
        ("decoder_config.hidden_size", decoder["hidden_size"], encoder["hidden_size"]),
        ("decoder_config.hidden_size_global", decoder["hidden_size_global"], wide["hidden_size"]),
    ]
    if by_entropy:
        needed.append(("patching_mode", top["patching_mode"], "entropy"))
    else:
        parts = {name: part for name, part in parts.items() if name != "patcher_config"}
    theta = _theta(encoder, "encoder_config")
    for name, part in parts.items():
        needed += [
            (f"{name}.rms_norm_eps", part["rms_norm_eps"], 1e-5),
            (f"{name}.hidden_act", part["hidden_act"], "silu"),
            (f"{name}.dropout", part["dropout"], 0),
            (f"{name}.vocab_size", part.get("vocab_size", top["vocab_size"]), top["vocab_size"]),
            (
                f"{name}.cross_attn_k",
                part.get("cross_attn_k", top["cross_attn_k"]),
                top["cross_attn_k"],
            ),
            (f"{name}.rope_type", _rope(part).get("rope_type", "default"), "default"),
        ]
        if name != "patcher_config":
            needed.append((f"{name}.rope_theta", _theta(part, name), theta))
        head = part["hidden_size"] // part["num_attention_heads"]
        needed.append((f"{name}.head_dim", part.get("head_dim") or head, head))
    for field, value, expected in needed:
        require(value == expected, f"{field}={value!r}: only {expected!r} can be imported")


def _rope(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part.get("rope_parameters") or part.get("rope_scaling") or {}


def _theta(part: Mapping[str, Any], name: str) -> float:
    flat = part.get("rope_theta", _THETA.get(name, 500_000.0))  # written by version 4
    return float(_rope(part).get("rope_theta", flat))


def _kv_heads(part: Mapping[str, Any]) -> int:
    heads = part["num_key_value_heads"]
    return 0 if heads in (None, part["num_attention_heads"]) else heads


def _hidden(part: Mapping[str, Any]) -> int:
    return part["intermediate_size"] or int(8 * part["hidden_size"] / 3)


def blt_config_to_hf(config: BLTConfig) -> dict[str, Any]:
    """The `config.json` of transformers for `config`, whose weights are float32.

    Raises `ValueError`, naming the field, for settings that transformers cannot express.
    """
    c, vocab, problem = config, config.vocab, config.transformers_problem
    require(problem is None, str(problem))
    by_entropy = c.patcher == "entropy"
    local = {"vocab_size": vocab.size, "hidden_size": c.local_dim}
    local |= {"cross_attn_k": c.patch_queries, "hidden_size_global": c.global_dim}
    encoder = _stack(c.encoder_layers, c.encoder_heads, c.encoder_kv_heads, c.encoder_hidden_dim)
    decoder = _stack(c.decoder_layers, c.decoder_heads, c.decoder_kv_heads, c.decoder_hidden_dim)
    wide = _stack(c.global_layers, c.global_heads, c.global_kv_heads, c.global_hidden_dim)
    e, rope = c.entropy, {"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    patcher_rope = {"rope_parameters": {"rope_type": "default", "rope_theta": e.rope_theta}}
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "dtype": "float32",
        "vocab_size": vocab.size,
        "patch_in_forward": by_entropy,
        "patch_size": c.patch_size,
        "patching_mode": "entropy",
        "patching_threshold": c.threshold,
        "max_patch_length": None,
        "local_attention_window_len": c.local_window or None,
        "cross_attn_k": c.patch_queries,
        "encoder_hash_byte_group_size": list(c.ngram_sizes),
        "encoder_hash_byte_group_vocab": c.ngram_rows,
        "encoder_hash_byte_group_nb_functions": c.ngram_functions,
        "tie_word_embeddings": False,
        "use_cache": False,  # with its cache, transformers' generate fails on these models
        **special_ids(vocab),
        **rope,
        "encoder_config": local | encoder | rope | {"cross_attn_all_layers": False},
        "decoder_config": local | decoder | rope | {"cross_attn_all_layers": True},
        "global_config": {"hidden_size": c.global_dim} | wide | rope,
        "patcher_config": {"vocab_size": vocab.size, "hidden_size": e.dim}
        | _stack(e.layers, e.heads, e.kv_heads, e.hidden_dim)
        | {"sliding_window": e.window or None}
        | patcher_rope,
    }


def generation_config_of(vocab: ByteVocab) -> dict[str, Any]:
    """The `generation_config.json` of transformers: no cache, and bytes or the end alone."""
    return {"use_cache": False, "suppress_tokens": suppressed_ids(vocab), **special_ids(vocab)}


def _stack(layers: int, heads: int, kv_heads: int, hidden: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": hidden,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "dropout": 0.0,
    }


# ---- folders --------------------------------------------------------------------------------


def import_hf_blt(path: str | Path, cast: convert.Cast | None = None) -> tuple[BLTConfig, Params]:
    """Configuration and parameters from a transformers folder, sharded or not.

    Values keep their dtype and every bit, unless `cast` changes them; apart from the result, one
    tensor at a time is in memory. Raises `ValueError` if a file is missing or damaged, for a
    configuration that has no equivalent here, and for tensors that do not match the configuration
    or are not finite.
    """
    folder = Path(path)
    fields, config = _read_config(folder)
    tensors = export.ShardedTensors(export.weight_files(folder), convert.NUMPY)
    export.check_size(tensors, config)
    leaves, names = abstract_params(config), hf_blt_names(config)
    shapes = {names[name]: convert.torch_shape(name, leaf.shape) for name, leaf in leaves.items()}
    export.check_tensors(tensors, shapes)
    params = {
        name: _placed(name, convert.read_tensor(source, tensors[source], cast))
        for name, source in names.items()
    }
    tensors.verify(export.sum_of_json(fields))
    return config, params


def read_hf_blt_config(path: str | Path) -> BLTConfig:
    """The configuration that `import_hf_blt` finds; no weights are read."""
    return _read_config(Path(path))[1]


def _read_config(folder: Path) -> tuple[dict[str, Any], BLTConfig]:
    with export.errors_about(folder / export.CONFIG_FILE, "give a folder of save_pretrained"):
        fields = export.read_json(folder / export.CONFIG_FILE)
        require(isinstance(fields, dict), "must hold a JSON object")
        return fields, blt_config_from_hf(fields)


def _placed(name: str, array: np.ndarray) -> Array:
    """A tensor as a JAX array, without another copy in between."""
    return jax.device_put(convert.swapped(name, array))  # nothing else refers to the buffer


def check_out(out: Path) -> None:
    """Raises `ValueError` unless `export_hf_blt` may write `out`: before weights are read."""
    check_replaceable(out, _may_replace)


def export_hf_blt(
    config: Any,
    params: Params,
    out: str | Path,
    card: str = "",
    max_shard_bytes: int = 50 * 1000**3,
) -> list[str]:
    """Writes a folder that `BltForCausalLM.from_pretrained` loads; the names of its files.

    `AutoTokenizer.from_pretrained` finds its tokenizer there, and `generate` its settings; `card`
    is the text of README.md, which is left out if it is empty. All files are written completely or
    none of them, in place of an export that `out` holds. Raises `ValueError` if `params` do not
    match `config` or are not finite, if transformers cannot express it, and if `out` holds other
    files or cannot be written.
    """
    known = config.transformers_type
    require(known == "blt", f"format=hf-blt: the model is {config.architecture}, not blt")
    fields = blt_config_to_hf(config)  # raises for layers whose parameters have no names there
    convert.check_params(config, params)
    renamed = {
        f"{_foreign_module(name)}.{name.rpartition('.')[2]}": value
        for name, value in params.items()
    }
    fields["dtype"] = params["to_logits.kernel"].dtype.name
    jsons = {export.CONFIG_FILE: fields, _GENERATION: generation_config_of(config.vocab)}
    jsons |= tokenizer_files(config.vocab, BLT_SPECIALS, bos_first=True)
    texts = {name: export.config_text(content) for name, content in jsons.items()}
    texts |= {_CARD: card.encode()} if card else {}
    tensors, sums = convert.in_torch_layout(renamed), export.sum_of_json(fields)
    files = weight_writers(tensors, convert.NUMPY.raw, sums, max_shard_bytes)
    files |= {name: lambda sink, text=text: sink.write(text) for name, text in texts.items()}
    replace_folder(Path(out), files, _may_replace)
    return sorted(files)


_GENERATION, _CARD = "generation_config.json", "README.md"
_NAMES = (export.CONFIG_FILE, _GENERATION, _CARD, "tokenizer.json", "tokenizer_config.json")


def _may_replace(name: str) -> bool:
    return name in _NAMES or is_weights_file(name)
