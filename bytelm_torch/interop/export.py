"""A model as a folder of two files: the contract with `bytelm_jax`, which needs no JAX to read.

    model.safetensors   the state dict
    config.json         the model configuration as `to_dict` gives it, and beside its fields
                        `library` ("bytelm"), `format_version` (1) and, where there is something
                        to say, `extra`, an object that loading ignores

Both ways are strict: a tensor that is missing, unexpected, of another shape, not floating point or
not finite raises `ValueError`, and so does what the weights' SHA-256 sums contradict.
Nothing here ever unpickles. `bytelm_jax/interop/convert.py` is the other side.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from bytelm.config import (
    MODEL_CONFIGS,
    ModelConfig,
    PatchingContract,
    from_dict,
    model_from_dict,
    require,
    to_dict,
)
from bytelm.runs import MODEL_FILE, find_export
from bytelm_torch.interop.finite import first_non_finite, is_finite, require_finite
from bytelm_torch.models import build_abstract, name_parameters

LIBRARY, FORMAT_VERSION = "bytelm", 1
_TENSOR_SUM, _CONFIG_SUM = "sha256", "sha256_config"
_JSON_LIMIT = 2**24
"""Bytes of the largest JSON file that is read: an index of 100,000 tensors is smaller."""

CONFIG_FILE = "config.json"

_FLOATS = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""The dtypes that a parameter may have: dtype → code in a safetensors file."""


class _Tensor(NamedTuple):
    """A tensor in a file or in memory, looked at before it is read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


# ---- load -----------------------------------------------------------------------------------


def from_pretrained(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | int = "latest",
) -> Any:
    """The model of an export or of a run folder of this package, in eval mode.

    An export may be the JAX package's; a run folder of that one is refused, since reading it takes
    JAX: `bytelm export` writes what is read here. `checkpoint` chooses from a run folder: "latest",
    "best" (lowest validation loss) or a step.

    `dtype` is that of the parameters, the stored one by default; norms, which are computed in at
    least float32, stay at least float32. `device` is the CPU by default. Leaves torch's random
    generator alone. Raises `ValueError` when a file is missing or damaged, config.json holds a
    field or version that is not known, the tensors are not those of the configuration, or one holds
    NaN or infinity.
    """
    require(
        dtype is None or dtype in _FLOATS,
        f"dtype={dtype}: choose one of {', '.join(map(str, _FLOATS))}",
    )
    target = _usable_device(device)
    folder = find_export(Path(path), checkpoint)
    if folder is None:
        raise ValueError(
            f"{path}: a run folder of JAX, which JAX alone reads; `bytelm export {path} --out DIR` "
            "writes what PyTorch reads, then give DIR"
        )
    config, config_sum, contract = _read_config(folder / CONFIG_FILE)
    with _open_safetensors(folder / MODEL_FILE) as tensors:
        _check_size(tensors, config)
        model = build_abstract(config)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        _check(tensors, shapes)
        # A copy even where nothing is cast: what `read` gives is backed by the file.
        state = {
            name: tensor.read().to(target, _dtype_of(name, dtype), copy=True)
            for name, tensor in tensors.items()
        }
        tensors.verify(config_sum)
    model.patching = contract
    model.load_state_dict(state, strict=True, assign=True)
    name_parameters(model)
    return model.eval()


def _usable_device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError) as error:  # an assertion where torch lacks CUDA
        raise ValueError(f"device={device}: cannot be used ({one_line(error)})") from None


def _dtype_of(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    norm = name.rpartition(".")[0].endswith("norm")
    return torch.promote_types(dtype, torch.float32) if dtype is not None and norm else dtype


def _check_size(tensors: Mapping[str, _Tensor], config: ModelConfig) -> None:
    """Before anything is built: a configuration of a million layers would take hours."""
    held = sum(math.prod(tensor.shape) for tensor in tensors.values())
    described = config.parameter_count()
    require(
        described <= 2 * held,
        f"holds {held} parameters, {CONFIG_FILE} describes {described}; export again",
    )


def _check(tensors: Mapping[str, _Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ValueError` for the first tensor that differs from what is expected."""
    for name, shape in shapes.items():
        require(name in tensors, f"{name}: missing; expected shape {shape}, floating point")
    for name, tensor in tensors.items():
        require(name in shapes, f"{name}: unexpected; the configuration has no such tensor")
        expected = f"expected {shapes[name]}"
        require(tensor.shape == shapes[name], f"{name}: shape {tensor.shape}; {expected}")
        expected = f"expected {', '.join(_FLOATS.values())}"
        require(tensor.dtype in _FLOATS.values(), f"{name}: dtype {tensor.dtype}; {expected}")


def _read_config(file: Path) -> tuple[ModelConfig, str, PatchingContract | None]:
    """The configuration, the sum of what says it, and the patching contract."""
    with about(file, "give a folder that `bytelm export` or `save_pretrained` wrote"):
        fields = _read_json(file)
        if isinstance(fields, dict):
            fields = fields.get("bytelm", fields)  # where transformers wrote the file
        require(isinstance(fields, dict), "must hold a JSON object")
        config_sum = _sum_of_json({k: v for k, v in fields.items() if k != "extra"})
        config, extra = parse_description(fields)
        return config, config_sum, patching_of(extra)


def parse_description(fields: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and `extra` of what `describe` gave; raises `ValueError` for anything else."""
    fields = dict(fields)
    library = fields.pop("library", None)
    require(library == LIBRARY, f"library={library!r}: must be {LIBRARY!r}")
    version = fields.pop("format_version", None)
    why = f"this release reads {FORMAT_VERSION}; update bytelm or export again"
    require(version == FORMAT_VERSION, f"format_version={version!r}: {why}")
    extra = fields.pop("extra", {})
    require(isinstance(extra, dict), f"extra={extra!r}: must be an object")
    return model_from_dict(fields, "config"), extra


def _read_json(file: Path) -> Any:
    """What a JSON file says; what is no plain file, or too large, is not even opened."""
    _require_plain(file)
    size = file.stat().st_size
    require(size <= _JSON_LIMIT, f"{size} bytes; a JSON file of at most {_JSON_LIMIT} was expected")
    return json.loads(file.read_text("utf-8"))


def _require_plain(file: Path) -> None:
    """Reading a pipe would wait for ever."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(0, "not a plain file")


class _Tensors(dict[str, _Tensor]):
    """The tensors of a file by name; each that is read adds to the sums, where the file has one."""

    def __init__(self, metadata: Mapping[str, str]):
        super().__init__()
        self.metadata, self.sums = metadata, dict[str, str]()
        self.non_finite = list[str]()

    def add(self, name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], Any]) -> None:
        """Adds a tensor that `read` reads."""

        def noted() -> Tensor:
            value = read()
            self.non_finite += [] if is_finite(value) else [name]
            if _TENSOR_SUM in self.metadata:
                self.sums[name] = _sum_of_tensor(name, value)
            return value

        self[name] = _Tensor(shape, dtype, noted)

    def verify(self, config_sum: str) -> None:
        """Raises `ValueError` unless all is what was written, and what was read is finite."""
        stored = self.metadata.get(_TENSOR_SUM)
        hint = "give an undamaged copy"
        good = stored is None or stored == _sum_of_sums(self.sums)
        require(good, f"the tensors are not those that were written (SHA-256); {hint}")
        good = self.metadata.get(_CONFIG_SUM, config_sum) == config_sum
        hint = f"{hint}, or export again"
        require(good, f"{CONFIG_FILE} is not what was written with it (SHA-256); {hint}")
        require_finite(next(iter(self.non_finite), None))


def _sum_of_json(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _sum_of_tensor(name: str, value: Tensor) -> str:
    code = _FLOATS.get(value.dtype, str(value.dtype))
    data = hashlib.sha256(_raw(value)).hexdigest()
    return f"{name} {code} {list(value.shape)} {data}"


def _raw(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sum_of_sums(sums: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(sums[name] for name in sorted(sums)).encode()).hexdigest()


@contextmanager
def _open_safetensors(file: Path) -> Iterator[_Tensors]:
    with about(file, "give a whole safetensors file"):
        _require_plain(file)
        with safe_open(file, framework="pt") as opened:
            found = _Tensors(opened.metadata() or {})
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                view = opened.get_slice(name)
                read = lambda name=name: opened.get_tensor(name)  # noqa: E731
                found.add(name, tuple(view.get_shape()), str(view.get_dtype()), read)
            yield found


@contextmanager
def about(path: Path, hint: str) -> Iterator[None]:
    """Turns what reading `path` can raise into a `ValueError` of one line that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{path}: cannot be read ({why}); {hint}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None


def one_line(error: object, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---- save -----------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module, path: str | Path, extra: dict[str, Any] | None = None
) -> None:
    """Writes `path`/model.safetensors and `path`/config.json; makes the folder if need be.

    A model whose attribute `patching` holds its patching contract, as `from_pretrained` sets it,
    gives it to the file, in `extra`; what `extra` says counts first.

    Both files are written beside their targets, synced and renamed: a failure leaves a previous
    export as it was. Raises `ValueError` when `model` is not one of `build_model`, bare, or holds
    NaN or infinity, when `path` is a file and when it cannot be written.
    """
    config = getattr(model, "config", None)
    why = "must be a model of build_model, without wrappers"
    if not isinstance(config, MODEL_CONFIGS):
        raise ValueError(f"model={type(model).__name__}: {why}")
    state = model.state_dict()
    check_state(state, build_abstract(config))
    require_finite(first_non_finite(state))
    fields, config_sum = describe(model, extra), _sum_of_json(describe(config))
    text = (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
    _replace_export(Path(path), lambda sink: _write_tensors(sink, state, config_sum), text)


def check_state(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises `ValueError` for the first tensor that is missing in `model` or `state`, or differs.

    What may differ is the values, and the dtype between those of floating point.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check({name: _in_memory(value) for name, value in state.items()}, shapes)


def describe(model: Any, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What config.json says of a model, or of a configuration alone, and of its patches."""
    contract = getattr(model, "patching", None)
    extra = ({} if contract is None else {"patching": to_dict(contract)}) | (extra or {})
    fields = {"library": LIBRARY, "format_version": FORMAT_VERSION}
    fields |= to_dict(getattr(model, "config", model))
    return fields | ({"extra": extra} if extra else {})


def patching_of(extra: Mapping[str, Any]) -> PatchingContract | None:
    """The patching contract in `extra`, None where there is none."""
    found = extra.get("patching")
    return None if found is None else from_dict(PatchingContract, found, "extra.patching")


def _in_memory(value: Tensor) -> _Tensor:
    return _Tensor(tuple(value.shape), _FLOATS.get(value.dtype, str(value.dtype)), lambda: value)


def _write_tensors(sink: BinaryIO, state: Mapping[str, Tensor], config_sum: str) -> None:
    """The safetensors format: length of the header, header, data. Wide dtypes first: aligned.

    The library's writer refuses tied tensors, and gives the file mode 0600 whatever the umask says.
    """
    ordered = sorted(state, key=lambda name: (-state[name].element_size(), name))
    sums = {name: _sum_of_tensor(name, value) for name, value in state.items()}
    metadata = {"format": "pt", _TENSOR_SUM: _sum_of_sums(sums), _CONFIG_SUM: config_sum}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in ordered:
        value = state[name]
        header[name] = {
            "dtype": _FLOATS[value.dtype],
            "shape": tuple(value.shape),
            "data_offsets": [offset, offset + value.numel() * value.element_size()],
        }
        offset += value.numel() * value.element_size()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        sink.write(_raw(state[name]))


def _replace_export(out: Path, write_model: Callable[[BinaryIO], None], config: bytes) -> None:
    """Puts both files in place, or neither."""
    targets = {name: out / name for name in (MODEL_FILE, CONFIG_FILE)}
    new = {name: out / f".{name}.{os.getpid()}.partial" for name in targets}
    old = out / f".{CONFIG_FILE}.{os.getpid()}.old"
    try:
        require(not out.exists() or out.is_dir(), f"{out}: is a file; name a folder")
        for target in targets.values():
            require(not target.is_dir(), f"{target}: is a folder; remove it or save elsewhere")
        out.mkdir(parents=True, exist_ok=True)
        write_synced(new[MODEL_FILE], write_model)
        write_synced(new[CONFIG_FILE], lambda sink: sink.write(config))
        if targets[CONFIG_FILE].exists():
            previous = targets[CONFIG_FILE].read_bytes()
            write_synced(old, lambda sink: sink.write(previous))
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
        why = f"cannot be written ({error.strerror or one_line(error)})"
        raise ValueError(f"{out}: {why}; choose another place or free space") from None
    finally:
        for leftover in (*new.values(), old):
            with suppress(OSError):
                leftover.unlink()


def write_synced(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with open(path, "wb") as sink:
        write(sink)
        sink.flush()
        os.fsync(sink.fileno())
