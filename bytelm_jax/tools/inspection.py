"""What a model thinks of a text: surprise and entropy of every byte, and where patches start.

Surprise is the code length of the byte that came, in bits, the same as `bytelm eval` adds up;
entropy is the surprise that the model expected there. Both are of its own distribution over the
whole vocabulary. Axis: T bytes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int
from rich.text import Text

from bytelm.config import (
    BLTConfig,
    EntropyConfig,
    LFByteConfig,
    MegabyteConfig,
    ModelConfig,
    Recipe,
)
from bytelm.config.lfbyte import require_prediction
from bytelm.tokenizer import ByteTokenizer
from bytelm_jax.layers.resets import find_segment_starts, position_in_segment
from bytelm_jax.models import Params, define_model, patching
from bytelm_jax.models.entropy import entropy, segment_starts_of, shift_right
from bytelm_jax.training import patch_calibration as patch_contract
from bytelm_jax.training.loss import token_nats

_LEAST = 64  # ids: shorter texts share one program
_ROW = 8  # bytes a row of the table
_SCALE = 8.0  # bits: what any byte costs a model that knows nothing


class Inspection(NamedTuple):
    """What the model thinks of each byte of `data`; bits."""

    data: bytes
    surprise: Float32[np.ndarray, " T"]
    entropy: Float32[np.ndarray, " T"]
    starts: Bool[np.ndarray, " T"] | None
    """Whether a patch starts at each byte; None for a model without patches."""

    @property
    def patches(self) -> int:
        """How many patches the bytes fall into, 0 without patches."""
        return 0 if self.starts is None else int(self.starts.sum())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "bytes": list(self.data),
            "surprise": self.surprise.tolist(),
            "entropy": self.entropy.tolist(),
            "starts": None if self.starts is None else self.starts.tolist(),
        }


Inspector = Callable[[bytes], Inspection]


def make_inspector(recipe: Recipe, params: Params) -> Inspector:
    """The function from bytes to their `Inspection`, compiled for powers of two of bytes.

    It raises `ValueError` for a text longer than the model's `longest_input`. Raises `ValueError`
    for a model that sees the bytes that it would predict.
    """
    config = recipe.model
    require_prediction(config)
    look = _looker(config, _patcher(recipe))
    longest, tokenizer = config.longest_input, ByteTokenizer(config.vocab)

    def inspect(data: bytes) -> Inspection:
        if longest is not None and len(data) > longest:
            raise ValueError(f"text: {len(data)} bytes; this model sees {longest} at most")
        capacity = max(_LEAST, 1 << max(0, len(data) - 1).bit_length())
        capacity = capacity if longest is None else min(capacity, longest)
        ids = np.full((1, capacity), config.vocab.pad_id, np.int32)
        ids[0, : len(data)] = tokenizer.encode(data)
        surprise, expected, starts = (
            None if found is None else np.asarray(found)[0, : len(data)]
            for found in look(params, ids)
        )
        assert surprise is not None and expected is not None
        return Inspection(data, surprise, expected, starts)

    return inspect


def _patcher(recipe: Recipe) -> BLTConfig | None:
    """The patcher that an entropy model's run was calibrated for; a BLT's own."""
    if isinstance(recipe.model, EntropyConfig) and recipe.patching:
        config, _ = patch_contract.as_blt(recipe, {})
        return replace(config, threshold=recipe.patching.threshold)
    return recipe.model if isinstance(recipe.model, BLTConfig) else None


@functools.lru_cache(maxsize=8)
def _looker(
    config: ModelConfig, patcher: BLTConfig | None
) -> Callable[[Params, Int[np.ndarray, "1 T"]], tuple[Any, Any, Any]]:
    bind, _ = define_model(config)

    @jax.jit
    def look(params: Params, ids: Array) -> tuple[Array, Array, Array | None]:
        model = bind(params)
        starts = _starts(model, config, patcher, ids)
        if isinstance(config, BLTConfig):
            logits = model.outputs(ids, starts=starts).logits
        else:
            logits = model(ids)
        logits = logits.astype(jnp.float32)
        bits = token_nats(logits, ids) / math.log(2), entropy(logits) / math.log(2)
        # s_0 is BOS and s_{t+1} is byte t.
        shifted = starts[:, 1:] if starts is not None and patcher is not None else starts
        return *bits, shifted

    return look


def _starts(model: Any, config: ModelConfig, patcher: BLTConfig | None, ids: Array) -> Array | None:
    match config:
        case MegabyteConfig(patch_size=size):
            return (
                position_in_segment(find_segment_starts(ids, config.vocab, config.reset_on)) % size
                == 0
            )
        case EntropyConfig() | BLTConfig() if patcher is not None:
            segment_starts = segment_starts_of(ids, config)
            shifted = shift_right(ids, config.vocab.bos_id, segment_starts)
            if isinstance(config, EntropyConfig):
                entropies = entropy(model.predict(shifted, segment_starts))
            else:
                entropies = model.entropies(shifted, segment_starts)
            return patching.patch_starts(patcher, shifted, entropies, segment_starts)
        case _:
            return None


# ---- for people -------------------------------------------------------------------------------


def describe(recipe: Recipe, found: Inspection) -> str:
    """One line: mean surprise, mean entropy and patches."""
    said = (
        f"{len(found.data):,} bytes: {found.surprise.mean():.3f} bits of surprise a byte, "
        f"{found.entropy.mean():.3f} bits of entropy"
    )
    if found.starts is None:
        why = "no patches in this architecture" if isinstance(recipe.model, LFByteConfig) else ""
        return f"{said}; {why or 'no patches: not calibrated yet'}"
    config = _patcher(recipe)
    how = f"patcher {config.patcher}" if config else "of fixed length"
    if config and config.patcher in ("entropy", "histogram"):
        unit = "nats" if config.patcher == "entropy" else "bits a patch"
        how += f", threshold {config.threshold:.6g} {unit}"
    mean = len(found.data) / found.patches
    return f"{said}; {found.patches:,} patches of {mean:.2f} bytes ({how})"


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
