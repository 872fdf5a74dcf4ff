"""Parameters to files and back. The one place that knows a transpose.

An export is a folder of two files, the contract with `bytelm_torch` and with everybody else:

    model.safetensors   every parameter by the name and in the layout of the PyTorch twin
    config.json         the model configuration as `to_dict` gives it, and beside its fields
                        `library` ("bytelm"), `format_version` (1) and, where there is something
                        to say, `extra`, an object that loading ignores

Conversion knows kinds of leaves, never models, and is strict both ways: a tensor that is missing,
unexpected, of another shape or not floating point raises `ValueError`. Values keep their dtype and
every bit. `bytelm_torch/checkpoint.py` writes and reads the same two files.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from .config import ByteVocab, MegabyteConfig, ModelConfig, model_from_dict, require, to_dict
from .models import Params, abstract_params

LIBRARY, FORMAT_VERSION = "bytelm", 1
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
FOREIGN_FILES = (MODEL_FILE, "pytorch_model.bin")  # what transformers' save_pretrained writes

_LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
} | {
    name: (name, False)
    for name in ("bias", "kernels", "taps", "gain", "coefficients", "gamma", "beta")
}
"""Kind of leaf in JAX → its name in torch, and whether its last two axes change places."""

_FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""The dtypes that a parameter may have: name → code in a safetensors file."""


# ---- names and layouts ----------------------------------------------------------------------


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """The PyTorch twin's state dict: fresh, writable, contiguous arrays of the same dtypes.

    Raises `ValueError` for a leaf of unknown kind.
    """
    return {_torch_name(name): _torch_array(name, value) for name, value in params.items()}


def from_torch(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """The way back: the parameters of `config` from the PyTorch twin's state dict, copied.

    Raises `ValueError` for a tensor that is missing, unexpected, of another shape or not floating
    point, and for float64 tensors while JAX's 64-bit mode is off.
    """
    return _assemble({name: _in_memory(value) for name, value in tensors.items()}, config)


class _Tensor(NamedTuple):
    """A tensor in a file or in memory, looked at before it is read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def _in_memory(value: Any) -> _Tensor:
    return _Tensor(value.shape, value.dtype.name, lambda: np.asarray(value))


def _kind(name: str) -> tuple[str, bool]:
    leaf = name.rpartition(".")[2]
    require(leaf in _LEAVES, f"{name}: a leaf must be one of {', '.join(_LEAVES)}")
    return _LEAVES[leaf]


def _torch_name(name: str) -> str:
    module, dot, _ = name.rpartition(".")
    return module + dot + _kind(name)[0]


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if _kind(name)[1] else shape


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2) if _kind(name)[1] else array


def _torch_array(name: str, value: Any) -> np.ndarray:
    return np.array(_turned(name, np.asarray(value)), order="C")


def _assemble(
    tensors: Mapping[str, _Tensor],
    config: ModelConfig,
    file_name: Callable[[str], str] = lambda name: name,
) -> Params:
    """Parameters from tensors that are called `file_name(the twin's name)`, read one by one."""
    leaves = abstract_params(config)
    sources = {name: file_name(_torch_name(name)) for name in leaves}
    expected = {sources[name]: _torch_shape(name, leaf.shape) for name, leaf in leaves.items()}
    _check(tensors, expected)
    return {name: _jax_array(name, source, tensors) for name, source in sources.items()}


def _jax_array(name: str, source: str, tensors: Mapping[str, _Tensor]) -> Any:
    # jnp.array, not jnp.asarray: the latter may share memory with its source, a live torch model.
    value = jnp.array(_turned(name, tensors[source].read()))
    require(
        value.dtype.name == tensors[source].dtype,
        f"{source}: dtype {tensors[source].dtype}, and JAX's 64-bit mode is off; "
        "set JAX_ENABLE_X64=1 or store float32",
    )
    return value


def _check(tensors: Mapping[str, _Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ValueError` for the first tensor that differs from what is expected."""
    for name, shape in shapes.items():
        require(name in tensors, f"{name}: missing; expected shape {shape}, floating point")
    for name, tensor in tensors.items():
        require(name in shapes, f"{name}: unexpected; the configuration has no such tensor")
        expected = f"expected {shapes[name]}"
        require(tensor.shape == shapes[name], f"{name}: shape {tensor.shape}; {expected}")
        expected = f"expected {', '.join(_FLOATS)}"
        require(tensor.dtype in _FLOATS, f"{name}: dtype {tensor.dtype}; {expected}")


# ---- export ---------------------------------------------------------------------------------


def export_model(
    config: ModelConfig, params: Params, out: str | Path, extra: dict[str, Any] | None = None
) -> None:
    """Writes `out`/model.safetensors and `out`/config.json; makes the folder if need be.

    Both files are written beside their targets, synced and renamed: a failure leaves a previous
    export as it was. Beyond `params` one tensor at a time is in memory. `extra`, anything JSON,
    is stored in config.json. Raises `ValueError` when `params` are not those of `config`, when
    `out` is a file and when it cannot be written.
    """
    leaves = {name: leaf.shape for name, leaf in abstract_params(config).items()}
    _check({name: _in_memory(value) for name, value in params.items()}, leaves)
    text = _config_text(config, extra)
    _replace_export(Path(out), lambda sink: _write_tensors(sink, params), text)


def _config_text(config: ModelConfig, extra: dict[str, Any] | None) -> bytes:
    fields = {"library": LIBRARY, "format_version": FORMAT_VERSION, **to_dict(config)}
    fields |= {"extra": extra} if extra else {}
    try:
        return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra: cannot be stored as JSON ({_one_line(error)})") from None


def _write_tensors(sink: BinaryIO, params: Params) -> None:
    """The safetensors format: length of the header, header, data. Wide dtypes first: aligned.

    The library's writer would hold a second copy of everything, and gives the file mode 0600
    whatever the umask says.
    """
    names = {_torch_name(name): name for name in params}
    ordered = sorted(names, key=lambda target: (-params[names[target]].dtype.itemsize, target))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for target in ordered:
        value = params[names[target]]
        header[target] = {
            "dtype": _FLOATS[value.dtype.name],
            "shape": _torch_shape(names[target], value.shape),
            "data_offsets": [offset, offset + value.nbytes],
        }
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for target in ordered:
        array = _torch_array(names[target], params[names[target]])
        sink.write(array.reshape(-1).view(np.uint8).data)  # a bfloat16 array has no buffer


def _replace_export(out: Path, write_model: Callable[[BinaryIO], None], config: bytes) -> None:
    """Puts both files in place, or neither."""
    targets = {name: out / name for name in (MODEL_FILE, CONFIG_FILE)}
    new = {name: out / f".{name}.{os.getpid()}.partial" for name in targets}
    old = out / f".{CONFIG_FILE}.{os.getpid()}.old"
    try:
        require(not out.exists() or out.is_dir(), f"{out}: is a file; name a folder")
        for target in targets.values():
            require(not target.is_dir(), f"{target}: is a folder; remove it or export elsewhere")
        out.mkdir(parents=True, exist_ok=True)
        _write_synced(new[MODEL_FILE], write_model)
        _write_synced(new[CONFIG_FILE], lambda sink: sink.write(config))
        if targets[CONFIG_FILE].exists():
            previous = targets[CONFIG_FILE].read_bytes()
            _write_synced(old, lambda sink: sink.write(previous))
        try:
            os.replace(new[CONFIG_FILE], targets[CONFIG_FILE])
            os.replace(new[MODEL_FILE], targets[MODEL_FILE])
        except BaseException:
            if old.exists():
                os.replace(old, targets[CONFIG_FILE])
            else:
                targets[CONFIG_FILE].unlink(missing_ok=True)
            raise
        handle = os.open(out, os.O_RDONLY)  # the renames themselves must survive a power cut
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        why = f"cannot be written ({error.strerror or _one_line(error)})"
        raise ValueError(f"{out}: {why}; choose another place or free space") from None
    finally:
        for leftover in (*new.values(), old):
            with suppress(OSError):
                leftover.unlink()


def _write_synced(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with open(path, "wb") as sink:
        write(sink)
        sink.flush()
        os.fsync(sink.fileno())


# ---- load -----------------------------------------------------------------------------------


def load_export(path: str | Path) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of an export, whichever of the two packages wrote it.

    Raises `ValueError` when a file is missing or damaged, config.json holds a field or version
    that is not known, or the tensors are not those of the configuration. One tensor at a time is
    in memory beyond the result.
    """
    config = _read_config(Path(path) / CONFIG_FILE)
    with _open_safetensors(Path(path) / MODEL_FILE) as tensors:
        # Before anything is built: a configuration of a million layers would take hours.
        held = sum(math.prod(tensor.shape) for tensor in tensors.values())
        described = config.parameter_count()
        require(
            described <= 2 * held,
            f"holds {held} parameters, {CONFIG_FILE} describes {described}; export again",
        )
        return config, _assemble(tensors, config)


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of an export alone; raises `ValueError` as `load_export` does."""
    return _read_config(Path(path) / CONFIG_FILE)


def _read_config(file: Path) -> ModelConfig:
    with _about(file, "give a folder that `bytelm export` wrote"):
        fields = json.loads(file.read_text("utf-8"))
        if isinstance(fields, dict):
            fields = fields.get("bytelm", fields)  # where transformers wrote the file
        require(isinstance(fields, dict), "must hold a JSON object")
        library = fields.pop("library", None)
        require(library == LIBRARY, f"library={library!r}: must be {LIBRARY!r}")
        version = fields.pop("format_version", None)
        why = f"this release reads {FORMAT_VERSION}; update bytelm or export again"
        require(version == FORMAT_VERSION, f"format_version={version!r}: {why}")
        extra = fields.pop("extra", {})
        require(isinstance(extra, dict), f"extra={extra!r}: must be an object")
        return model_from_dict(fields, "config")


@contextmanager
def _open_safetensors(file: Path) -> Iterator[dict[str, _Tensor]]:
    dtypes = {code: name for name, code in _FLOATS.items()}
    with _about(file, "give a whole safetensors file"), safe_open(file, framework="np") as opened:
        found = {}
        for name in opened.keys():  # noqa: SIM118, it is no dictionary
            view = opened.get_slice(name)
            code = str(view.get_dtype())
            read = lambda name=name: opened.get_tensor(name)  # noqa: E731
            found[name] = _Tensor(tuple(view.get_shape()), dtypes.get(code, code), read)
        yield found


@contextmanager
def _about(path: Path, mend: str) -> Iterator[None]:
    """Turns what reading `path` can raise into a `ValueError` of one line that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or _one_line(error)
        raise ValueError(f"{path}: cannot be read ({why}); {mend}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None


def _one_line(error: object, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---- other people's weights -----------------------------------------------------------------


def import_megabyte(
    path: str | Path, *, pad_id: int = ByteVocab.pad_id, eos_id: int = ByteVocab.eos_id
) -> tuple[MegabyteConfig, Params]:
    """Configuration and parameters from a state dict of the PyTorch MEGABYTE of shjwudp/megabyte.

    `path` is a .safetensors file, a file of `torch.save` (loaded without running any code in it;
    needs PyTorch), or a folder with `model.safetensors` or `pytorch_model.bin`. All names may carry
    the prefix `inner_model.`, and the dictionary may stand under `model_state_dict` or
    `state_dict`. The configuration follows from the weights alone, see `megabyte_config`; `pad_id`
    and `eos_id`, which weights do not tell, are the original's defaults. Raises `ValueError` for
    anything else, a missing or unknown tensor included.
    """
    file = Path(path)
    if file.is_dir():
        inside = [file / name for name in FOREIGN_FILES]
        file = next(filter(Path.is_file, inside), inside[0])
    opened = _open_safetensors if file.suffix == ".safetensors" else _open_torch_file
    with opened(file) as tensors:
        prefix = "inner_model." if all(name.startswith("inner_model.") for name in tensors) else ""
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in tensors.items()}
        config = megabyte_config(shapes, pad_id=pad_id, eos_id=eos_id)
        return config, _assemble(tensors, config, lambda name: prefix + _original_name(name))


def megabyte_config(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    pad_id: int = ByteVocab.pad_id,
    eos_id: int = ByteVocab.eos_id,
) -> MegabyteConfig:
    """The configuration that the shapes of an original MEGABYTE state dict imply.

    The head width is half the rows of `to_kv`, the number of heads the rows of `to_q` over it; the
    number of layers is counted. Raises `ValueError` where the shapes contradict each other and for
    a head width other than floor(width / heads), which `MegabyteConfig` cannot express.
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
    """(layers, heads) of a transformer; one head where there is no layer to tell."""
    found = (re.match(rf"{name}\.layers\.(\d+)\.", each) for each in shapes)
    layers = len({match[1] for match in found if match})
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
    for ours, theirs in _ORIGINAL_IN_BLOCK.items():
        rest = rest.replace(ours, theirs)
    return f"{_ORIGINAL.get(module, module)}.{rest}"


@contextmanager
def _open_torch_file(file: Path) -> Iterator[dict[str, _Tensor]]:
    with _about(file, "give a file of torch.save or a .safetensors file"):
        loaded = _load_plain(file)
        require(isinstance(loaded, dict), f"holds a {type(loaded).__name__}; expected a state dict")
        inner = (loaded.get(key) for key in ("model_state_dict", "state_dict"))
        loaded = next((each for each in inner if isinstance(each, dict)), loaded)
        yield {name: _torch_tensor(name, value) for name, value in loaded.items()}


def _load_plain(file: Path) -> Any:
    """What `torch.save` stored, as long as that is tensors and plain containers; runs no code."""
    try:
        import torch
    except ImportError:
        why = "install it (pip install 'bytelm[torch]') or convert the file to .safetensors"
        raise ValueError(f"reading a file of torch.save needs PyTorch; {why}") from None
    mapped = zipfile.is_zipfile(file)  # the format before PyTorch 1.6 is no archive
    try:
        if mapped:
            with zipfile.ZipFile(file) as archive:
                stored = {each.compress_type for each in archive.infolist()} <= {zipfile.ZIP_STORED}
            require(stored, "the archive is compressed, and torch.save never does that")
        # Mapped, so that the optimizer's moments beside the weights are never read.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # damaged and hostile files make torch raise nearly anything
        why = _one_line(error, 160)
        raise ValueError(f"not a plain state dict of torch.save ({why})") from None


def _torch_tensor(name: Any, value: Any) -> _Tensor:
    import torch

    require(isinstance(name, str), f"{name!r}: a name of a state dict must be a string")
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    # An expanded view can pretend to any size.
    whole = plain and value.device.type == "cpu"
    whole = whole and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    require(whole, f"{name}: {type(value).__name__}; expected a dense tensor stored in full")

    def read() -> np.ndarray:
        tensor = value.detach()
        if tensor.dtype is torch.bfloat16:  # numpy has no such type of its own
            return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
        return tensor.numpy()

    return _Tensor(tuple(value.shape), str(value.dtype).removeprefix("torch."), read)
