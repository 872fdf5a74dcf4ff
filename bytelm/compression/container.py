"""The file format of `bytelm compress`: a header of at most 256 bytes, then blocks.

    magic "BLMC"  format version  kind                                4 + 1 + 1 bytes
    streams  bytes per window  bytes of content                       4 + 4 + 8
    digest of the model, of the content (BLAKE2b)                     16 + 16
    length of the machine's description, the description in UTF-8     1 + at most 190
    digest of all of the above                                        8

Numbers are little-endian. A block is the length of what follows its digest (4 bytes), a digest (4
bytes), the bytes per length (1 byte: 1, 2 or 4), the length of each stream's piece in words of 16
bits, and the pieces. Kind 0, "stored", holds the content itself instead and names no machine:
anyone can read it.
"""

import struct
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bytelm.compression.coder import WORD_BYTES
from bytelm.config import require

MAGIC, VERSION = b"BLMC", 1
DIGEST_BYTES = 16
MAX_STREAMS, MAX_WINDOW = 1 << 14, 1 << 20
_FIXED = struct.Struct("<4sBBIIQ16s16sB")
_BLOCK = struct.Struct("<I4s")
_LENGTHS = {1: "<u1", 2: "<u2", 4: "<u4"}
_SUM_BYTES, _HEADER_LIMIT, _VALUE_LIMIT = 8, 256, 36


@dataclass(frozen=True)
class Header:
    """What a compressed file says about itself.

    `machine` is everything that the model's arithmetic depends on, name → value: compressing and
    decompressing are exact inverses only where all of it is equal.
    """

    size: int
    content: bytes
    is_coded: bool = False
    streams: int = 0
    window: int = 0
    model: bytes = bytes(DIGEST_BYTES)
    machine: dict[str, str] = field(default_factory=dict)

    def pack(self) -> bytes:
        """The header's bytes."""
        machine = _join(self.machine)
        kind = int(self.is_coded)
        sizes = self.streams, self.window, self.size
        packed = _FIXED.pack(MAGIC, VERSION, kind, *sizes, self.model, self.content, len(machine))
        packed += machine
        return packed + _sum(packed, _SUM_BYTES)


def _join(machine: dict[str, str]) -> bytes:
    text = "\n".join(f"{name}={value}" for name, value in machine.items()).encode()
    room = _HEADER_LIMIT - _FIXED.size - _SUM_BYTES
    require(len(text) <= room, f"machine: its description has {len(text)} bytes, over {room}")
    return text


def short(value: str) -> str:
    """`value` in at most 36 ASCII characters; what is longer ends in a digest of it all."""
    value = " ".join(value.split()).encode("ascii", "backslashreplace").decode()
    if len(value) <= _VALUE_LIMIT:
        return value
    return f"{value[: _VALUE_LIMIT - 9]}#{_sum(value.encode(), 4).hex()}"


def _sum(data: bytes, size: int) -> bytes:
    return blake2b(data, digest_size=size).digest()


def read_header(source: BinaryIO, path: Path) -> Header:
    """Reads a header; raises `ValueError` that names `path` for anything else."""
    hint = "give a file that `bytelm compress` wrote"
    fixed = source.read(_FIXED.size)
    is_ours = fixed[: len(MAGIC)] == MAGIC
    require(is_ours, f"{path}: not a compressed file of bytelm; {hint}")
    cut = f"{path}: cut short in its header; copy it again"
    require(len(fixed) == _FIXED.size, cut)
    _, version, kind, streams, window, size, model, content, length = _FIXED.unpack(fixed)
    known = version == VERSION
    require(known, f"{path}: format version {version}; this version of bytelm reads {VERSION}")
    text, expected = source.read(length), source.read(_SUM_BYTES)
    require(len(expected) == _SUM_BYTES, cut)
    whole = _sum(fixed + text, _SUM_BYTES) == expected and kind in (0, 1)
    fits = not kind or (1 <= streams <= MAX_STREAMS and 1 <= window <= MAX_WINDOW)
    require(whole and fits, f"{path}: damaged in its header; copy it again")
    pairs = (line.partition("=") for line in text.decode("utf-8", "replace").split("\n") if line)
    machine = {name: value for name, _, value in pairs}
    return Header(size, content, bool(kind), streams, window, model, machine)


def write_block(sink: BinaryIO, pieces: list[bytes]) -> None:
    """Appends a piece of each stream."""
    words = [len(piece) // WORD_BYTES for piece in pieces]
    width = next(w for w in _LENGTHS if max(words) < 256**w)
    lengths = np.array(words, _LENGTHS[width]).tobytes()
    body = bytes([width]) + lengths + b"".join(pieces)
    length = struct.pack("<I", len(body))
    sink.write(_BLOCK.pack(len(body), _sum(length + body, 4)) + body)


def read_block(source: BinaryIO, streams: int, path: Path) -> list[bytes] | None:
    """The next piece of each stream, None at the end; `ValueError` for what was not written so."""
    start = source.read(_BLOCK.size)
    if not start:
        return None
    cut = f"{path}: cut short, or goes on after its end; copy it again"
    require(len(start) == _BLOCK.size, cut)
    length, expected = _BLOCK.unpack(start)
    left = path.stat().st_size - source.tell()
    require(length <= left, f"{path}: cut short, or damaged; copy it again")
    body = source.read(length)
    damaged = f"{path}: damaged; copy it again"
    known = length > 0 and body[0] in _LENGTHS and length > body[0] * streams
    require(_sum(start[:4] + body, 4) == expected and known, damaged)
    words = np.frombuffer(body, _LENGTHS[body[0]], streams, offset=1)
    sizes = words.astype(np.int64) * WORD_BYTES
    ends = 1 + body[0] * streams + np.cumsum(sizes)
    require(int(ends[-1]) == length, damaged)
    return [body[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def check_machine(header: Header, machine: dict[str, str], path: Path) -> None:
    """Raises `ValueError` naming the first thing that differs from where `path` was written."""
    for name in dict.fromkeys([*header.machine, *machine]):
        there, here = header.machine.get(name, "none"), machine.get(name, "none")
        require(
            there == here,
            f"{path}: compressed with {name}={there}, and here it is {here}: the model's "
            "arithmetic may differ; decompress where it is the same",
        )
