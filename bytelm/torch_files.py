"""Files of `torch.save`, checked before PyTorch reads them.

`torch.load(..., weights_only=True)` runs no code, but allocates whatever the pickle inside asks
for: 35 bytes can ask for `bytearray(6_000_000_000)`. Here the pickle is read with inert stand-ins
for everything it may refer to, and the tensors that it describes must fit into the file.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.config import require
from bytelm.files import require_plain_file

_PICKLE_LIMIT = 2**26
"""Bytes of the largest pickle that is read: names, shapes and plain values, but no tensor data."""

_MAGIC = 0x1950A86A20F9469CFC6C
"""The first of the pickles in the format before PyTorch 1.6, which is no archive."""

# fmt: off
_OPCODES = frozenset([
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "APPEND", "APPENDS", "SETITEM",
    "SETITEMS", "TUPLE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWFALSE",
    "NEWTRUE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "BININT", "BININT1", "BININT2",
    "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINPERSID", "BINGET",
    "LONG_BINGET", "BINPUT", "LONG_BINPUT",
])
# fmt: on
"""Those that `weights_only` knows, but NEWOBJ, which no plain tensor needs."""

_ITEM_BYTES = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
_ITEM_BYTES |= {"ComplexFloat": 8, "ComplexDouble": 16}


class _Named(NamedTuple):
    """A dtype, layout or class that is only mentioned."""

    name: str


class _Storage(NamedTuple):
    item_bytes: int
    size: int


class _Inert:
    """The result of a call whose result does not matter."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments


def check_torch_file(file: Path, checksums: bool = False) -> bool:
    """Whether `file` is an archive, which can be memory-mapped, and not of the older format.

    Raises `ValueError` unless it holds only tensors that fit into it and plain containers,
    `OSError` if it is no plain file, and what `pickle` and `zipfile` raise for damaged ones.
    `checksums` says to read everything and to compare it with the archive's own sums.
    """
    require_plain_file(file)
    size = file.stat().st_size
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as source:
            first = _load(source, size)
            require(type(first) is int and first == _MAGIC, "no file of torch.save")
            for _ in range(3):  # the version, the machine, and the object
                _load(source, size)
        return False
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        stored = {each.compress_type for each in entries} <= {zipfile.ZIP_STORED}
        require(stored, "the archive is compressed, which torch.save never does")
        pickles = [each for each in entries if each.filename.endswith("data.pkl")]
        require(bool(pickles), "no file of torch.save: data.pkl is missing")
        for each in pickles:
            require(each.file_size <= _PICKLE_LIMIT, f"{each.filename}: too large")
            _load(io.BytesIO(archive.read(each)), size)
        if checksums:
            bad = archive.testzip()
            require(bad is None, f"{bad}: differs from what was written (CRC)")
    return True


def _load(source: Any, size: int) -> Any:
    """The next pickle of `source`, with stand-ins for all objects."""
    begin = source.tell()
    for opcode, _, _ in pickletools.genops(source):
        require(opcode.name in _OPCODES, f"{opcode.name}: not in a pickle of plain tensors")
    end = source.tell()
    require(end - begin <= _PICKLE_LIMIT, "the pickle is too large")
    source.seek(begin)
    return _Reader(io.BytesIO(source.read(end - begin)), size).load()


class _Reader(pickle._Unpickler):
    """Unpickles with stand-ins; `size` is that of the file into which all tensors must fit."""

    def __init__(self, source: io.BytesIO, size: int):
        super().__init__(source, encoding="latin1")
        self._size, self._storages, self._total = size, dict[Any, int](), 0

    def find_class(self, module: str, name: str) -> Any:
        known = _CALLS.get(f"{module}.{name}")
        if known is not None:
            return known
        mentioned = module == "torch" or (module.startswith("torch.") and name.endswith("Storage"))
        require(mentioned, f"{module}.{name}: not in a file of plain tensors")
        return _Named(name)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count, *_ = pid
        known = kind == "storage" and isinstance(storage, _Named) and type(count) is int
        require(known and count >= 0, "refers to something that is no storage")
        item_bytes = _ITEM_BYTES.get(storage.name.removesuffix("Storage"), 1)
        before = self._storages.get(key, 0)
        self._storages[key] = max(before, count * item_bytes)
        self._total += self._storages[key] - before
        why = f"claims {self._total} bytes of tensors, the file has {self._size}"
        require(self._total <= self._size, why)
        return _Storage(item_bytes, count * item_bytes)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Inert:
    """Checks that a tensor lies within its storage: PyTorch would enlarge the storage for it."""
    require(isinstance(storage, _Storage), "a tensor without a storage")
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    needed = 0 if 0 in size else (offset + last + 1) * storage.item_bytes
    require(min(offset, *size, *stride, 0) >= 0, "a tensor with negative sizes")
    require(needed <= storage.size, "a tensor that is larger than what is stored of it")
    return _Inert()


def _subclass(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    return function(*arguments)


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "torch.Size": tuple,
    "torch.device": _Inert,
    "torch.serialization._get_layout": _Inert,
    "builtins.set": _Inert,
    "__builtin__.set": _Inert,
    "builtins.complex": _Inert,
    "__builtin__.complex": _Inert,
    "_codecs.encode": _Inert,
    "torch._tensor._rebuild_from_type_v2": _subclass,
}
_CALLS |= dict.fromkeys(
    [f"torch._utils._rebuild_{n}" for n in ("tensor", "tensor_v2", "tensor_v3", "qtensor")], _tensor
)
_CALLS |= dict.fromkeys(
    [
        f"torch._utils._rebuild_{name}"
        for name in (
            "parameter",
            "parameter_with_state",
            "sparse_tensor",
            "meta_tensor_no_storage",
        )
    ],
    _Inert,
)
