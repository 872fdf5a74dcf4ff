"""A model as a program that runs without this library, by `torch.export` and in ONNX, and in int8.

    save_program(model, "model.pt2", 512)
    logits = torch.export.load("model.pt2").module()(ids)

A program takes ids int64 [B, T] and gives logits float32 [B, T, V], for any B. T is of the lengths
that take the same path through the model's code as the one that the program is made with, and of
MEGABYTE a multiple of its patch, from three patches on. A text is padded behind to such a length,
which changes no logit before; other lengths are refused by the program itself.
"""

import copy
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bytelm.config import require
from bytelm.files import one_line, replacing

_ROWS = 3  # of the example: what is 1 there may be taken for a constant
_PATCHES = 3  # at least: code for fewer patches broadcasts
_MOST = 1 << 16  # bytes of the longest text of a program, where the model sets no limit


def export_program(model: Any, length: int) -> ExportedProgram:
    """The program for texts of about `length` bytes, with dynamic batch and length.

    It is compared with the model at other sizes before it is returned. Raises `ValueError` for a
    length that the model does not read, and for a model that torch can export for a single length
    only, with torch's reason.
    """
    patch = model.round_length
    longest, least = model.config.longest_input or _MOST, max(4, (_PATCHES + 1) * patch)
    fits = least <= length <= longest
    require(fits, f"length={length}: must be from {least} to {longest} for a program of this model")
    whole = length // patch * patch
    size: Any = Dim.DYNAMIC
    if patch > 1:
        size = patch * Dim("patches", min=_PATCHES, max=longest // patch)
    shapes = ({0: Dim.DYNAMIC, 1: size},)
    with _evaluating(model):
        try:
            example = (_example(model, _ROWS, whole),)
            program = torch.export.export(model, example, dynamic_shapes=shapes)
            _compare(program, model, whole - patch)
        except Exception as error:  # of many types, some of them torch's own
            what = f"{model.config.architecture}: torch.export fixes its length with these settings"
            raise ValueError(f"{what} ({one_line(error, 240)})") from error
    return program


def save_program(model: Any, path: str | Path, length: int) -> None:
    """Writes `export_program(model, length)` for `torch.export.load`.

    Raises `ValueError` as that does, and for a program that torch can run and not write.
    """
    program = export_program(model, length)
    try:
        with replacing(Path(path)) as sink:
            torch.export.save(program, sink)
    except OSError:
        raise
    except Exception as error:  # torch's are its own
        what = f"{model.config.architecture}: torch.export cannot write its program"
        raise ValueError(f"{what} ({one_line(error, 200)})") from error


def export_onnx(model: Any, path: str | Path, length: int) -> None:
    """Writes `export_program(model, length)` in ONNX: input `ids`, output `logits`.

    Weights stand in the file, or beside it in PATH.data if they are large. Raises `ValueError` as
    that does, for an operation that ONNX lacks, and where onnx and onnxscript are not installed.
    """
    for name in ("onnx", "onnxscript"):
        _require_installed(name, "onnx")
    program = export_program(model, length)
    try:
        made: Any = torch.onnx.export(
            program, input_names=["ids"], output_names=["logits"], dynamo=True, verbose=False
        )
    except Exception as error:
        what = f"{model.config.architecture} with these settings has no ONNX program"
        raise ValueError(f"{what}: {one_line(error.__cause__ or error, 240)}") from error
    made.save(str(path))


def quantize_int8(model: Any) -> Any:
    """A copy of the model whose linear layers multiply in int8, for inference on a CPU or GPU.

    By torchao: weights are rounded once, a row at a time, and activations as they come, a position
    at a time. The last layer, whose logits are float32 at least, and what is no plain linear layer
    keep their precision. Raises `ValueError` for a model without plain linear layers, for one that
    uses them in a way that torchao does not know, and where torchao is not installed.
    """
    _require_installed("torchao", "int8")
    # By name, since type checkers look for what is written as an import and few have it.
    torchao: Any = importlib.import_module("torchao.quantization")
    made = copy.deepcopy(model).eval().requires_grad_(False)

    def is_plain(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear

    found = any(is_plain(module, name) for name, module in made.named_modules())
    require(found, f"{model.config.architecture}: has no plain linear layers to round to int8")
    torchao.quantize_(made, torchao.Int8DynamicActivationInt8WeightConfig(), is_plain)
    try:
        with torch.inference_mode():
            made(_example(made, 1, made.round_length))
    except NotImplementedError as error:
        what = f"{model.config.architecture}: torchao has no int8 for what it computes"
        raise ValueError(f"{what} ({one_line(error, 160)})") from error
    return made


def _require_installed(name: str, extra: str) -> None:
    known = importlib.util.find_spec(name) is not None
    require(
        known, f"{name}: not installed; install the extra {extra}: pip install 'bytelm[{extra}]'"
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients within this context."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _example(model: Any, rows: int, length: int) -> Int[Tensor, "B T"]:
    vocab = model.config.vocab
    device = next(model.parameters()).device
    return vocab.offset + torch.arange(rows * length, device=device).reshape(rows, length) % 256


def _compare(program: ExportedProgram, model: Any, length: int) -> None:
    """Raises an error where the program refuses another size than its own, or differs there."""
    run = program.module()
    for rows in (1, 2):
        ids = _example(model, rows, length)
        torch.testing.assert_close(run(ids), model(ids), rtol=1e-5, atol=1e-5)
