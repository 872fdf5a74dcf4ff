"""Drafts of the next bytes for speculative decoding: from a table of frequent n-grams, which is
made from training data and stored with the run, and from the text so far.

Both draft 8 bytes, of which the model then keeps as many as it would have written itself: a wrong
draft costs time and changes nothing. These are the numpy references of what JAX and PyTorch do on
the device.
"""

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt32

from bytelm.config import require
from bytelm.files import errors_about, replacing, require_plain_file

DRAFT_BYTES = 8
"""Bytes of a draft, and of the text before it that a table is asked with."""

ORDERS = (8, 6, 5, 4, 3, 2)
"""Lengths of the contexts of a table, in bytes, in the order in which they are tried."""

TABLE_FILE = "draft_table.npz"
"""Its name in a run folder or an export."""

LONGEST_MATCH, SHORTEST_MATCH = 16, 3
"""Bytes of the longest and shortest repetition that `ngram_draft` continues."""

_VERSION = 1
_SLOTS = (1 << 8, 1 << 18)
_BLOCK = 1 << 16  # texts that are looked up at once where there are many
_LEAST_COUNT = 2  # a context that was seen once says little, and there are millions of them

# Odd numbers below 2³¹: where there is no uint32, as in PyTorch, int64 holds every product.
HASH, MIX, CHECK = 0x01000193, 0x2C1B3C6D, 0x5BD1E995


class DraftTable(NamedTuple):
    """The most frequent continuations of frequent contexts; R orders (`ORDERS`) of S slots each."""

    keys: UInt32[np.ndarray, "R S"]
    """The check of the context that a slot holds; 0 where it is empty, which no check is."""
    drafts: UInt8[np.ndarray, "R S 8"]
    """The bytes that followed that context most often."""


def context_hash(
    recent: UInt8[np.ndarray, "B 8"],
) -> tuple[UInt32[np.ndarray, "R B"], UInt32[np.ndarray, "R B"]]:
    """Hash and check of the last n of the bytes in each row, for each n of `ORDERS`.

    The low bits of the hash are the slot. All arithmetic is modulo 2³². From the last byte
    backwards, h ← 0x01000193 · h + byte + 1, starting at 0; then the hash is x ⊕ (x ≫ 15), where
    x = 0x2C1B3C6D · (h ⊕ (h ≫ 16)), and the check is (0x5BD1E995 · h) | 1.
    """
    columns = [recent[:, at] for at in range(DRAFT_BYTES)]
    hashes, checks = zip(*(_hash_and_check(columns, order) for order in ORDERS), strict=True)
    return np.stack(hashes), np.stack(checks)


def _hash_and_check(columns: list[np.ndarray], order: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of the last `order` of 8 columns of bytes, which are of equal length."""
    h = np.zeros(len(columns[0]), np.uint32)
    for column in columns[: -order - 1 : -1]:
        h = h * np.uint32(HASH) + column + np.uint32(1)
    x = (h ^ (h >> np.uint32(16))) * np.uint32(MIX)
    return x ^ (x >> np.uint32(15)), (h * np.uint32(CHECK)) | np.uint32(1)


def look_up(
    table: DraftTable, recent: UInt8[np.ndarray, "B 8"]
) -> tuple[UInt8[np.ndarray, "B 8"], Bool[np.ndarray, " B"]]:
    """The draft after the last 8 bytes of each text, and whether the table has one.

    The longest context that the table holds decides; without one the draft is zeros. A text of
    fewer than 8 bytes is filled with zeros in front.
    """
    hashes, checks = context_hash(recent)
    slots = (hashes & np.uint32(table.keys.shape[1] - 1)).astype(np.int64)
    held = np.take_along_axis(table.keys, slots, axis=1) == checks
    found, first = held.any(0), held.argmax(0)
    drafts = table.drafts[first, slots[first, np.arange(len(recent))]]
    return np.where(found[:, None], drafts, np.uint8(0)), found


def bytes_per_round(table: DraftTable, text: bytes) -> float:
    """Mean bytes that a round of speculation would write, if a model wrote `text`.

    Each round writes the drafted bytes up to the first wrong one, and one more. Raises `ValueError`
    for a text of fewer than 17 bytes.
    """
    require(len(text) > 2 * DRAFT_BYTES, f"text: {len(text)} bytes; give at least 17")
    rows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(text, np.uint8), DRAFT_BYTES)
    asked, right = rows[:-DRAFT_BYTES], rows[DRAFT_BYTES:]
    accepted: list[int] = []
    for start in range(0, len(asked), _BLOCK):
        part = slice(start, start + _BLOCK)
        drafts, _ = look_up(table, asked[part])
        accepted += np.cumprod(drafts == right[part], axis=1).sum(1).tolist()
    place = rounds = 0
    while place < len(accepted):
        place += 1 + accepted[place]
        rounds += 1
    return place / rounds


# ---- making a table -----------------------------------------------------------------------------


def build_table(
    chunks: Iterable[bytes], slots: int = 1 << 16, most_bytes: int = 1 << 24
) -> DraftTable:
    """The table of a text, which is the chunks in order, up to `most_bytes` of them.

    `slots` per order is a power of two. Where several contexts share a slot, the most frequent one
    has it. Each order is counted where the text has no longer context of the table, since that is
    where it will be asked; slots that stay empty are filled with what all of the text holds. A
    draft is the most frequent byte after its context, then the most frequent one after both, and so
    on.

    Takes some 60 bytes of memory and half a microsecond for each byte of text. Raises `ValueError`
    for a text in which no context appears twice.
    """
    least, most = _SLOTS
    known = least <= slots <= most and slots & (slots - 1) == 0
    require(known, f"slots={slots}: choose a power of two from {least} to {most}")
    text = _joined(chunks, most_bytes)
    places = max(0, len(text) - 2 * DRAFT_BYTES + 1)
    columns = [text[at : at + places] for at in range(DRAFT_BYTES)]
    keys = np.zeros((len(ORDERS), slots), np.uint32)
    drafts = np.zeros((len(ORDERS), slots, DRAFT_BYTES), np.uint8)
    left = np.arange(places)
    for row, order in enumerate(ORDERS):
        hashes, checks = _hash_and_check(columns, order)
        slot = (hashes & np.uint32(slots - 1)).astype(np.int64)
        for part in (left, None):
            chosen = np.flatnonzero(keys[row, slot] == 0) if part is None else part
            new = _most_frequent(slot[chosen], checks[chosen], slots)
            chosen = chosen[new[slot[chosen]] == checks[chosen]]
            filled = np.flatnonzero(new)
            keys[row, filled] = new[filled]
            rank = np.searchsorted(filled, slot[chosen])
            drafts[row, filled] = _continuations(text, chosen + DRAFT_BYTES, rank, len(filled))
        left = left[keys[row, slot[left]] != checks[left]]
    require(bool(keys.any()), f"data: {len(text)} bytes repeat nothing; give more text")
    return DraftTable(keys, drafts)


def _joined(chunks: Iterable[bytes], most_bytes: int) -> UInt8[np.ndarray, " bytes"]:
    text = bytearray()
    for chunk in chunks:
        text += chunk[: most_bytes - len(text)]
        if len(text) == most_bytes:
            break
    return np.frombuffer(bytes(text), np.uint8)


def _most_frequent(
    slot: Int64[np.ndarray, " N"], check: UInt32[np.ndarray, " N"], slots: int
) -> UInt32[np.ndarray, " S"]:
    """The check that appears most often in each slot; 0 where none appears twice."""
    both = np.sort((slot.astype(np.uint64) << np.uint64(32)) | check)
    starts = np.flatnonzero(np.diff(both, prepend=np.uint64(2**64 - 1)))
    counts = np.diff(starts, append=len(both))
    repeated = counts >= _LEAST_COUNT
    contexts, counts = both[starts[repeated]], counts[repeated]
    owner = (contexts >> np.uint64(32)).astype(np.int64)
    keys = np.zeros(slots, np.uint32)
    if len(owner):
        firsts = np.flatnonzero(np.diff(owner, prepend=-1))
        ranked = (counts << 32) | np.arange(len(owner))
        best = np.maximum.reduceat(ranked, firsts) & (2**32 - 1)
        keys[owner[firsts]] = (contexts[best] & np.uint64(2**32 - 1)).astype(np.uint32)
    return keys


def _continuations(
    text: UInt8[np.ndarray, " bytes"],
    places: Int64[np.ndarray, " N"],
    context: Int64[np.ndarray, " N"],
    contexts: int,
) -> UInt8[np.ndarray, "contexts 8"]:
    """The draft of each of `contexts`, counted over the text at the places where it ends."""
    drafts = np.zeros((contexts, DRAFT_BYTES), np.uint8)
    for at in range(DRAFT_BYTES if contexts else 0):
        byte = text[places + at]
        counts = np.bincount(context * 256 + byte, minlength=contexts * 256)
        drafts[:, at] = counts.reshape(contexts, 256).argmax(1)
        follows = byte == drafts[context, at]
        places, context = places[follows], context[follows]
    return drafts


# ---- its file -----------------------------------------------------------------------------------


def save_table(path: Path, table: DraftTable) -> None:
    """Writes a table, whole or not at all."""
    with replacing(path) as sink:
        orders, version = np.array(ORDERS, np.int32), np.int32(_VERSION)
        keys, drafts = table
        np.savez_compressed(sink, version=version, orders=orders, keys=keys, drafts=drafts)


_UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError,
    MemoryError,
)  # fmt: skip
"""What numpy and zipfile raise for damaged files."""


def load_table(path: Path) -> DraftTable:
    """The table in a file; raises `ValueError` for any other file, in one line that names it."""
    with errors_about(path, "make it by `bytelm draft-table`"):
        require_plain_file(path)
        try:
            stored = _read_arrays(path)
        except _UNREADABLE:
            stored = {}
        hint = "make it again by `bytelm draft-table`"
        require(set(stored) == {"version", "orders", *DraftTable._fields}, f"is no table; {hint}")
        same = stored["version"].shape == () and stored["version"] == _VERSION
        same = same and tuple(stored["orders"].ravel().tolist()) == ORDERS
        require(bool(same), f"was made by another version of bytelm; {hint}")
        keys, drafts = stored["keys"], stored["drafts"]
        slots = keys.shape[-1] if keys.ndim else 0
        shapes = (keys.shape, drafts.shape)
        fits = shapes == ((len(ORDERS), slots), (len(ORDERS), slots, DRAFT_BYTES))
        fits = fits and (keys.dtype, drafts.dtype) == (np.uint32, np.uint8)
        fits = fits and _SLOTS[0] <= slots <= _SLOTS[1] and slots & (slots - 1) == 0
        require(fits, f"is damaged (shapes {keys.shape} and {drafts.shape}); {hint}")
        return DraftTable(keys, drafts)


def _read_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a file; of one that would unpack to more than the largest table, none."""
    with zipfile.ZipFile(path) as archive:
        size = sum(each.file_size for each in archive.infolist())
    most = len(ORDERS) * _SLOTS[1] * (4 + DRAFT_BYTES) + 2**16
    if size > most:
        return {}
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


# ---- from the text so far -----------------------------------------------------------------------


def ngram_draft(text: UInt8[np.ndarray, " L"], count: int) -> UInt8[np.ndarray, " 8"]:
    """What followed the last bytes of `text[:count]` the last time that they appeared.

    The longest ending of 3 to 16 bytes that appears before counts, and of several places the last.
    A continuation that runs past the end goes on with its own first bytes: after `abcabc` comes
    `abcabcab`. Zeros if nothing was repeated.
    """
    ends = np.arange(1, count)  # a match ends before this byte
    same, length = np.ones(len(ends), bool), np.zeros(len(ends), np.int64)
    for back in range(1, min(LONGEST_MATCH, count - 1) + 1):
        at = ends - back
        same &= (at >= 0) & (text[np.maximum(at, 0)] == text[count - back])
        length += same
    if not len(ends) or length.max() < SHORTEST_MATCH:
        return np.zeros(DRAFT_BYTES, np.uint8)
    start = int(ends[np.flatnonzero(length == length.max())[-1]])
    return text[start + np.arange(DRAFT_BYTES) % (count - start)]
