"""Small models in folders, and seeded damage to their files: what `fuzz_files` and its test do."""

import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import bytelm_torch
from bytelm.config import BLTConfig, ByteVocab, EntropyConfig, LFByteConfig, MegabyteConfig
from bytelm.export import INDEX_FILE, sum_of_json
from bytelm_jax.interop import convert, formats
from bytelm_jax.interop import hf_blt as convert_blt
from bytelm_jax.models import abstract_params

_SMALL: Any = {
    "local_dim": 4,
    "encoder_heads": 2,
    "encoder_hidden_dim": 2,
    "decoder_layers": 1,
}
_SMALL |= {"decoder_heads": 2, "decoder_hidden_dim": 2, "global_dim": 8, "global_layers": 1}
_SMALL |= {"global_heads": 2, "global_hidden_dim": 2, "ngram_rows": 5, "ngram_sizes": (3,)}
_TINY: Any = {
    "patch_size": 2,
    "global_dim": 2,
    "local_dim": 4,
    "max_length": 8,
    "global_layers": 1,
}
_TINY |= {"global_heads": 2, "local_layers": 1, "local_heads": 2, "vocab": ByteVocab(size=259)}
_ENTROPY = EntropyConfig(dim=4, layers=1, heads=2, hidden_dim=2)
_SPLINES: Any = {
    "feedforward": "spline",
    "entropy_attention": True,
    "positions": "sinusoidal",
}
MODELS: dict[str, Any] = {
    "megabyte": MegabyteConfig(**_TINY),
    "in_action": MegabyteConfig(variant="in_action", **_TINY),
    "lfbyte": LFByteConfig(embed_dim=4, num_layers=1, adapt_dim=2, rank=1, kernel_length=4),
    "entropy": _ENTROPY,
    "blt": BLTConfig(patcher="entropy", entropy=_ENTROPY, **_SMALL),
    "bytropix": BLTConfig(patcher="histogram", threshold=9.0, **_SPLINES, **_SMALL),
    "hf-blt": BLTConfig(entropy=_ENTROPY, whole_characters=False, patch_budget=1.0, **_SMALL),
}
VALUES = [None, True, -1, 0, 1, 2, 7, 10**6, 2**31, 2**63, 10**30, -0.0, 0.5, 1e308, float("nan")]
VALUES += [float("inf"), "", "x", "\ud800", "\0", "../..", [], [1], [[]], {}, {"a": 1}, "9" * 5000]
_CODES = ["F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "X", "", 3]


def make_folders(root: Path) -> dict[str, Path]:
    """The undamaged folders: exports of both packages, and transformers' layout in two forms."""
    source, folders = np.random.default_rng(0), {}
    for name, config in MODELS.items():
        leaves = abstract_params(config).items()
        params = {k: jnp.asarray(source.standard_normal(v.shape), jnp.float32) for k, v in leaves}
        export = convert_blt.export_hf_blt if name == "hf-blt" else convert.export_model
        export(config, params, folders.setdefault(name, root / name))
    folders["torch"] = root / "torch"
    bytelm_torch.save_pretrained(bytelm_torch.from_pretrained(folders["lfbyte"]), folders["torch"])
    config: Any
    config, params = formats.import_any(folders["hf-blt"])
    names = convert_blt.hf_blt_names(config)
    params = {
        names[n].removesuffix("weight") + n.rpartition(".")[2]: value for n, value in params.items()
    }
    folders["shards"] = _sharded(folders["hf-blt"], params)
    folders["export-shards"] = _sharded(
        folders["entropy"], formats.import_any(folders["entropy"])[1]
    )
    return folders


def _sharded(source: Path, params: Any) -> Path:
    """A folder with `source` in two shards; `params` are what it holds, by the names there."""
    folder = source.with_name(f"{source.name}-shards")
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    index, config_sum = {}, sum_of_json(json.loads((folder / "config.json").read_text()))
    for part in range(2):
        file = f"model-{part + 1}-of-2.safetensors"
        held = {name: params[name] for name in sorted(params) if hash_of(name) % 2 == part}
        index |= dict.fromkeys(convert.in_torch_layout(held), file)
        with open(folder / file, "wb") as sink:
            convert.write_params(held, config_sum, sink)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    return folder


def hash_of(name: str) -> int:
    """The same in every process."""
    return sum(name.encode())


# ---- damage ---------------------------------------------------------------------------------


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bits flipped, cut short, a piece left out, doubled, put in, or overwritten."""
    at, width = draw.randrange(len(data) + 1), draw.choice([1, 2, 8, 100])
    junk = draw.randbytes(width)
    flipped = bytearray(data)
    flipped[at % len(data)] ^= 1 << draw.randrange(8)
    return draw.choice(
        [bytes(flipped)] * 4
        + [data[:at], data[:at] + data[at + width :], data[:at] + junk + data[at:]]
        + [data[:at] + data[at : at + width] * 2 + data[at + width :], data + junk, b"", junk]
        + [data[:at] + junk + data[at + width :]]
    )


def damage_tree(tree: Any, draw: random.Random, values: list[Any]) -> Any:
    """One value somewhere in a JSON document changed, left out, added or buried."""
    nodes = [tree]
    for node in nodes:
        inside = node.values() if isinstance(node, dict) else node
        nodes += [child for child in inside if isinstance(child, dict | list) and child]
    node = draw.choice(nodes)
    key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
    match draw.randrange(6):
        case 0:
            node.pop(key)
        case 1 if isinstance(node, dict):
            node[draw.choice(["surprise", "", "__class__", "\0", "x" * 10_000])] = node[key]
        case 2:
            for _ in range(draw.choice([1, 50, 500])):
                node[key] = [node[key]]
        case 3 if isinstance(node[key], int | float):
            node[key] = node[key] * draw.choice([-1, 2, 1000]) + draw.choice([-1, 0, 1])
        case _:
            node[key] = draw.choice(values)
    return tree


def damage_json(data: bytes, draw: random.Random, values: list[Any]) -> bytes:
    """A JSON document, damaged as a tree or as bytes."""
    kind = draw.randrange(10)
    if kind < 3:
        return damage_bytes(data, draw)
    if kind == 3:  # twice the same key, another value
        key, value = draw.choice(list(json.loads(data).items()))
        other = draw.choice([value, *values])
        return data.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(other)}}}".encode()
    if kind == 4:
        deep = draw.choice([10, 900, 100_000])
        nested = "[" * deep + "]" * deep
        return draw.choice(
            [nested, '{"a":' * deep, data.decode()[:-2] + f', "extra": {nested}}}']
        ).encode()
    if kind == 5:
        return draw.choice(
            [b"\xff\xfe" + data, data.decode().encode("utf-16"), data + b"\0", b"null"]
        )
    return json.dumps(damage_tree(json.loads(data), draw, values)).encode()


def damage_weights(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file: its bytes, the length in front, or the header."""
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    match draw.randrange(6):
        case 0:
            return damage_bytes(data, draw)
        case 1:  # anywhere in the data: also NaN, infinity
            at = draw.randrange(0, len(body) - 3, 4)
            value = draw.choice(
                [draw.randbytes(4), struct.pack("<f", float("nan")), b"\0\0\x80\x7f"]
            )
            return data[: 8 + size + at] + value + body[at + 4 :]
        case 2:
            length = draw.choice(
                [0, 1, size - 1, size + 1, 2**31, 2**62, 2**64 - 1, len(data), 10**8]
            )
            return length.to_bytes(8, "little") + data[8:]
        case 3:
            header = damage_json(
                header, draw, [*VALUES, *_CODES, [0, 2**62], [-1, 4], [2**40, 2**40]]
            )
        case _:
            header = retyped(json.loads(header), draw)
    return len(header).to_bytes(8, "little") + header + body


def retyped(header: dict[str, Any], draw: random.Random) -> bytes:
    """Another dtype, shape, place or name of one tensor, or two of them exchanged."""
    names = [name for name in header if name != "__metadata__"]
    one, two = draw.sample(names, 2)
    match draw.randrange(6):
        case 0:
            header[one]["dtype"] = draw.choice(_CODES)
        case 1:
            header[one]["shape"] = draw.choice(
                [[2**62, 4], [0], [], [2**32] * 3, header[one]["shape"][::-1]]
            )
        case 2:
            header[one]["data_offsets"] = draw.choice(
                [[0, 2**60], [8, 4], header[two]["data_offsets"]]
            )
        case 3:
            header[one], header[two] = header[two], header[one]
        case 4:
            header[one + draw.choice([".", "x", "\0", "/../.."])] = header.pop(one)
        case 5:
            header.pop("__metadata__")
            header.pop(one)
    return json.dumps(header).encode()


def damage_folder(folder: Path, draw: random.Random) -> str:
    """Damages one file of `folder`; says what was done."""
    file = draw.choice(sorted(folder.iterdir()))
    if draw.randrange(25) == 0:  # no file, or none of this folder's
        outside, kind = (
            folder.parent / "outside",
            draw.choice(["pipe", "folder", "device", "loop", "gone"]),
        )
        shutil.copy(file, outside)
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
        elif kind != "gone":
            file.symlink_to({"device": "/dev/zero", "loop": file.name}[kind])
        return f"{file.name}: {kind}"
    data = file.read_bytes()
    if file.name == INDEX_FILE:
        paths = ["../outside", "/etc/passwd", "a/../model-1-of-2.safetensors", "", ".", "model\0"]
        paths += ["/dev/zero", "missing.safetensors", "link.safetensors", 3, None, ["x"]]
        if draw.randrange(2):
            (folder / "link.safetensors").symlink_to(folder.parent / "outside")
            index = json.loads(data)
            index["weight_map"][draw.choice(list(index["weight_map"]))] = draw.choice(paths)
            file.write_text(json.dumps(index))
            return f"{file.name}: path"
        file.write_bytes(damage_json(data, draw, VALUES))
    elif file.suffix == ".json":
        file.write_bytes(damage_json(data, draw, VALUES))
    else:
        file.write_bytes(damage_weights(data, draw))
    return file.name
