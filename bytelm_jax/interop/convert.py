"""Parameters to files and back. The one place that knows a transpose.

Conversion knows kinds of leaves, never models, and is strict both ways: a tensor that is missing,
unexpected, of another shape or not floating point raises `ValueError`, and so does one that holds
NaN or infinity, in a file that is read or to be written. Values keep their dtype and every bit,
unless the caller gives a `Cast`. `bytelm/export.py` is the file format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from bytelm.config import ModelConfig, require
from bytelm.export import (
    ArrayLibrary,
    StoredTensor,
    StoredTensors,
    check_size,
    check_tensors,
    config_text,
    describe,
    open_weights,
    read_description,
    refuse_non_finite,
    replace_export,
    sum_of_json,
    write_safetensors,
)
from bytelm.leaves import leaf_kind, torch_name
from bytelm.lora import LoRA, read_adapter, write_adapter
from bytelm_jax.layers.lora import merge
from bytelm_jax.models import Params, abstract_params

Cast = Callable[[str, np.ndarray], np.ndarray]
"""`cast(name, array)`: applied to each tensor of a file, which calls it `name`, as it is read."""


# ---- names and layouts ----------------------------------------------------------------------


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """The PyTorch twin's state dict: fresh, writable, contiguous arrays of the same dtypes.

    Raises `ValueError` for a leaf of unknown kind.
    """
    return {torch_name(name): _torch_array(name, value) for name, value in params.items()}


def from_torch(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> Params:
    """The way back: the parameters of `config` from the PyTorch twin's state dict, copied.

    Raises `ValueError` for a tensor that is missing, unexpected, of another shape or not floating
    point, and for float64 tensors while JAX's 64-bit mode is off.
    """
    return assemble({name: in_memory(value) for name, value in tensors.items()}, config)


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
            cast = array.astype(np.float32, copy=False)
        if array.dtype == np.float64:
            for before, after in zip(_in_parts(array), _in_parts(cast), strict=True):
                self._compare(name, before, after)
        return cast

    def _compare(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        large = before[np.isinf(after) & np.isfinite(before)]
        if large.size:
            raise ValueError(f"{name}: holds {large[0]:g}, too large for float32")
        with np.errstate(invalid="ignore"):  # infinite weights are refused where they are read
            errors = np.abs(before - after) / np.maximum(np.abs(before), np.finfo(np.float32).tiny)
        worst = float(np.fmax.reduce(errors, axis=None, initial=0.0))
        if worst > self.rounding:
            self.rounding, self.rounded = worst, name


def in_memory(value: Any) -> StoredTensor:
    """An array as a tensor of the file format."""
    return StoredTensor(value.shape, value.dtype.name, lambda: np.asarray(value))


def in_torch_layout(params: Params) -> dict[str, StoredTensor]:
    """The parameters as tensors of the PyTorch twin, each laid out when it is read."""

    def tensor(name: str, value: Any) -> StoredTensor:
        shape = torch_shape(name, value.shape)
        return StoredTensor(shape, value.dtype.name, lambda: _torch_array(name, value))

    return {torch_name(name): tensor(name, value) for name, value in params.items()}


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a parameter of this shape has in the PyTorch twin."""
    return (*shape[:-2], shape[-1], shape[-2]) if leaf_kind(name).transposed else shape


def swapped(name: str, array: np.ndarray) -> np.ndarray:
    """A parameter's array between the two layouts, in either direction; a view."""
    return np.swapaxes(array, -1, -2) if leaf_kind(name).transposed else array


def _torch_array(name: str, value: Any) -> np.ndarray:
    return np.array(swapped(name, np.asarray(value)), order="C")


def assemble(
    tensors: Mapping[str, StoredTensor],
    config: ModelConfig,
    file_name: Callable[[str], str] = lambda name: name,
    cast: Cast | None = None,
) -> Params:
    """Parameters from tensors that are called `file_name(the twin's name)`, read one by one."""
    leaves = abstract_params(config)
    sources = {name: file_name(torch_name(name)) for name in leaves}
    expected = {sources[name]: torch_shape(name, leaf.shape) for name, leaf in leaves.items()}
    check_tensors(tensors, expected)
    return {name: _jax_array(name, source, tensors, cast) for name, source in sources.items()}


def _jax_array(
    name: str, source: str, tensors: Mapping[str, StoredTensor], cast: Cast | None = None
) -> Any:
    # jnp.array, not jnp.asarray: the latter may share memory with its source, a live torch model.
    return jnp.array(swapped(name, read_tensor(source, tensors[source], cast)))


def read_tensor(source: str, tensor: StoredTensor, cast: Cast | None) -> np.ndarray:
    """Reads a tensor that its file calls `source`; `ValueError` where JAX would narrow it."""
    array = tensor.read() if cast is None else cast(source, tensor.read())
    unchanged = jnp.asarray(array[:0]).dtype == array.dtype
    hint = "JAX's 64-bit mode is off; set JAX_ENABLE_X64=1 or store float32"
    require(unchanged, f"{source}: dtype {array.dtype}, and {hint}")
    return array


def is_finite(array: np.ndarray) -> bool:
    """Whether every element is a finite number."""
    return all(bool(np.isfinite(part).all()) for part in _in_parts(array))


def _in_parts(array: np.ndarray) -> list[np.ndarray]:
    """Views that make up an array: computing with all of it at once would double its memory."""
    return np.array_split(array, max(1, array.size >> 22)) if array.ndim else [array]


def _raw(array: np.ndarray) -> memoryview:
    # A bfloat16 array has no buffer of its own.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _from_bytes(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return data.view(jnp.dtype(dtype)).reshape(shape)


NUMPY = ArrayLibrary("np", _raw, is_finite, _from_bytes)


def check_finite(params: Params) -> None:
    """Raises `ValueError` for the first parameter that is not finite."""
    bad = (name for name, value in params.items() if not is_finite(np.asarray(value)))
    refuse_non_finite(next(bad, None))


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
    check_params(config, params)
    text, config_sum = config_text(describe(config, extra)), sum_of_json(describe(config))
    replace_export(Path(out), partial(write_params, params, config_sum), text)


def write_params(params: Params, config_sum: str, sink: BinaryIO) -> None:
    """Writes `params` as a safetensors file in the layout of the PyTorch twin."""
    write_safetensors(sink, in_torch_layout(params), _raw, config_sum)


def export_adapter(params: Params, lora: LoRA, out: str | Path) -> None:
    """Writes the adapters among `params` alone, in the files of peft: `bytelm/lora.py`.

    Raises `ValueError` as `export_model` does.
    """
    leaves = {name: params[name] for name in lora.leaves}
    check_finite(leaves)
    write_adapter(Path(out), lora, in_torch_layout(leaves), _raw)


def check_params(config: ModelConfig, params: Params) -> None:
    """Raises `ValueError` when `params` are not those of `config` or not finite."""
    leaves = {name: leaf.shape for name, leaf in abstract_params(config).items()}
    check_tensors({name: in_memory(value) for name, value in params.items()}, leaves)
    check_finite(params)


# ---- load -----------------------------------------------------------------------------------


def load_export(path: str | Path, cast: Cast | None = None) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of an export, whichever of the two packages wrote it.

    Values keep their dtype and every bit, unless `cast` changes them. Raises `ValueError` when a
    file is missing or damaged, config.json holds a field or version that is not known, the tensors
    are not those of the configuration, or one holds NaN or infinity. One tensor at a time is in
    memory beyond the result. An adapter that is part of the export is merged into the parameters.
    """
    described = read_description(path)
    with open_weights(Path(path), NUMPY) as tensors:
        check_size(tensors, described.config)
        params = assemble(tensors, described.config, cast=cast)
        tensors.verify(described.sum)
    if not described.adapted:
        return described.config, params

    def read(tensors: StoredTensors, lora: LoRA) -> tuple[Params, LoRA]:
        shapes = abstract_params(described.config, lora)
        leaves = {name: torch_name(name) for name in lora.leaves}
        expected = {leaves[name]: torch_shape(name, shapes[name].shape) for name in leaves}
        check_tensors(tensors, expected)
        return {name: _jax_array(name, leaves[name], tensors, cast) for name in leaves}, lora

    adapter, lora = read_adapter(Path(path), NUMPY, read)
    return described.config, merge(params | adapter, lora)
