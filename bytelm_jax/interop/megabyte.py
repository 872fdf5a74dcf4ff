"""Weights of the PyTorch MEGABYTE of shjwudp/megabyte, from any file that holds its state dict.

Names and sizes are translated here; layouts and strictness are those of `convert.py`. No code that
a file of `torch.save` contains is ever run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bytelm.config import ByteVocab, MegabyteConfig, require
from bytelm.export import MODEL_FILE, StoredTensors, errors_about, one_line, open_safetensors
from bytelm.torch_files import check_torch_file
from bytelm_jax.interop import convert
from bytelm_jax.models import Params

FOREIGN_FILES = (
    MODEL_FILE,
    "pytorch_model.bin",
)  # written by transformers' save_pretrained


def import_megabyte(
    path: str | Path,
    *,
    pad_id: int = ByteVocab.pad_id,
    eos_id: int = ByteVocab.eos_id,
    cast: convert.Cast | None = None,
) -> tuple[MegabyteConfig, Params]:
    """Configuration and parameters from a state dict of the PyTorch MEGABYTE of shjwudp/megabyte.

    `path` is a .safetensors file, a file of `torch.save` (loaded without running any code in it;
    needs PyTorch), or a folder with `model.safetensors` or `pytorch_model.bin`. All names may carry
    the prefix `inner_model.`, and the dictionary may be nested under `model_state_dict` or
    `state_dict`. The configuration follows from the weights alone, see `megabyte_config`; `pad_id`
    and `eos_id`, which weights do not reveal, are the original's defaults. Values keep their dtype
    and every bit, unless `cast` changes them. Raises `ValueError` for anything else, including a
    tensor that is missing, unknown or not finite.
    """
    with _opened(Path(path)) as (tensors, prefix, shapes):
        config = megabyte_config(shapes, pad_id=pad_id, eos_id=eos_id)
        names = lambda name: prefix + _original_name(name)  # noqa: E731
        params = convert.assemble(tensors, config, names, cast)
        tensors.check_finite()
        return config, params


def read_megabyte_config(path: str | Path) -> MegabyteConfig:
    """The configuration that `import_megabyte` finds; no weights are read."""
    with _opened(Path(path)) as (_, _, shapes):
        return megabyte_config(shapes)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[StoredTensors, str, dict[str, tuple[int, ...]]]]:
    """The tensors of a file or folder, their common prefix, and shapes by name without it."""
    if file.is_dir():
        inside = [file / name for name in FOREIGN_FILES]
        file = next(filter(Path.is_file, inside), inside[0])
    is_safetensors = file.suffix == ".safetensors"
    opened = open_safetensors(file, convert.NUMPY) if is_safetensors else _open_torch_file(file)
    with opened as tensors:
        prefix = "inner_model." if all(name.startswith("inner_model.") for name in tensors) else ""
        yield tensors, prefix, {n.removeprefix(prefix): each.shape for n, each in tensors.items()}


def megabyte_config(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    pad_id: int = ByteVocab.pad_id,
    eos_id: int = ByteVocab.eos_id,
) -> MegabyteConfig:
    """The configuration that the shapes of an original MEGABYTE state dict imply.

    The head width is half the rows of `to_kv`, and the number of heads is the rows of `to_q`
    divided by it; the number of layers is counted. Raises `ValueError` if the shapes contradict
    each other and for a head width other than floor(width / heads), which `MegabyteConfig` cannot
    express.
    """
    paper = shapes.keys().isdisjoint(("to_embed.weight", "to_l_embed.weight"))
    vocab, narrow = _matrix(shapes, "g_embedder.weight" if paper else "to_embed.weight")
    local, _ = _matrix(shapes, "gl_linear.1.weight")
    query = "g_transformer.layers.0.0.to_q.weight"
    _, wide = _matrix(shapes, query)
    require(wide % narrow == 0, f"{query}: width {wide}; expected a multiple of {narrow}")
    global_layers, global_heads = _stack(shapes, "g_transformer", wide)
    local_layers, local_heads = _stack(shapes, "l_transformer", local)
    free = (i for i in range(ByteVocab.bos_id, vocab) if i not in (pad_id, eos_id))
    bos_id = next(free, ByteVocab.bos_id)  # the original has none, so any other id will do
    positions = _matrix(shapes, "g_pos_embedder.weight")[0] if paper else MegabyteConfig.max_length
    return MegabyteConfig(
        variant="paper" if paper else "in_action",
        vocab=ByteVocab(size=vocab, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id),
        patch_size=wide // narrow,
        global_dim=narrow,
        local_dim=local,
        max_length=positions,
        global_layers=global_layers,
        global_heads=global_heads,
        local_layers=local_layers,
        local_heads=local_heads,
    )


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, int]:
    require(name in shapes, f"{name}: missing; expected in a MEGABYTE state dict")
    shape = shapes[name]
    require(len(shape) == 2 and min(shape) > 0, f"{name}: shape {shape}; expected a matrix")
    return shape[0], shape[1]


def _stack(shapes: Mapping[str, tuple[int, ...]], name: str, width: int) -> tuple[int, int]:
    """(layers, heads) of a transformer; one head if there is no layer to count them in."""
    matches = (re.match(rf"{name}\.layers\.(\d+)\.", each) for each in shapes)
    layers = len({match[1] for match in matches if match})
    if layers == 0:
        return 0, 1
    inner, _ = _matrix(shapes, f"{name}.layers.0.0.to_q.weight")
    kv = f"{name}.layers.0.0.to_kv.weight"
    rows, _ = _matrix(shapes, kv)
    head = rows // 2
    fits = rows % 2 == 0 and inner % head == 0
    require(fits, f"{kv}: {rows} rows; expected twice a head width that divides to_q's {inner}")
    heads = inner // head
    require(
        head == width // heads,
        f"{kv}: head width {head}; {heads} heads on width {width} need {width // heads}",
    )
    return layers, heads


_ORIGINAL = {
    "global_embed": "g_embedder",
    "global_position": "g_pos_embedder",
    "local_embed": "l_embedder",
    "embed": "to_embed",
    "embed_to_local": "to_l_embed",
    "global_transformer": "g_transformer",
    "global_to_local": "gl_linear.1",
    "local_transformer": "l_transformer",
}
_ORIGINAL_IN_BLOCK = {
    ".attention.": ".0.",
    ".feedforward.norm.": ".1.0.",
    ".feedforward.up.": ".1.1.",
    ".feedforward.down.": ".1.4.",
}


def _original_name(name: str) -> str:
    """`local_transformer.layers.2.feedforward.up.bias` → `l_transformer.layers.2.1.1.bias`."""
    module, rest = name.split(".", 1)
    for ours, original in _ORIGINAL_IN_BLOCK.items():
        rest = rest.replace(ours, original)
    return f"{_ORIGINAL.get(module, module)}.{rest}"


@contextmanager
def _open_torch_file(file: Path) -> Iterator[StoredTensors]:
    with errors_about(file, "give a file of torch.save or a .safetensors file"):
        loaded = _load_plain(file)
        require(isinstance(loaded, dict), f"holds a {type(loaded).__name__}; expected a state dict")
        inner = (loaded.get(key) for key in ("model_state_dict", "state_dict"))
        loaded = next((each for each in inner if isinstance(each, dict)), loaded)
        tensors = StoredTensors({}, convert.NUMPY)
        for name, value in loaded.items():
            tensors.add(*_torch_tensor(name, value))
        yield tensors


def _load_plain(file: Path) -> Any:
    """What `torch.save` stored, if that is tensors and plain containers; runs no code."""
    try:
        import torch
    except ImportError:
        why = "install it (pip install 'bytelm[torch]') or convert the file to .safetensors"
        raise ValueError(f"reading a file of torch.save needs PyTorch; {why}") from None
    try:
        mapped = check_torch_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of other versions of the format: it may or may not read them
            # Memory-mapped, so that the optimizer's moments stored next to the weights are never
            # read.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # damaged and hostile files make torch raise nearly anything
        why = one_line(error, 160)
        raise ValueError(f"not a plain state dict of torch.save ({why})") from None


def _torch_tensor(
    name: Any, value: Any
) -> tuple[str, tuple[int, ...], str, Callable[[], np.ndarray]]:
    """What `StoredTensors.add` takes of an entry of a state dict."""
    import torch

    require(isinstance(name, str), f"{name!r}: the name of a state dict entry must be a string")
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    # An expanded view can claim any size.
    whole = plain and value.is_cpu
    whole = whole and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    require(whole, f"{name}: {type(value).__name__}; expected a dense tensor stored in full")

    def read() -> np.ndarray:
        tensor = value.detach()
        if tensor.dtype is torch.bfloat16:  # numpy has no such type of its own
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    return name, tuple(value.shape), str(value.dtype).removeprefix("torch."), read
