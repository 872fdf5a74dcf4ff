"""Parameters to files and back. The one place that knows a transpose.

An export is a folder of two files, the contract with `bytelm_torch` and with everybody else:

    model.safetensors   every parameter by the name and in the layout of the PyTorch twin
    config.json         the model configuration as `to_dict` gives it, and beside its fields
                        `library` ("bytelm"), `format_version` (1) and, where there is something
                        to say, `extra`, an object that loading ignores

Conversion knows kinds of leaves, never models, and is strict both ways: a tensor that is missing,
unexpected, of another shape or not floating point raises `ValueError`, and so does one that holds
NaN or infinity, in a file that is read or to be written. Values keep their dtype and every bit,
unless the caller gives a `Cast`. The metadata of model.safetensors hold SHA-256 sums of the tensors
and of config.json but for `extra`; loading compares them, where a file has them: other programs
leave them out.
`bytelm_torch/interop/export.py` writes and reads the same two files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from bytelm.config import ModelConfig, model_from_dict, require, to_dict
from bytelm.leaves import leaf_kind
from bytelm_jax.kernels.dtypes import array_bytes
from bytelm_jax.models import Params, abstract_params

LIBRARY, FORMAT_VERSION = "bytelm", 1
_TENSOR_SUM, _CONFIG_SUM = "sha256", "sha256_config"
_JSON_LIMIT = 2**24
"""Bytes of the largest JSON file that is read: an index of 100,000 tensors is smaller."""

MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"

_FLOATS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""The dtypes that a parameter may have: name → code in a safetensors file."""

Cast = Callable[[str, np.ndarray], np.ndarray]
"""`cast(name, array)`: applied to each tensor of a file, which calls it `name`, as it is read."""


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


class Float32Cast:
    """A `Cast` to float32, the dtype of every parameter of a run, that keeps account of rounding.

    float16 and bfloat16 fit exactly. `rounding` is the largest relative error of what was float64,
    in the tensor `rounded`; a value below float32's normal range counts as the least one in it.
    Raises `ValueError` for a number that is too large for float32.
    """

    def __init__(self) -> None:
        self.rounding, self.rounded = 0.0, ""

    def __call__(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array in float32: itself where it is that already."""
        with np.errstate(over="ignore"):  # refused below, by name
            made = array.astype(np.float32, copy=False)
        if array.dtype == np.float64:
            for given, kept in zip(_in_parts(array), _in_parts(made), strict=True):
                self._compare(name, given, kept)
        return made

    def _compare(self, name: str, given: np.ndarray, kept: np.ndarray) -> None:
        large = given[np.isinf(kept) & np.isfinite(given)]
        if large.size:
            raise ValueError(f"{name}: holds {large[0]:g}, too large for float32")
        with np.errstate(invalid="ignore"):  # infinite weights are refused where they are read
            errors = np.abs(given - kept) / np.maximum(np.abs(given), np.finfo(np.float32).tiny)
        worst = float(np.fmax.reduce(errors, axis=None, initial=0.0))
        if worst > self.rounding:
            self.rounding, self.rounded = worst, name


class _Tensor(NamedTuple):
    """A tensor in a file or in memory, looked at before it is read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def _in_memory(value: Any) -> _Tensor:
    return _Tensor(value.shape, value.dtype.name, lambda: np.asarray(value))


def _torch_name(name: str) -> str:
    module, dot, _ = name.rpartition(".")
    return module + dot + leaf_kind(name).torch_name


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if leaf_kind(name).transposed else shape


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    return np.swapaxes(array, -1, -2) if leaf_kind(name).transposed else array


def _torch_array(name: str, value: Any) -> np.ndarray:
    return np.array(_turned(name, np.asarray(value)), order="C")


def _assemble(
    tensors: Mapping[str, _Tensor],
    config: ModelConfig,
    file_name: Callable[[str], str] = lambda name: name,
    cast: Cast | None = None,
) -> Params:
    """Parameters from tensors that are called `file_name(the twin's name)`, read one by one."""
    leaves = abstract_params(config)
    sources = {name: file_name(_torch_name(name)) for name in leaves}
    expected = {sources[name]: _torch_shape(name, leaf.shape) for name, leaf in leaves.items()}
    _check(tensors, expected)
    return {name: _jax_array(name, source, tensors, cast) for name, source in sources.items()}


def _jax_array(
    name: str, source: str, tensors: Mapping[str, _Tensor], cast: Cast | None = None
) -> Any:
    # jnp.array, not jnp.asarray: the latter may share memory with its source, a live torch model.
    return jnp.array(_turned(name, _read_tensor(source, tensors[source], cast)))


def _read_tensor(source: str, tensor: _Tensor, cast: Cast | None) -> np.ndarray:
    array = tensor.read() if cast is None else cast(source, tensor.read())
    kept = jnp.asarray(array[:0]).dtype == array.dtype
    hint = "JAX's 64-bit mode is off; set JAX_ENABLE_X64=1 or store float32"
    require(kept, f"{source}: dtype {array.dtype}, and {hint}")
    return array


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
        expected = f"expected {', '.join(_FLOATS)}"
        require(tensor.dtype in _FLOATS, f"{name}: dtype {tensor.dtype}; {expected}")


def is_finite(array: np.ndarray) -> bool:
    """Whether every element is a finite number."""
    return all(bool(np.isfinite(part).all()) for part in _in_parts(array))


def _in_parts(array: np.ndarray) -> list[np.ndarray]:
    """Views that make up an array: what is computed of all of it at once takes as much room."""
    return np.array_split(array, max(1, array.size >> 22)) if array.ndim else [array]


def check_finite(params: Params) -> None:
    """Raises `ValueError` for the first parameter that is not finite."""
    _require_none(name for name, value in params.items() if not is_finite(np.asarray(value)))


def _require_none(non_finite: Iterable[str]) -> None:
    bad = next(iter(non_finite), None)
    require(bad is None, f"{bad}: holds NaN or infinity; take the weights of an earlier checkpoint")


# ---- export ---------------------------------------------------------------------------------


def export_model(
    config: ModelConfig, params: Params, out: str | Path, extra: dict[str, Any] | None = None
) -> None:
    """Writes `out`/model.safetensors and `out`/config.json; makes the folder if need be.

    Both files are written beside their targets, synced and renamed: a failure leaves a previous
    export as it was. Beyond `params` one tensor at a time is in memory. `extra`, anything JSON,
    is stored in config.json. Raises `ValueError` when `params` are not those of `config` or not
    finite, when `out` is a file and when it cannot be written.
    """
    leaves = {name: leaf.shape for name, leaf in abstract_params(config).items()}
    _check({name: _in_memory(value) for name, value in params.items()}, leaves)
    check_finite(params)
    text, config_sum = _config_text(config, extra), _sum_of_json(_described(config))
    _replace_export(Path(out), lambda sink: _write_tensors(sink, params, config_sum), text)


def _described(config: ModelConfig) -> dict[str, Any]:
    return {"library": LIBRARY, "format_version": FORMAT_VERSION, **to_dict(config)}


def _config_text(config: ModelConfig, extra: dict[str, Any] | None) -> bytes:
    fields = _described(config) | ({"extra": extra} if extra else {})
    try:
        return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra: cannot be stored as JSON ({_one_line(error)})") from None


def _write_tensors(sink: BinaryIO, params: Params, config_sum: str) -> None:
    """The safetensors format: length of the header, header, data. Wide dtypes first: aligned.

    The library's writer would hold a second copy of everything, and gives the file mode 0600
    whatever the umask says.
    """
    names = {_torch_name(name): name for name in params}
    widths = {target: array_bytes((), params[name].dtype) for target, name in names.items()}
    ordered = sorted(names, key=lambda target: (-widths[target], target))
    arrays = ((target, _torch_array(names[target], params[names[target]])) for target in ordered)
    sums = {target: _sum_of_array(target, array) for target, array in arrays}
    metadata = {"format": "pt", _TENSOR_SUM: _sum_of_sums(sums), _CONFIG_SUM: config_sum}
    header: dict[str, Any] = {"__metadata__": metadata}
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


def load_export(path: str | Path, cast: Cast | None = None) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of an export, whichever of the two packages wrote it.

    Values keep their dtype and every bit, unless `cast` changes them. Raises `ValueError` when a
    file is missing or damaged, config.json holds a field or version that is not known, the tensors
    are not those of the configuration, or one holds NaN or infinity. One tensor at a time is in
    memory beyond the result.
    """
    config, config_sum = _read_config(Path(path) / CONFIG_FILE)
    with _open_safetensors(Path(path) / MODEL_FILE) as tensors:
        _check_size(tensors, config)
        params = _assemble(tensors, config, cast=cast)
        tensors.verify(config_sum)
        return config, params


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of an export alone; raises `ValueError` as `load_export` does."""
    return _read_config(Path(path) / CONFIG_FILE)[0]


def _read_config(file: Path) -> tuple[ModelConfig, str]:
    """The configuration, and the sum of what says it."""
    with _about(file, "give a folder that `bytelm export` wrote"):
        fields = _read_json(file)
        if isinstance(fields, dict):
            fields = fields.get("bytelm", fields)  # where transformers wrote the file
        require(isinstance(fields, dict), "must hold a JSON object")
        config_sum = _sum_of_json({k: v for k, v in fields.items() if k != "extra"})
        library = fields.pop("library", None)
        require(library == LIBRARY, f"library={library!r}: must be {LIBRARY!r}")
        version = fields.pop("format_version", None)
        why = f"this release reads {FORMAT_VERSION}; update bytelm or export again"
        require(version == FORMAT_VERSION, f"format_version={version!r}: {why}")
        extra = fields.pop("extra", {})
        require(isinstance(extra, dict), f"extra={extra!r}: must be an object")
        return model_from_dict(fields, "config"), config_sum


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
        self._non_finite = list[str]()

    def add(self, name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], Any]) -> None:
        """Adds a tensor that `read` reads."""

        def noted() -> np.ndarray:
            array = read()
            self._non_finite += [] if is_finite(array) else [name]
            if _TENSOR_SUM in self.metadata:
                self.sums[name] = _sum_of_array(name, array)
            return array

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
        self.check_finite()

    def check_finite(self) -> None:
        """Raises `ValueError` for the first tensor that was read and is not finite."""
        _require_none(self._non_finite)


def _sum_of_json(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _sum_of_array(name: str, array: np.ndarray) -> str:
    code, whole = _FLOATS.get(array.dtype.name, array.dtype.name), np.ascontiguousarray(array)
    data = hashlib.sha256(whole.reshape(-1).view(np.uint8).data).hexdigest()
    return f"{name} {code} {list(array.shape)} {data}"


def _sum_of_sums(sums: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(sums[name] for name in sorted(sums)).encode()).hexdigest()


@contextmanager
def _open_safetensors(file: Path) -> Iterator[_Tensors]:
    dtypes = {code: name for name, code in _FLOATS.items()}
    with _about(file, "give a whole safetensors file"):
        _require_plain(file)
        with safe_open(file, framework="np") as opened:
            found = _Tensors(opened.metadata() or {})
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                view = opened.get_slice(name)
                code = str(view.get_dtype())
                read = lambda name=name: opened.get_tensor(name)  # noqa: E731
                found.add(name, tuple(view.get_shape()), dtypes.get(code, code), read)
            yield found


@contextmanager
def _about(path: Path, hint: str) -> Iterator[None]:
    """Turns what reading `path` can raise into a `ValueError` of one line that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or _one_line(error)
        raise ValueError(f"{path}: cannot be read ({why}); {hint}") from None
    except (ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: {_one_line(error)}") from None


def _one_line(error: object, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
