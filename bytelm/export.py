"""The file format of an export: the contract between both packages and with other programs.

An export is a folder of two files:

    model.safetensors   every parameter by the name and in the layout of the PyTorch twin
    config.json         the model configuration as `to_dict` gives it, and besides its fields
                        `library` ("bytelm"), `format_version` (1) and optionally `extra`,
                        an object on which the model does not depend (`model_extra`)

A checkpoint of a run that trains a low-rank adapter has `format_version` 2, and beside these files
the adapter's (`bytelm/lora.py`), which reading merges into the weights.

In place of model.safetensors there may be shards of it and their index, as transformers writes
them: `open_weights` reads both.

Reading is strict: a tensor that is missing, unexpected, of another shape, not floating point or not
finite raises `ValueError`. The metadata of model.safetensors hold SHA-256 sums of the tensors and
of config.json without `extra`; reading compares them if a file has them, since other programs omit
them. Both files are replaced together or not at all. Nothing here ever unpickles.

Arrays belong to the framework in use: an `ArrayLibrary` says how to read one, access its bytes and
test it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from bytelm.config import (
    DataConfig,
    ModelConfig,
    PatchingContract,
    Recipe,
    default_length,
    from_dict,
    model_from_dict,
    require,
    to_dict,
)
from bytelm.files import (
    errors_about,
    one_line,
    read_json,
    require_plain_file,
    sync_folder,
    write_synced,
)
from bytelm.storage.stores import require_local

LIBRARY, FORMAT_VERSION = "bytelm", 1
ADAPTER_FILE = "adapter_config.json"
"""What peft calls the description of an adapter."""

ADAPTED_VERSION = 2
"""The `format_version` of weights to which an adapter beside them belongs (`bytelm/lora.py`)."""
MODEL_FILE, CONFIG_FILE = "model.safetensors", "config.json"
INDEX_FILE = "model.safetensors.index.json"
"""Says which shards there are; counts where there is no `MODEL_FILE`."""

DTYPE_CODES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""The dtypes that a parameter may have: name → code in a safetensors file."""

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of an element of each of them."""

_TENSOR_SUM, _CONFIG_SUM = "sha256", "sha256_config"


class ArrayLibrary(NamedTuple):
    """What the format needs from a framework's arrays."""

    framework: str
    """Its name in the safetensors library: "np" or "pt"."""
    raw: Callable[[Any], memoryview]
    """The bytes of an array in row-major order."""
    is_finite: Callable[[Any], bool]
    """Whether an array holds neither NaN nor infinity."""
    from_bytes: Callable[[np.ndarray, str, tuple[int, ...]], Any]
    """The array of these bytes, of a dtype in `DTYPE_CODES` and a shape."""


class StoredTensor(NamedTuple):
    """A tensor in a file or in memory, whose shape and dtype are known before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """A key of `DTYPE_CODES`, or the code in the file of any other dtype."""
    read: Callable[[], Any]


class StoredTensors(dict[str, StoredTensor]):
    """The tensors of a file by name; reading one adds it to the sums that are checked, if any."""

    def __init__(self, metadata: Mapping[str, str], arrays: ArrayLibrary):
        super().__init__()
        self.metadata, self.sums = metadata, dict[str, str]()
        self._arrays, self._non_finite = arrays, list[str]()

    def add(self, name: str, shape: tuple[int, ...], dtype: str, read: Callable[[], Any]) -> None:
        """Adds a tensor that `read` reads."""

        def read_and_check() -> Any:
            array = read()
            self._non_finite += [] if self._arrays.is_finite(array) else [name]
            if _TENSOR_SUM in self.metadata:
                self.sums[name] = _sum_of_tensor(name, shape, dtype, self._arrays.raw(array))
            return array

        self[name] = StoredTensor(shape, dtype, read_and_check)

    def verify(self, config_sum: str) -> None:
        """Raises `ValueError` unless everything is as written and everything read is finite."""
        stored = self.metadata.get(_TENSOR_SUM)
        good = stored is None or stored == _sum_of_sums(self.sums)
        hint = "give an undamaged copy"
        require(good, f"the tensors differ from those that were written (SHA-256); {hint}")
        good = self.metadata.get(_CONFIG_SUM, config_sum) == config_sum
        hint = f"{hint}, or export again"
        require(
            good, f"{CONFIG_FILE} differs from the one that was written with it (SHA-256); {hint}"
        )
        self.check_finite()

    def check_finite(self) -> None:
        """Raises `ValueError` for the first tensor that was read and is not finite."""
        refuse_non_finite(next(iter(self._non_finite), None))


def refuse_non_finite(bad: str | None) -> None:
    """Raises `ValueError` for the tensor called `bad`, unless that is None."""
    require(bad is None, f"{bad}: holds NaN or infinity; take the weights of an earlier checkpoint")


# ---- config.json ----------------------------------------------------------------------------


def describe(
    config: ModelConfig, extra: Mapping[str, Any] | None = None, adapted: bool = False
) -> dict[str, Any]:
    """The contents of config.json for a model; an empty `extra` is omitted.

    `adapted` says that an adapter lies beside the weights, without which they are another model.
    """
    version = ADAPTED_VERSION if adapted else FORMAT_VERSION
    fields = {"library": LIBRARY, "format_version": version, **to_dict(config)}
    return fields | ({"extra": dict(extra)} if extra else {})


def parse_description(
    fields: Mapping[str, Any], adapted: bool = False
) -> tuple[ModelConfig, dict[str, Any]]:
    """Configuration and `extra` from what `describe` gave; otherwise raises `ValueError`.

    So does an export with an adapter, unless `adapted` says that the caller reads that as well.
    """
    fields = dict(fields)
    library = fields.pop("library", None)
    require(library == LIBRARY, f"library={library!r}: must be {LIBRARY!r}")
    version = fields.pop("format_version", None)
    if version == ADAPTED_VERSION:
        hint = "`bytelm_torch.from_pretrained` merges it into the weights"
        require(adapted, f"format_version={version}: has an adapter beside the weights; {hint}")
    known = version in (FORMAT_VERSION, ADAPTED_VERSION)
    why = f"this release reads {FORMAT_VERSION}; update bytelm or export again"
    require(known, f"format_version={version!r}: {why}")
    extra = fields.pop("extra", {})
    require(isinstance(extra, dict), f"extra={extra!r}: must be an object")
    return model_from_dict(fields, "config"), extra


def config_text(fields: Mapping[str, Any]) -> bytes:
    """The text of config.json; raises `ValueError` if `extra` holds what JSON cannot express."""
    try:
        return (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra: cannot be stored as JSON ({one_line(error)})") from None


class Description(NamedTuple):
    """The contents of the config.json of an export."""

    config: ModelConfig
    extra: dict[str, Any]
    sum: str
    """SHA-256 of the file without `extra`."""
    adapted: bool
    """Whether an adapter lies beside the weights, which belongs to the model."""


def read_description(folder: str | Path) -> Description:
    """Reads `folder`/config.json, including one written by transformers; raises `ValueError`."""
    file = Path(folder) / CONFIG_FILE
    refuse_adapter(file.parent)
    with errors_about(file, "give a folder that `bytelm export` or `save_pretrained` wrote"):
        fields = read_json(file)
        if isinstance(fields, dict):
            fields = fields.get("bytelm", fields)  # written by transformers
        require(isinstance(fields, dict), "must hold a JSON object")
        config_sum = sum_of_json({k: v for k, v in fields.items() if k != "extra"})
        adapted = fields.get("format_version") == ADAPTED_VERSION
        return Description(*parse_description(fields, True), config_sum, adapted)


def refuse_adapter(folder: Path) -> None:
    """Raises `ValueError` for a folder with an adapter of peft and no model beside it."""
    alone = (folder / ADAPTER_FILE).is_file() and not (folder / CONFIG_FILE).exists()
    hint = "give the run that trained it, or its export without --adapter"
    require(not alone, f"{folder}: holds an adapter without its model, for peft; {hint}")


def model_extra(patching: PatchingContract | None, training_length: int) -> dict[str, Any]:
    """What `extra` says of a model: as much as is known."""
    known: dict[str, Any] = {"training_length": training_length} if training_length else {}
    return known | ({"patching": to_dict(patching)} if patching else {})


def training_length_of(extra: Mapping[str, Any]) -> int:
    """The bytes of the windows on which a model was trained; 0 if `extra` does not say."""
    length = extra.get("training_length", 0)
    valid = type(length) is int and length >= 0
    require(valid, f"extra.training_length={length!r}: must be a number of bytes, 0 or more")
    return length


def patching_of(extra: Mapping[str, Any]) -> PatchingContract | None:
    """The patching contract in `extra`; None if there is none."""
    fields = extra.get("patching")
    return None if fields is None else from_dict(PatchingContract, fields, "extra.patching")


def imported_recipe(config: ModelConfig, extra: Mapping[str, Any]) -> Recipe:
    """The recipe of a run that begins with the model of an export, which has this `extra`."""
    data = DataConfig(sequence_length=default_length(config, training_length_of(extra)))
    return Recipe(name="imported", model=config, data=data, patching=patching_of(extra))


# ---- model.safetensors ----------------------------------------------------------------------


@contextmanager
def open_safetensors(file: Path, arrays: ArrayLibrary) -> Iterator[StoredTensors]:
    """The tensors of a safetensors file; errors inside name the file."""
    from safetensors import safe_open

    names = {code: name for name, code in DTYPE_CODES.items()}
    with errors_about(file, "give a complete safetensors file"):
        require_plain_file(file)
        with safe_open(file, framework=arrays.framework) as opened:
            tensors = StoredTensors(opened.metadata() or {}, arrays)
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                view = opened.get_slice(name)
                code = str(view.get_dtype())
                read = lambda name=name: opened.get_tensor(name)  # noqa: E731
                tensors.add(name, tuple(view.get_shape()), names.get(code, code), read)
            yield tensors


def holds_weights(folder: Path) -> bool:
    """Whether `folder` holds the weights of an export, in one file or in shards."""
    return any((folder / name).exists() for name in (MODEL_FILE, INDEX_FILE))


@contextmanager
def open_weights(folder: Path, arrays: ArrayLibrary) -> Iterator[StoredTensors | ShardedTensors]:
    """The tensors of an export, in one file or in shards; errors inside name the file."""
    files = weight_files(folder)
    if files == [folder / MODEL_FILE]:
        with open_safetensors(files[0], arrays) as tensors:
            yield tensors
    else:
        with errors_about(folder / INDEX_FILE, ""):
            yield ShardedTensors(files, arrays)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `MODEL_FILE`, or else the shards in `INDEX_FILE`."""
    index = folder / INDEX_FILE
    if (folder / MODEL_FILE).exists() or not index.exists():
        return [folder / MODEL_FILE]
    with errors_about(index, "download the folder again"):
        fields = read_json(index)
        files = fields.get("weight_map") if isinstance(fields, dict) else None
        if not (isinstance(files, dict) and files):
            raise ValueError("weight_map: must name the tensors")
        names = sorted({str(name) for name in files.values()})
        root = os.path.realpath(folder)
        for name in names:
            plain = (
                Path(name).name == name
                and len(name) < 256
                and "\0" not in name
                and os.path.dirname(os.path.realpath(folder / name)) == root
            )
            why = "must name files of this folder, not links out of it"
            require(plain, f"weight_map: {name!r}: {why}")
        return [folder / name for name in names]


class ShardedTensors(dict[str, StoredTensor]):
    """The tensors of several safetensors files by name; errors name the shard."""

    def __init__(self, files: Iterable[Path], arrays: ArrayLibrary):
        super().__init__()
        self._shards = {file: list_tensors(file, arrays) for file in files}
        for file, shard in self._shards.items():
            with errors_about(file, ""):
                for name, tensor in shard.items():
                    require(name not in self, f"{name}: stands in another shard, too")
                    self[name] = tensor

    def verify(self, config_sum: str) -> None:
        """As `StoredTensors.verify` does, shard by shard."""
        for file, shard in self._shards.items():
            with errors_about(file, ""):
                shard.verify(config_sum)


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file that was checked, and where its data begin, in bytes."""
    with open(file, "rb") as source:
        size = int.from_bytes(source.read(8), "little")
        return json.loads(source.read(size)), 8 + size


def list_tensors(file: Path, arrays: ArrayLibrary) -> StoredTensors:
    """The tensors of a safetensors file, read one at a time without a memory map.

    A map's pages count as memory of this process until the file is closed, so that a table that
    fills its shard would be in memory twice.
    """
    with open_safetensors(file, arrays) as tensors:  # checks the header
        known, metadata = dict(tensors), tensors.metadata
    header, start = read_header(file)

    def read(name: str, tensor: StoredTensor) -> Any:
        begin, end = header[name]["data_offsets"]
        with errors_about(file, "give a complete safetensors file"):
            data = np.fromfile(file, np.uint8, end - begin, offset=start + begin)
            return arrays.from_bytes(data, tensor.dtype, tensor.shape)

    listed = StoredTensors(metadata, arrays)
    for name, tensor in known.items():
        listed.add(name, tensor.shape, tensor.dtype, partial(read, name, tensor))
    return listed


def check_tensors(
    tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `ValueError` for the first tensor that differs from what is expected."""
    for name, shape in shapes.items():
        require(name in tensors, f"{name}: missing; expected shape {shape}, floating point")
    for name, tensor in tensors.items():
        require(name in shapes, f"{name}: unexpected; the configuration has no such tensor")
        expected = f"expected {shapes[name]}"
        require(tensor.shape == shapes[name], f"{name}: shape {tensor.shape}; {expected}")
        expected = f"expected {', '.join(DTYPE_CODES)}"
        require(tensor.dtype in DTYPE_CODES, f"{name}: dtype {tensor.dtype}; {expected}")


def check_size(tensors: Mapping[str, StoredTensor], config: ModelConfig) -> None:
    """Checked before anything is built: a configuration of a million layers would take hours."""
    stored = sum(math.prod(tensor.shape) for tensor in tensors.values())
    described = config.parameter_count()
    require(
        described <= 2 * stored,
        f"holds {stored} parameters, {CONFIG_FILE} describes {described}; export again",
    )


def write_safetensors(
    sink: BinaryIO,
    tensors: Mapping[str, StoredTensor],
    raw: Callable[[Any], memoryview],
    config_sum: str,
) -> None:
    """Writes the safetensors format: length of the header, header, data; wide dtypes first.

    The safetensors library's writer would hold a second copy of everything, refuses tied tensors,
    and gives the file mode 0600 whatever the umask. Here each tensor is read twice, for its sum and
    for its data, and only one at a time is in memory.
    """
    ordered = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))
    sums = {
        name: _sum_of_tensor(
            name, tensors[name].shape, tensors[name].dtype, raw(tensors[name].read())
        )
        for name in ordered
    }
    metadata = {"format": "pt", _TENSOR_SUM: _sum_of_sums(sums), _CONFIG_SUM: config_sum}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in ordered:
        tensor = tensors[name]
        end = offset + math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        header[name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        sink.write(raw(tensors[name].read()))


def replace_export(
    out: Path,
    write_model: Callable[[BinaryIO], None],
    config: bytes,
    beside: Mapping[str, bytes] | None = None,
    names: tuple[str, str] = (MODEL_FILE, CONFIG_FILE),
) -> None:
    """Writes both files or neither: they are written next to their targets and renamed.

    `names` are those of the two; `beside` holds further files by name, which share that fate.
    Raises `ValueError` if `out` is a file and if it cannot be written.
    """
    require_local(out, "out")
    model_file, config_file = names
    texts = {config_file: config, **(beside or {})}
    targets = {name: out / name for name in (model_file, *texts)}
    new = {name: out / f".{name}.{os.getpid()}.partial" for name in targets}
    old = {name: out / f".{name}.{os.getpid()}.old" for name in texts}
    try:
        require(not out.exists() or out.is_dir(), f"{out}: is a file; name a folder")
        for target in targets.values():
            require(not target.is_dir(), f"{target}: is a folder; remove it or write elsewhere")
        out.mkdir(parents=True, exist_ok=True)
        write_synced(new[model_file], write_model)
        for name, text in texts.items():
            write_synced(new[name], lambda sink, text=text: sink.write(text))
            if targets[name].exists():
                previous = targets[name].read_bytes()
                write_synced(old[name], lambda sink, previous=previous: sink.write(previous))
        try:
            for name in (*texts, model_file):
                os.replace(new[name], targets[name])
        except BaseException:
            for name in texts:
                if old[name].exists():
                    os.replace(old[name], targets[name])
                else:
                    targets[name].unlink(missing_ok=True)
            raise
        sync_folder(out)  # the renames themselves must survive a power cut
    except OSError as error:
        why = f"cannot be written ({error.strerror or one_line(error)})"
        raise ValueError(f"{out}: {why}; choose another place or free space") from None
    finally:
        for leftover in (*new.values(), *old.values()):
            with suppress(OSError):
                leftover.unlink()


# ---- sums -----------------------------------------------------------------------------------


def sum_of_json(fields: Any) -> str:
    """SHA-256 of an object, in hexadecimal; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _sum_of_tensor(name: str, shape: tuple[int, ...], dtype: str, raw: memoryview) -> str:
    code, data = DTYPE_CODES.get(dtype, dtype), hashlib.sha256(raw).hexdigest()
    return f"{name} {code} {list(shape)} {data}"


def _sum_of_sums(sums: Mapping[str, str]) -> str:
    return hashlib.sha256("\n".join(sums[name] for name in sorted(sums)).encode()).hexdigest()
