"""A model as a folder of two files: the contract with `bytelm_jax`, which needs no JAX to read.

The state dict stands in model.safetensors, the configuration in config.json; `bytelm/export.py` is
the format. Both ways are strict: a tensor that is missing, unexpected, of another shape, not
floating point or not finite raises `ValueError`, and so does what the weights' SHA-256 sums
contradict. Nothing here ever unpickles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from bytelm import export
from bytelm.config import MODEL_CONFIGS, require
from bytelm.leaves import torch_name
from bytelm.lora import LoRA, read_adapter, write_adapter
from bytelm.remote.copies import local_copy
from bytelm.runs import read_export
from bytelm_torch.interop.finite import first_non_finite, is_finite
from bytelm_torch.layers.lora import merge
from bytelm_torch.models import adapt, build_abstract, name_parameters

_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
"""The dtypes that a parameter may have."""


def _raw(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _from_bytes(data: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)


TORCH = export.ArrayLibrary("pt", _raw, is_finite, _from_bytes)


# ---- load -----------------------------------------------------------------------------------


def from_pretrained(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | int = "latest",
    compiled: bool = False,
) -> Any:
    """The model of an export or of a run folder of this package, in eval mode.

    `path` may be an address (`gs://`, `s3://`, `hf://`). An export may be the JAX package's; a run
    folder of that one is refused, since reading it takes JAX: `bytelm export` writes what is read
    here. `checkpoint` chooses from a run folder: "latest", "best" (lowest validation loss) or a
    step.

    `dtype` is that of the parameters, the stored one by default; norms, which are computed in at
    least float32, stay at least float32. `device` is the CPU by default. `compiled` has
    `torch.compile` make one graph of `model(ids)` when it is first called. Leaves torch's random
    generator alone. Raises `ValueError` when a file is missing or damaged, config.json holds a
    field or version that is not known, the tensors are not those of the configuration, or one holds
    NaN or infinity, and for a model that cannot be `compiled`.
    """
    require(
        dtype is None or dtype in _DTYPES,
        f"dtype={dtype}: choose one of {', '.join(map(str, _DTYPES))}",
    )
    target = _usable_device(device)
    with local_copy(path, checkpoint) as copy:
        model = read_export(copy, checkpoint, lambda folder: _read_model(folder, dtype, target))
    if model is None:
        raise ValueError(
            f"{path}: a run folder of JAX, which JAX alone reads; `bytelm export {path} --out DIR` "
            "writes what PyTorch reads, then give DIR"
        )
    if compiled:
        problem = model.config.uncompilable
        require(problem is None, f"compiled=True: {problem}")
        model.compile(fullgraph=True)
    return model


def _read_model(folder: Path, dtype: torch.dtype | None, target: torch.device) -> Any:
    def place(name: str, value: Tensor) -> Tensor:
        # A copy even where nothing is cast: what was read is backed by the file.
        return value.to(target, _dtype_of(name, dtype), copy=True)

    described, state, lora = read_state(folder, place)
    model = build_abstract(described.config)
    if lora:
        state = {name: place(name, value) for name, value in merge(state, lora).items()}
    model.patching = export.patching_of(described.extra)
    model.training_length = export.training_length_of(described.extra)
    model.load_state_dict(state, strict=True, assign=True)
    name_parameters(model)
    return model.eval()


def read_state(
    folder: Path, place: Callable[[str, Tensor], Tensor] = lambda name, value: value.clone()
) -> tuple[export.Description, dict[str, Tensor], LoRA | None]:
    """What an export holds: description, state dict, and the adapters that are part of it, if any.

    `place` is applied to each tensor as it is read; where there are adapters, it is left to the
    caller, who may merge them first. Raises `ValueError` as `from_pretrained` does.
    """
    described = export.read_description(folder)
    if described.adapted:
        place = lambda name, value: value.clone()  # noqa: E731
    with export.open_weights(folder, TORCH) as tensors:
        export.check_size(tensors, described.config)
        model = build_abstract(described.config)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        export.check_tensors(tensors, shapes)
        state = {name: place(name, tensor.read()) for name, tensor in tensors.items()}
        tensors.verify(described.sum)
    if not described.adapted:
        return described, state, None

    def read(tensors: export.StoredTensors, lora: LoRA) -> tuple[dict[str, Tensor], LoRA]:
        adapt(model, lora)
        whole = model.state_dict()
        expected = {name: tuple(v.shape) for name, v in whole.items() if name not in state}
        export.check_tensors(tensors, expected)
        return {name: place(name, tensor.read()) for name, tensor in tensors.items()}, lora

    adapter, lora = read_adapter(folder, TORCH, read)
    return described, state | adapter, lora


def _usable_device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.empty(0, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError) as error:  # an assertion where torch lacks CUDA
        raise ValueError(f"device={device}: cannot be used ({export.one_line(error)})") from None


def _dtype_of(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    norm = name.rpartition(".")[0].endswith("norm")
    return torch.promote_types(dtype, torch.float32) if dtype is not None and norm else dtype


# ---- save -----------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module, path: str | Path, extra: dict[str, Any] | None = None
) -> None:
    """Writes `path`/model.safetensors and `path`/config.json; makes the folder if need be.

    A model whose attributes `patching` and `training_length` hold its patching contract and the
    length of its training windows, as `from_pretrained` sets them, gives them to the file, in
    `extra`; what `extra` says counts first. One that has adapters is
    written with these beside its weights, in peft's files.

    Both files are written beside their targets, synced and renamed: a failure leaves a previous
    export as it was. Raises `ValueError` when `model` is not one of `build_model`, bare, or holds
    NaN or infinity, when `path` is a file and when it cannot be written. A model compiled by
    `torch.compile` is saved as the model that it wraps.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile put around it
    config = getattr(model, "config", None)
    why = "must be a model of build_model, without wrappers"
    if not isinstance(config, MODEL_CONFIGS):
        raise ValueError(f"model={type(model).__name__}: {why}")
    state, lora = model.state_dict(), getattr(model, "lora", None)
    template = build_abstract(config)
    if lora is not None:
        adapt(template, lora)
    check_state(state, template)
    export.refuse_non_finite(first_non_finite(state))
    config_sum = export.sum_of_json(export.describe(config, adapted=lora is not None))
    tensors = {name: _in_memory(value) for name, value in state.items()}
    if lora is not None:
        names = [torch_name(name) for name in lora.leaves]
        adapter = {name: tensors.pop(name) for name in names}
        write_adapter(Path(path), lora, adapter, _raw)
    write = partial(_write, tensors, config_sum)
    export.replace_export(Path(path), write, export.config_text(describe(model, extra)))


def _write(tensors: Mapping[str, export.StoredTensor], config_sum: str, sink: BinaryIO) -> None:
    export.write_safetensors(sink, tensors, _raw, config_sum)


def check_state(state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raises `ValueError` for the first tensor that is missing in `model` or `state`, or differs.

    What may differ is the values, and the dtype between those of floating point.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    export.check_tensors({name: _in_memory(value) for name, value in state.items()}, shapes)


def describe(model: Any, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """What config.json says of a model, or of a configuration alone, and of its training."""
    known = getattr(model, "patching", None), getattr(model, "training_length", 0)
    extra = export.model_extra(*known) | (extra or {})
    adapted = getattr(model, "lora", None) is not None
    return export.describe(getattr(model, "config", model), extra, adapted)


def _in_memory(value: Tensor) -> export.StoredTensor:
    dtype = str(value.dtype).removeprefix("torch.")
    return export.StoredTensor(tuple(value.shape), dtype, lambda: value)
