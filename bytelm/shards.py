"""The weights of an export as several safetensors files and their index, as transformers has them.

`bytelm.export.open_weights` reads them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from bytelm.config import require
from bytelm.export import DTYPE_BYTES, INDEX_FILE, MODEL_FILE, StoredTensor, write_safetensors
from bytelm.folders import Writer

_UNITS = {"": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", 1)
}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

WEIGHT_PATTERNS = (MODEL_FILE, INDEX_FILE, "model-*-of-*.safetensors")
"""What `is_weights_file` knows, as shells write it."""


def parse_size(text: str) -> int:
    """Bytes of a size such as 500MB, 5GB or 2GiB; raises `ValueError` for anything else."""
    found = re.fullmatch(r"(\d{1,15})\s*([KMGT]?i?B|)", text)
    size = int(found[1]) * _UNITS.get(found[2], 0) if found else 0
    require(size > 0, f"max_shard_size={text}: give a size, such as 500MB or 5GB")
    return size


def is_weights_file(name: str) -> bool:
    """Whether an export writes weights or their index under this name."""
    return name in (MODEL_FILE, INDEX_FILE) or _SHARD.fullmatch(name) is not None


def weight_writers(
    tensors: Mapping[str, StoredTensor],
    raw: Callable[[Any], memoryview],
    config_sum: str,
    max_bytes: int,
) -> dict[str, Writer]:
    """File name → what writes it: one file, or shards of at most `max_bytes` and their index.

    Tensors keep their order; one that is larger than that has a shard of its own.
    """
    sizes = {name: math.prod(t.shape) * DTYPE_BYTES[t.dtype] for name, t in tensors.items()}
    shards: list[dict[str, StoredTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + sizes[name] > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += sizes[name]

    def writer(shard: Mapping[str, StoredTensor]) -> Writer:
        return partial(_write, shard, raw, config_sum)

    if len(shards) == 1:
        return {MODEL_FILE: writer(shards[0])}
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    places = {t: file for file, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    text = (json.dumps(index, indent=2) + "\n").encode()
    files = {file: writer(shard) for file, shard in zip(names, shards, strict=True)}
    return {**files, INDEX_FILE: lambda sink: sink.write(text)}


def _write(
    shard: Mapping[str, StoredTensor],
    raw: Callable[[Any], memoryview],
    config_sum: str,
    sink: Any,
) -> None:
    write_safetensors(sink, shard, raw, config_sum)
