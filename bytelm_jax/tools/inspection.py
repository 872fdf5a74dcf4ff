"""`bytelm_jax.inspect`: what a model thinks of a text, and how a terminal shows it."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from rich.text import Text

from bytelm.inspection import Inspection, inspection, padded_ids
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.models.entropy import entropy
from bytelm_jax.training.loss import token_nats

_ROW = 8  # bytes a row of the table
_SCALE = 8.0  # bits: what any byte costs a model that knows nothing


def inspect(model: Any, data: bytes) -> Inspection:
    """Surprise and entropy, in bits, of every byte of a text, and where patches start.

    The patches of an entropy model are those that its run was calibrated for (`model.patching`).
    Programs are compiled for powers of two of bytes. Raises `ValueError` for an empty text, for one
    that is longer than the model's `longest_input`, and for a model that sees the bytes that it
    would predict.
    """
    ids = padded_ids(model.config, data)
    structure, params = split_cached(model)
    return inspection(model, data, *jax.device_get(_look(structure)(params, ids)))


@functools.lru_cache(maxsize=8)
def _look(structure: CompiledModelKey) -> Callable[..., tuple[Any, Any, Any]]:
    @jax.jit
    def look(params: list[Array], ids: Array) -> tuple[Array, Array, Array | None]:
        model = structure.model(params)
        logits = model(ids)
        return token_nats(logits, ids), entropy(logits), model.patch_starts(ids)

    return look


# ---- for people -------------------------------------------------------------------------------


def shade(bits: float) -> tuple[int, int, int]:
    """A light background for a surprise: green at 0 bits, yellow at 4, red from 8 on."""
    part = min(max(bits / _SCALE, 0.0), 1.0)
    red, green = min(1.0, 2 * part), min(1.0, 2 - 2 * part)
    return round(120 + 120 * red), round(120 + 120 * green), 138


def characters(data: bytes) -> Iterator[tuple[int, bytes, str | None]]:
    """`(offset, its bytes, character)` one by one; None for a byte of no valid character."""
    at = 0
    while at < len(data):
        # A character's first byte tells its length; no two lengths both decode.
        for size in range(1, 5):
            piece = data[at : at + size]
            try:
                yield at, piece, piece.decode("utf-8")
            except UnicodeDecodeError:
                continue
            break
        else:
            size = 1
            yield at, data[at : at + 1], None
        at += size


def paint_text(found: Inspection) -> Text:
    """The text on a background by surprise, a bar before each patch.

    A bar inside a character stands before it; what does not print is escaped.
    """
    text = Text()
    for at, piece, character in characters(found.data):
        end = at + len(piece)
        if at and found.starts is not None and found.starts[at:end].any():
            text.append("│", "dim")
        style = _style(float(found.surprise[at:end].max()))
        if character == "\n":
            text.append("⏎", style)
            text.append("\n")
        else:
            shown = character if character is not None and character.isprintable() else None
            text.append(shown or "".join(f"\\x{byte:02x}" for byte in piece), style)
    return text


def paint_table(found: Inspection) -> Text:
    """A row for each patch, or part of one, of at most eight bytes.

    Columns: offset (with a bar where a patch starts), bytes, mean surprise, entropy of each byte.
    """
    wide = 4 * _ROW if any(not 32 <= byte < 127 for byte in found.data) else _ROW + 2
    text = Text(f"{'offset':>8}   {'bytes':{wide}} bits/byte  entropy of each byte\n", "bold")
    for first, end in _rows(found):
        segment_starts = found.starts is not None and found.starts[first]
        text.append(f"{first:>8} {'│' if segment_starts else ' '} ")
        used = 0
        for at in range(first, end):
            byte = found.data[at]
            shown = chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
            text.append(shown, _style(float(found.surprise[at])))
            used += len(shown)
        numbers = " ".join(f"{bits:4.2f}" for bits in found.entropy[first:end])
        text.append(f"{' ' * (wide - used)} {found.surprise[first:end].mean():9.2f}  {numbers}\n")
    return text


def _rows(found: Inspection) -> Iterator[tuple[int, int]]:
    bounds = np.flatnonzero(found.starts).tolist() if found.starts is not None else []
    bounds = [*sorted({0, *bounds}), len(found.data)]
    for first, end in itertools.pairwise(bounds):
        for at in range(first, end, _ROW):
            yield at, min(at + _ROW, end)


def _style(bits: float) -> str:
    red, green, blue = shade(bits)
    return f"black on rgb({red},{green},{blue})"
