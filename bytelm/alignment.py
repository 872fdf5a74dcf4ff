"""Text beside the tokens of a token model, from which a byte encoder learns what tokens look like.

A prepared file is a safetensors file with these tensors:

    text        uint8 [bytes]         documents, one after the other
    token       uint16 or uint32 [bytes]  where a token ends, its row of `embeddings` plus 1; else 0
                    (of those that end in the same character, the last one)
    embeddings  float32 [rows, width]  of every token that occurs

Its metadata say which row stands for the beginning of a text, and have the SHA-256 sum of all this.
What the stage that trains on such a file is, in either package, stands here as well.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from bytelm.config import Recipe, TrainConfig, require
from bytelm.data.shuffle import shuffled_index
from bytelm.data.sources import expand_paths
from bytelm.export import read_header
from bytelm.files import errors_about, read_json, replacing, require_plain_file, require_replaceable
from bytelm.runs import Outcome, saved_recipe
from bytelm.storage.stores import require_local
from bytelm.trainable import Trainable

TOKENIZER_FILE = "tokenizer.json"
_KIND, _BEGIN, _SUM = "bytelm_alignment", "begin", "sha256"
_KINDS = {"text": ("U8",), "token": ("U16", "U32"), "embeddings": ("F32",)}
"""The tensors of a prepared file and the codes of their dtypes."""

_BATCH = 256  # pieces that are tokenized at once
_PIECE = 1 << 16  # bytes; a longer document is tokenized in pieces
_HELD_OUT = 50  # one window in so many
_EVALUATED = 32  # batches of windows that are held out

_NAME = "aligned"
"""The name of every recipe of the stage."""

_TRAINED = ("encoder.", "to_global.")
"""What the names of the parameters that are trained begin with."""

_KEPT = ("steps", "batch_size", "seed", "devices", "fsdp", "compute_dtype", "log_every")
_KEPT += ("eval_every", "checkpoint_every", "keep_last", "keep_best")
"""Fields of `TrainConfig` that the stage uses; the others have their defaults in its recipe."""


class Prepared(NamedTuple):
    """How much a prepared file holds."""

    bytes: int
    tokens: int
    """Those in the file."""
    rows: int
    skipped: int
    """Pieces without a token, because they are not UTF-8."""
    left_out: int
    """Tokens that end in the same character as the next one: the file has the last of these."""

    def lines(self, out: Path) -> list[str]:
        """What is printed about the file."""
        found, length = list[str](), self.bytes / max(self.tokens, 1)
        if self.skipped:
            pieces = "1 piece of text is" if self.skipped == 1 else f"{self.skipped} pieces are"
            found.append(f"{pieces} not UTF-8 and without tokens")
        found.append(f"wrote {out}: {self.bytes} bytes, {self.tokens} tokens of {length:.2f} bytes")
        if self.left_out:
            many = "1 token" if self.left_out == 1 else f"{self.left_out} tokens"
            found.append(f"left out {many}: of several in one character only the last counts")
        return found


class Aligned(NamedTuple):
    """A prepared file, of which only the embeddings are in memory."""

    text: UInt8[np.ndarray, " bytes"]
    token: np.ndarray
    embeddings: Float32[np.ndarray, "rows width"]
    begin: int
    """The row, plus 1, of the token that begins a text; 0 if there is none."""
    identity: str

    def windows(self, length: int) -> int:
        """How many windows of so many bytes there are."""
        return len(self.text) // length

    def rows(
        self, indices: Iterable[int], length: int, offset: int
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
        """Ids of the bytes of these windows, and the token that ends at each; see `Aligned`."""
        spans = [slice(i * length, (i + 1) * length) for i in indices]
        ids = np.stack([self.text[span] for span in spans]).astype(np.int32) + np.int32(offset)
        return ids, np.stack([self.token[span] for span in spans]).astype(np.int32)

    def training(self, length: int) -> int:
        """How many windows, the first ones, are trained on; the others are held out."""
        count = self.windows(length)
        return count - max(1, count // _HELD_OUT)

    def batch(self, step: int, rows: int, length: int, seed: int) -> list[int]:
        """The windows of step `step`, counted from 0: a function of its arguments alone."""
        count = self.training(length)
        return [shuffled_index(step * rows + i, count, seed) for i in range(rows)]

    def held_out(self, rows: int, length: int) -> list[list[int]]:
        """Batches of windows that are held out, the last of which is filled up by the first."""
        first = self.training(length)
        count = self.windows(length) - first
        batches = range(min(_EVALUATED, math.ceil(count / rows)))
        return [[first + (each * rows + i) % count for i in range(rows)] for each in batches]


# ---- preparation ----------------------------------------------------------------------------


def check_output(out: Path, data: Sequence[str]) -> None:
    """Raises `ValueError` unless `out` can be made, or replaced without loss.

    What may be replaced is a prepared file that is none of the text in `data`, the paths of text.
    """
    above = next(folder for folder in out.absolute().parents if folder.exists())
    require(above.is_dir(), f"--out {out}: {above} is a file, not a folder; name another file")
    if not os.path.lexists(out):
        return
    places = [out.resolve(), out.parent.resolve() / out.name]  # a link and what it leads to
    for path in expand_paths(data):
        inside = any(place.is_relative_to(os.path.realpath(path)) for place in places)
        require(not inside, f"--out {out}: is among the text, --data {path}; name another file")
    require_replaceable(out, f"--out {out}")
    why = "exists, and `bytelm align-data` did not write it; name another file, or delete it"
    require(_is_prepared(out), f"--out {out}: {why}")


def _is_prepared(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            return _KIND in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def prepare(
    documents: Iterable[bytes], tokenizer: Any, embeddings: np.ndarray, begin: int | None, out: Path
) -> Prepared:
    """Writes the prepared file `out` of `documents`, complete or not at all.

    `tokenizer` is one of the tokenizers library, `begin` the id of the token that begins a text.
    Raises `ValueError` for tokens without an embedding, and for text without tokens.
    """
    count, hint = len(embeddings), "give the tokenizer and the config.json that belong to them"
    within = begin is None or 0 <= begin < count
    require(within, f"bos_token_id={begin}: the weights have {count} embeddings; {hint}")
    texts, ends, skipped, ended = list[bytes](), list[np.ndarray](), 0, 0
    for text, found, tokens in _tokenized(documents, tokenizer):
        texts.append(text)
        ends.append(found)
        skipped += tokens is None
        ended += tokens or 0
    text, ids = b"".join(texts), np.concatenate([*ends, np.zeros(0, np.uint32)])
    del texts, ends  # five times the size of the text
    used = np.unique(ids[ids > 0] - 1)
    require(used.size > 0, "data: holds no text in UTF-8 that has tokens; give some")
    if begin is not None:
        used = np.union1d(used, [begin])
    most = int(used[-1])
    why = f"{TOKENIZER_FILE}: has token {most}, and the weights have {count} embeddings"
    require(most < count, f"{why}; {hint}")
    kind = np.uint16 if used.size < 2**16 else np.uint32
    row_of = np.zeros(most + 2, kind)
    row_of[used.astype(np.int64) + 1] = np.arange(1, used.size + 1)
    rows = row_of[ids]
    first = 0 if begin is None else int(np.searchsorted(used, begin)) + 1
    tensors = {"text": np.frombuffer(text, np.uint8), "token": rows}
    tensors["embeddings"] = np.ascontiguousarray(embeddings[used], np.float32)
    metadata = {_KIND: "1", _BEGIN: str(first), _SUM: _sum(tensors, str(first))}
    _write(out, tensors, metadata)
    kept = int((ids > 0).sum())
    return Prepared(len(text), kept, len(used), skipped, ended - kept)


def _tokenized(
    documents: Iterable[bytes], tokenizer: Any
) -> Iterator[tuple[bytes, np.ndarray, int | None]]:
    """Each piece, for each of its bytes the token that ends there plus 1, or 0, and their number.

    Of several tokens that end in the same character, whose bytes they share, the last one stands
    there, and all count. The number is None for what is not UTF-8.
    """
    for batch in _batches(documents):
        texts = [_as_text(document) for document in batch]
        encodings = tokenizer.encode_batch([t or "" for t in texts], add_special_tokens=False)
        for document, text, encoding in zip(batch, texts, encodings, strict=True):
            found, ends = np.zeros(len(document), np.uint32), list[tuple[int, int]]()
            if text:
                # Offsets count characters of the original text.
                sizes = [len(character.encode()) for character in text]
                after = np.concatenate([[0], np.cumsum(sizes)])
                tokens = zip(encoding.ids, encoding.offsets, strict=True)
                ends = [(stop, number) for number, (start, stop) in tokens if stop > start]
                for stop, number in ends:
                    found[after[stop] - 1] = number + 1
            yield document, found, None if text is None else len(ends)


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch = list[bytes]()
    for document in documents:
        for piece in _pieces(document):
            batch.append(piece)
            if len(batch) == _BATCH:
                yield batch
                batch = []
    yield batch


def _pieces(document: bytes) -> Iterator[bytes]:
    """A document, cut behind lines, or else before spaces, into pieces of bounded length.

    Where there is neither, it is cut between characters, so that each piece stays UTF-8.
    """
    start = 0
    while len(document) - start > _PIECE:
        stop = document.rfind(b"\n", start + _PIECE // 2, start + _PIECE) + 1
        stop = stop or document.rfind(b" ", start + _PIECE // 2, start + _PIECE)
        stop = stop if stop > start else _character_start(document, start + _PIECE)
        yield document[start:stop]
        start = stop
    yield document[start:]


def _character_start(document: bytes, at: int) -> int:
    """Where the character begins that the byte at `at` belongs to; `at` itself if none does."""
    starts = (i for i in range(at, at - 4, -1) if document[i] & 0xC0 != 0x80)
    return next(starts, at)


def _as_text(document: bytes) -> str | None:
    try:
        return document.decode()
    except UnicodeDecodeError:
        return None


def _write(out: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save  # `save_file` has errors of its own for a full disk

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as beside:
            beside.write(save(tensors, metadata))
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror})") from None


def open_tokenizer(folder: Path) -> tuple[Any, int | None]:
    """The tokenizer in a token model's folder, and the id of the token that begins a text.

    Raises `ValueError` if there is none, or if the tokenizers library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        hint = "pip install tokenizers"
        raise ValueError(
            f"{folder}: reading its tokenizer needs the tokenizers library; {hint}"
        ) from None
    file = folder / TOKENIZER_FILE
    require(folder.exists(), f"{folder}: does not exist; give the token model's folder")
    require(folder.is_dir(), f"{folder}: is a file; give the token model's folder")
    hint = "transformers writes it: AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    require(file.is_file(), f"{file}: missing, it has the donor's tokens; {hint}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises this very class
        raise ValueError(f"{file}: is no tokenizer ({error})") from None
    tokenizer.no_truncation()  # fine-tuning saves the length of its rows with the tokenizer
    tokenizer.no_padding()
    with errors_about(folder / "config.json", "give a folder of transformers' save_pretrained"):
        begin = read_json(folder / "config.json").get("bos_token_id")
    return tokenizer, begin if type(begin) is int else None


# ---- reading --------------------------------------------------------------------------------


def open_aligned(path: Path) -> Aligned:
    """A prepared file; raises `ValueError` for anything else."""
    from safetensors import safe_open

    with errors_about(path, "give a file that `bytelm align-data` wrote"):
        require_plain_file(path)
        with safe_open(path, framework="np") as opened:
            metadata = opened.metadata() or {}
            require(metadata.get(_KIND) == "1", "is no text with tokens")
            header, data = read_header(path)
            for name, kinds in _KINDS.items():
                kind = header.get(name, {}).get("dtype", "missing")
                require(kind in kinds, f"tensor {name}: {kind}, and not {' or '.join(kinds)}")
            embeddings = opened.get_tensor("embeddings")
        text, token = (_mapped(path, header[name], data) for name in ("text", "token"))
        good = text.ndim == 1 and text.shape == token.shape and embeddings.ndim == 2
        require(good, "its tensors do not fit each other")
        require(int(token.max()) <= len(embeddings), "names embeddings that it lacks")
        first = metadata.get(_BEGIN, "0")
        known = first.isdecimal() and int(first) <= len(embeddings)
        require(known, f"{_BEGIN}={first}: it has {len(embeddings)} embeddings")
        tensors = {"text": text, "token": token, "embeddings": embeddings}
        same = metadata.get(_SUM) in (None, _sum(tensors, first))  # files before had no sum
        require(same, "differs from what was written (SHA-256); write it again")
        require(bool(np.isfinite(embeddings).all()), "embeddings: holds NaN or infinity")
        # The header has the sum: other embeddings are other data to a run that resumes.
        digest = blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=8)
        digest.update(np.ascontiguousarray(text[:: max(1, len(text) >> 20)]).tobytes())
        return Aligned(text, token, embeddings, int(first), digest.hexdigest())


def _sum(tensors: Mapping[str, np.ndarray], begin: str) -> str:
    """What the metadata say of all that a prepared file holds, to find damage."""
    total = sha256(begin.encode())
    for name in _KINDS:
        total.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        total.update(tensors[name].reshape(-1).data)
    return total.hexdigest()


def _mapped(path: Path, tensor: dict[str, Any], data: int) -> np.ndarray:
    kinds = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32}
    kind, (begin, _) = kinds[tensor["dtype"]], tensor["data_offsets"]
    return np.memmap(path, kind, "r", data + begin, tuple(tensor["shape"]))


# ---- the stage ------------------------------------------------------------------------------


def source_recipe(run_dir: Path, read: Callable[[], Recipe]) -> Recipe:
    """The recipe of the stage in `run_dir`, or else what `read` reads of the run's beginning.

    A stage that has begun has its own recipe: its source may be gone. Raises `ValueError` for a
    folder with another run.
    """
    require_local(run_dir, "run_dir")
    saved = saved_recipe(run_dir)
    if saved is None:
        return read()
    why = f"run_dir={run_dir}: holds the run {saved.name}, which is no alignment"
    require(saved.name == _NAME, f"{why}; name another folder")
    return saved


def stage_recipe(source: Recipe, named: str, **changes: Any) -> Recipe:
    """The recipe of the stage for the model of `source`, which `named` names.

    `changes` are steps, batch_size, sequence_length, learning_rate, seed and how often it logs,
    evaluates and saves; those that are 0 are as in `source`, and so are warmup_steps of -1. If
    `source` saves checkpoints in between, they are at most a quarter of the steps apart.
    """
    warmup = changes.pop("warmup_steps", -1)
    given = {name: value for name, value in changes.items() if value}
    data, optimizer = source.data, source.optimizer
    if warmup != -1:
        optimizer = replace(optimizer, warmup_steps=warmup)
    if "sequence_length" in given:
        data = replace(data, sequence_length=given.pop("sequence_length"))
    if "learning_rate" in given:
        optimizer = replace(optimizer, learning_rate=given.pop("learning_rate"))
    kept = {name: getattr(source.train, name) for name in _KEPT}
    quarter = max(1, given.get("steps", kept["steps"]) // 4)
    kept["checkpoint_every"] = min(kept["checkpoint_every"], quarter)
    run = TrainConfig(**kept | given, init_from=named)
    return replace(source, name=_NAME, data=data, optimizer=optimizer, train=run)


def open_stage(
    run: Path, tokens: Path, run_dir: Path, read: Callable[[], Recipe], **changes: Any
) -> tuple[Recipe, Aligned]:
    """Recipe and text of the stage in `run_dir`, which begins from `run`; both are checked.

    `read` and `changes` are those of `source_recipe` and `stage_recipe`.
    """
    recipe = stage_recipe(source_recipe(run_dir, read), str(run), **changes)
    data = open_aligned(tokens)
    check_stage(recipe, data)
    return recipe, data


def check_stage(recipe: Recipe, data: Aligned) -> None:
    """Raises `ValueError` for a model that cannot be aligned, and for a text that does not fit."""
    model: Any = recipe.model
    about = f"is {model.architecture}; only blt has patches to align"
    require(model.takes_donor, f"{recipe.train.init_from}: {about}")
    width, wide = data.embeddings.shape[1], model.global_dim
    hint = "make both with the same donor, by `bytelm import` and `bytelm align-data`"
    same = width == wide
    require(same, f"tokens: embeddings of width {width}, and the model's global_dim={wide}; {hint}")
    few = data.windows(recipe.data.sequence_length) < 2
    hint = "give more text, or a shorter sequence_length"
    require(not few, f"tokens: {len(data.text)} bytes are less than two windows; {hint}")


def alignment_parts(names: Iterable[str]) -> Trainable:
    """What the stage trains of the parameters of a BLT: its byte encoder."""
    return Trainable(frozenset(name for name in names if not name.startswith(_TRAINED)))


def require_finite(step: int, loss: float) -> None:
    """Raises `ValueError` for the loss of a step that is not finite."""
    hint = "lower the learning rate; the last checkpoint is from before"
    require(math.isfinite(loss), f"step {step}: the loss is not finite; {hint}")


def validation_record(found: list[tuple[float, float]]) -> dict[str, float]:
    """A record of metrics out of the losses and cosines of batches that are held out."""
    loss, cosine = (sum(values) / len(found) for values in zip(*found, strict=True))
    return {"validation_alignment_loss": loss, "validation_alignment_cosine": cosine}


def step_line(step: int, count: int, values: dict[str, float]) -> str:
    """What is printed about a step."""
    loss, cosine = values["alignment_loss"], values["alignment_cosine"]
    return f"step {step}/{count}: alignment {loss:.4f}, cosine {cosine:.4f}"


def end_line(outcome: Outcome, run_dir: Path) -> str:
    """What is printed at the end."""
    ended = "interrupted" if outcome.interrupted else "finished"
    return f"{ended} at step {outcome.step}, saved in {run_dir}"
