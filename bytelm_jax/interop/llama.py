"""Token models of the Llama family, whose decoder layers become BLT's global transformer.

A folder of transformers holds `config.json` and either `model.safetensors` or shards of it with
their index. The layers and the norm behind them are taken over, bit for bit but for the order of
the rows that rotations pair; byte encoder and byte decoder are drawn. The donor's embeddings of
tokens only say how large the vectors of patches are at first. What BLT's layers cannot express is
refused with an error that names it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bytelm import export
from bytelm.config import DONORS, BlockConfig, BLTConfig, require
from bytelm.leaves import torch_name
from bytelm_jax.interop import convert
from bytelm_jax.models import Params, abstract_params, define_model

STACK = "global_transformer."
"""What the names of the donor's parameters begin with in BLT."""


class _Family(NamedTuple):
    """What a `model_type` says of its layers, and what config.json leaves out."""

    defaults: Mapping[str, Any]
    block: Mapping[str, Any]
    """Fields of `BlockConfig`."""
    ignored: frozenset[str] = frozenset()
    """What transformers does not read of config.json, whatever stands there."""


_LLAMA = {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008}
_LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None}
_LLAMA |= {"hidden_act": "silu", "rms_norm_eps": 1e-6}
_LLAMA |= {"head_dim": None, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0}
_LLAMA |= {"use_sliding_window": False, "layer_types": None, "quantization_config": None}
_QWEN = _LLAMA | {"vocab_size": 151_936, "intermediate_size": 22_016, "num_key_value_heads": 32}
_OLMO = _LLAMA | {"vocab_size": 50_304, "rms_norm_eps": 1e-5}

FAMILIES: dict[str, _Family] = {
    "llama": _Family(_LLAMA, {}),
    "qwen2": _Family(_QWEN, {"bias": "qkv"}, frozenset({"attention_bias", "mlp_bias"})),
    "qwen3": _Family(_QWEN | {"head_dim": 128}, {"qk_norm": "head"}, frozenset({"mlp_bias"})),
    "olmo2": _Family(_OLMO, {"norm": "after", "qk_norm": "projection"}, frozenset({"mlp_bias"})),
}
"""`model_type` → what its layers are; SmolLM is a llama."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_SIZES += ("num_attention_heads",)
_THETA = 10_000.0


class Donor(NamedTuple):
    """A folder of a token model, whose weights are not read yet."""

    folder: Path
    fields: dict[str, Any]
    """Its config.json."""
    sizes: dict[str, Any]
    """Fields of `BLTConfig` that describe its layers."""
    vocab_size: int


# ---- configuration --------------------------------------------------------------------------


def is_donor(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a token model of a known family."""
    return fields.get("model_type") in DONORS


def read_donor(path: str | Path) -> Donor:
    """What config.json says; raises `ValueError`, naming the field, for what BLT cannot express."""
    folder = Path(path)
    file = folder / export.CONFIG_FILE
    with export.errors_about(file, "give a folder of transformers' save_pretrained"):
        fields = export.read_json(file)
        require(isinstance(fields, dict), "must hold a JSON object")
        kind = fields.get("model_type")
        known = ", ".join(DONORS)
        require(kind in DONORS, f"model_type={kind!r:.100}: only {known} can be imported")
        family = FAMILIES[str(kind)]
        read = {name: value for name, value in fields.items() if name not in family.ignored}
        known_fields = dict(family.defaults) | read
        _check_kinds(known_fields)
        _refuse_differences(known_fields)
        sizes = _sizes(known_fields, family.block)
        return Donor(folder, fields, sizes, known_fields["vocab_size"])


def _check_kinds(fields: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first field that is read here and has the wrong type."""
    for name in (*_SIZES, "num_key_value_heads", "head_dim"):
        value = fields[name]
        optional = value is None and name not in _SIZES
        whole = type(value) is int and value >= 1
        require(optional or whole, f"{name}={value!r:.100}: must be a whole number from 1 on")
    eps = fields["rms_norm_eps"]
    require(type(eps) in (int, float), f"rms_norm_eps={eps!r:.100}: must be a number")
    value = fields["attention_bias"]
    require(type(value) is bool, f"attention_bias={value!r:.100}: must be true or false")
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.get(name) or {}
        require(isinstance(value, dict), f"{name}={value!r:.100}: must be an object")


def _refuse_differences(fields: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first field whose value has no equivalent here."""
    act = fields["hidden_act"]
    silu = act in ("silu", "swish")  # two names of one function
    require(silu, f"hidden_act={act!r:.100}: only 'silu' can be imported")
    needed: dict[str, Any] = {"mlp_bias": False, "attention_dropout": 0}
    needed |= {"use_sliding_window": False, "quantization_config": None}
    for name, expected in needed.items():
        value = fields[name]
        require(value == expected, f"{name}={value!r:.100}: only {expected!r} can be imported")
    kinds = fields["layer_types"] or ["full_attention"]
    require(isinstance(kinds, list), f"layer_types={kinds!r:.100}: must be a list")
    other = next((kind for kind in kinds if kind != "full_attention"), None)
    why = "only 'full_attention' can be imported"
    require(other is None, f"layer_types: holds {other!r:.100}; {why}")


def _sizes(fields: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    kv_heads, head = fields["num_key_value_heads"] or heads, fields["head_dim"]
    require(heads % kv_heads == 0, f"num_key_value_heads={kv_heads}: must divide {heads} heads")
    own = bool(head) and head * heads != width
    fits = own or width % heads == 0
    require(fits, f"num_attention_heads={heads}: must divide hidden_size={width}")
    biased = {"bias": "all"} if fields["attention_bias"] else {}
    with _in_their_terms():
        built = BlockConfig(
            head_dim=head if own else 0,
            norm_eps=float(fields["rms_norm_eps"]),
            final_norm=True,
            **_rotation(fields),
            **{**block, **biased},
        )
    return {
        "global_dim": width,
        "global_layers": fields["num_hidden_layers"],
        "global_heads": heads,
        "global_kv_heads": 0 if kv_heads == heads else kv_heads,
        "global_hidden_dim": fields["intermediate_size"],
        "global_block": built,
    }


def _rotation(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary fields of `BlockConfig`, found where transformers 5 finds them.

    It takes `rope_scaling`, by which version 4 called them, and no field of `rope_parameters` where
    both are there; and `original_max_position_embeddings` beside them, if there is one.
    """
    where = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = dict(fields.get(where) or {})
    nested = next((name for name, value in rope.items() if isinstance(value, dict)), None)
    require(nested is None, f"{where}.{nested}: rotations by the kind of a layer are not imported")
    if "original_max_position_embeddings" in fields:
        rope["original_max_position_embeddings"] = fields["original_max_position_embeddings"]
    theta = rope.get("rope_theta", fields.get("rope_theta", _THETA))  # flat: by version 4
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = {"linear": {"factor": "rope_factor"}, "default": {}}
    names["llama3"] = names["linear"] | {"low_freq_factor": "rope_low"}
    names["llama3"] |= {"high_freq_factor": "rope_high"}
    names["llama3"] |= {"original_max_position_embeddings": "rope_length"}
    require(
        isinstance(kind, str) and kind in names,
        f"{where}.rope_type={kind!r:.100}: only 'default', 'linear' and 'llama3' can be imported",
    )
    part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    require(part == 1, f"partial_rotary_factor={part!r:.100}: only 1.0 can be imported")
    found: dict[str, Any] = {"rope_theta": _number("rope_theta", theta)}
    for theirs, ours in names[kind].items():
        require(theirs in rope, f"{where}.{theirs}: missing; rope_type={kind!r} needs it")
        number = _number(f"{where}.{theirs}", rope[theirs])
        found[ours] = int(number) if ours == "rope_length" else number
    return found | {"rope_scaling": "none" if kind == "default" else kind}


def _number(name: str, value: Any) -> float:
    good = type(value) in (int, float) and 0 < value <= sys.float_info.max
    require(good, f"{name}={value!r:.100}: must be a finite number above 0")
    return float(value)


def byte_config(local: BLTConfig, donor: Donor) -> BLTConfig:
    """`local` with the donor's layers as its global transformer.

    Raises `ValueError` for parts of `local` that would change what these compute.
    """
    plain = {"feedforward": "gated", "entropy_attention": False, "positions": "rotary"}
    for name, value in plain.items():
        given = getattr(local, name)
        why = "the donor's layers have it otherwise; name another recipe"
        require(given == value, f"model.{name}={given!r}: {why}")
    with export.errors_about(donor.folder / export.CONFIG_FILE, ""), _in_their_terms():
        return replace(local, **donor.sizes)


_THEIR_NAMES = {"global_dim": "hidden_size", "global_layers": "num_hidden_layers"}
_THEIR_NAMES |= {"global_heads": "num_attention_heads", "global_kv_heads": "num_key_value_heads"}
_THEIR_NAMES |= {"global_hidden_dim": "intermediate_size", "global_block.head_dim": "head_dim"}
_THEIR_NAMES |= {"global_block.norm_eps": "rms_norm_eps", "global_block.rope_theta": "rope_theta"}
_THEIR_NAMES |= {"global_block.rope_high": "high_freq_factor", "rope_low": "low_freq_factor"}


@contextmanager
def _in_their_terms() -> Iterator[None]:
    """Errors about fields that a donor decides call them what its config.json does."""
    try:
        yield
    except ValueError as error:
        names = "|".join(re.escape(name) for name in sorted(_THEIR_NAMES, key=len, reverse=True))
        said = re.sub(rf"\b({names})\b", lambda found: _THEIR_NAMES[found[0]], str(error))
        raise ValueError(said) from None


# ---- names and layouts ----------------------------------------------------------------------

_IN_LAYER = {
    "attention.to_q": "self_attn.q_proj",
    "attention.to_k": "self_attn.k_proj",
    "attention.to_v": "self_attn.v_proj",
    "attention.to_out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
_NORMS = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
_IN_PAIRS = ("to_q", "to_k", "q_norm", "k_norm")
_BARE = "model."
"""What names begin with that AutoModelForCausalLM of transformers saves, but not AutoModel."""
_EMBEDDING, _HEAD, _UNUSED = "model.embed_tokens.weight", "lm_head.weight", ".rotary_emb.inv_freq"


def donor_name(name: str, config: BLTConfig) -> str:
    """The name, in the donor, of the parameter of the global transformer called `name`."""
    module, _, leaf = torch_name(name.removeprefix(STACK)).rpartition(".")
    first, second = _NORMS[config.global_block.norm]
    known = _IN_LAYER | {"attention.norm": first, "feedforward.norm": second}
    parts = module.split(".", 2)  # layers, number, the rest
    inside = ".".join([*parts[:2], known[parts[2]]]) if len(parts) == 3 else module
    return f"model.{inside}.{leaf}"


def stack_leaves(config: BLTConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape, in the donor's layout, of the parameters of the global transformer."""
    leaves = abstract_params(config)
    return {
        name: convert.torch_shape(name, leaf.shape)
        for name, leaf in leaves.items()
        if name.startswith(STACK)
    }


def in_our_layout(name: str, array: np.ndarray, config: BLTConfig) -> np.ndarray:
    """The donor's array as the parameter `name`: transposed, and rotated rows side by side.

    A rotation of transformers pairs feature i of a head of width K with i + K / 2, ours 2i with
    2i + 1.
    """
    if name.split(".")[-2] in _IN_PAIRS:
        head = config.global_block.head_width(config.global_dim, config.global_heads)
        by_half = array.reshape(-1, 2, head // 2, *array.shape[1:])
        array = np.swapaxes(by_half, 1, 2).reshape(array.shape)
    return convert.swapped(name, array)


# ---- folders --------------------------------------------------------------------------------


def import_llama(
    path: str | Path,
    local: BLTConfig,
    *,
    seed: int = 0,
    patcher: Params | None = None,
    cast: convert.Cast | None = None,
) -> tuple[BLTConfig, Params]:
    """A byte model whose global transformer is the token model in the folder `path`.

    All else is as `local` says, and drawn by `seed`, but for the entropy model `patcher`, whose
    names begin with `patcher.`. The donor's values keep their dtype and every bit, unless `cast`
    changes them; apart from the result, one tensor at a time is in memory. Vectors of patches are
    at first as large as the donor's embeddings of tokens. Raises `ValueError` if a file is missing
    or damaged, for what BLT cannot express, and for tensors that do not match config.json or are
    not finite.
    """
    donor = read_donor(path)
    config, (params, size) = byte_config(local, donor), read_stack(donor, local, cast)
    given = params | (patcher or {})
    return config, given | _drawn(config, seed, set(given), size)


def read_stack(
    donor: Donor, local: BLTConfig, cast: convert.Cast | None = None
) -> tuple[Params, float]:
    """The parameters of the global transformer, and the root mean square of an embedding.

    Raises `ValueError` as `import_llama` does.
    """
    config, tensors = byte_config(local, donor), open_donor(donor)
    leaves = stack_leaves(config)
    expected = {donor_name(name, config): shape for name, shape in leaves.items()}
    expected[_EMBEDDING] = (donor.vocab_size, config.global_dim)
    if _HEAD in tensors:  # not where it is tied, nor where AutoModel saved: it is not needed
        expected[_HEAD] = expected[_EMBEDDING]
    with export.errors_about(donor.folder, ""):
        export.check_tensors(tensors, expected)

    def read(source: str) -> np.ndarray:
        return convert.read_tensor(source, tensors[source], cast)

    size = _root_mean_square(read(_EMBEDDING))
    params = {
        name: jax.device_put(in_our_layout(name, read(donor_name(name, config)), config))
        for name in leaves
    }
    tensors.verify(export.sum_of_json(donor.fields))
    return params, size


def open_donor(donor: Donor) -> export.ShardedTensors:
    """The donor's tensors, of which none is read, without what older versions stored in vain."""
    files = export.weight_files(donor.folder)
    name, hint = files[0], "transformers writes it: "
    hint += "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
    if shards := len(list(donor.folder.glob("model-*-of-*.safetensors"))):
        name, hint = donor.folder / export.INDEX_FILE, f"it belongs to the {shards} shards there"
    require(len(files) > 1 or files[0].exists(), f"{name}: missing; {hint}")
    tensors = export.ShardedTensors(files, convert.NUMPY)
    if _EMBEDDING.removeprefix(_BARE) in tensors:  # saved by AutoModel, without an output layer
        for name in list(tensors):
            tensors[_BARE + name] = tensors.pop(name)
    for name in [name for name in tensors if name.endswith(_UNUSED)]:
        del tensors[name]
    layers = donor.sizes["global_layers"]
    where = f"{donor.folder}: num_hidden_layers={layers}: the files hold {len(tensors)} tensors"
    require(layers <= len(tensors), f"{where}; give the config.json that belongs to them")
    return tensors


def read_embeddings(path: str | Path) -> np.ndarray:
    """The donor's embeddings of tokens, float32[tokens, width]."""
    donor = read_donor(path)
    tensors = open_donor(donor)
    require(_EMBEDDING in tensors, f"{_EMBEDDING}: missing in {path}")
    array = convert.read_tensor(_EMBEDDING, tensors[_EMBEDDING], convert.Float32Cast())
    tensors.verify(export.sum_of_json(donor.fields))
    return array


def _root_mean_square(array: np.ndarray) -> float:
    parts = np.array_split(array, max(1, array.size >> 22))
    return float(
        np.sqrt(sum(float(np.square(p.astype(np.float64)).sum()) for p in parts) / array.size)
    )


def _drawn(config: BLTConfig, seed: int, given: set[str], size: float) -> Params:
    """The parameters that are not given, drawn; patches have a root mean square of about `size`."""
    _, init = define_model(config)

    @jax.jit
    def draw() -> Params:
        return {name: value for name, value in init(seed).items() if name not in given}

    drawn = draw()
    projection = "to_global.kernel"
    if projection in drawn:
        drawn[projection] = drawn[projection] * jnp.float32(size)
    return drawn
