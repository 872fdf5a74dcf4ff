"""The data of a run: its sources, what is held out, and the lines that say so before it begins."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from bytelm import data
from bytelm.config import DataConfig, Recipe, require
from bytelm.config.run import parse_weights
from bytelm.data import Corpus, Mixture, Windows
from bytelm.files import one_line


class RunData(NamedTuple):
    """What a run trains and is validated on.

    `validation` has windows by the name of their source, or of their set where `data.valid` names
    some; "" where none is named; empty ones are left out. `identity` is equal where the data are,
    wherever they are stored.
    """

    windows: Windows | Mixture
    validation: dict[str, Windows]
    identity: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources; empty without a mixture."""
        return self.windows.names if isinstance(self.windows, Mixture) else ()


def open_windows(recipe: Recipe) -> RunData:
    """The data of a recipe, read or mapped; raises `ValueError` where they do not fit it."""
    config = recipe.data
    named = data.named_paths(config.paths, "data.paths") or {"": []}
    weights = _weights(config, named)
    sets = data.named_paths(config.valid, "data.valid")
    corpora = {name: open_source(config, name, paths) for name, paths in named.items()}
    held_out = {name: open_source(config, name, paths) for name, paths in sets.items()}
    _note_overlap(corpora, held_out)
    identity = _identity(corpora, weights, held_out)
    if not sets:
        for name, corpus in corpora.items():
            rule = config.validation_fraction, config.split_seed, config.split_rule
            corpora[name], held_out[name] = data.split(corpus, *rule)
    training = {name: _cut(recipe, corpus) for name, corpus in corpora.items()}
    validation = {name: _cut(recipe, each) for name, each in held_out.items() if each.documents}
    whole = training[""] if "" in training else Mixture(training, weights)
    return RunData(whole, validation, identity)


def open_source(config: DataConfig, name: str, paths: list[str]) -> Corpus:
    """The corpus of a source or a validation set, read as `config` says; its notes name it."""
    once = config.split_rule == "content"  # older runs read a file as often as it was named
    fields = config.prompt_field, config.completion_field, config.chat_field
    how = config.text_field, config.raw, config.cache_dir, once
    corpus = data.open_corpus(paths, *how, *fields)
    require(corpus.counted_bytes > 0, f"data: nothing of {', '.join(paths)} is counted; give more")
    corpus.notes = tuple(f"{name}: {note}" if name else note for note in corpus.notes)
    return corpus


def _note_overlap(corpora: Mapping[str, Corpus], sets: Mapping[str, Corpus]) -> None:
    """Notes of files that are both trained and validated on."""
    trained = frozenset[tuple[int, int]]().union(*(corpus.inputs for corpus in corpora.values()))
    for name, corpus in sets.items():
        if both := len(corpus.inputs & trained):
            what = f"trains and validates on the same {_counted(both, 'file')}"
            corpus.notes += (f"{f'valid {name}'.strip()}: {what}; leave it out of one",)


def _cut(recipe: Recipe, corpus: Corpus) -> Windows:
    config = recipe.data
    return Windows(corpus, recipe.model.vocab, config.sequence_length, config.append_eos)


def _weights(config: DataConfig, named: Mapping[str, object]) -> dict[str, float] | None:
    """The weight of each source, None where their bytes decide."""
    weights = parse_weights(config.weights)
    if not weights:
        return None
    first = next(iter(config.weights))
    require("" not in named, f"weights={first}: no data have a name; write --data NAME=PATH")
    known = ", ".join(named)
    for name in weights:
        require(name in named, f"weights={name}: no such data; the names are {known}")
    for name in named:
        require(name in weights, f"weights: {name} has none; give --weights {name}=NUMBER, too")
    return weights


def _identity(
    corpora: Mapping[str, Corpus], weights: Mapping[str, float] | None, sets: Mapping[str, Corpus]
) -> str:
    """Of plain paths alone the corpus' own fingerprint, as runs have it that know no names."""
    if "" in corpora and not sets:
        return corpora[""].fingerprint()
    parts: list[Any] = [
        [name, corpus.fingerprint(), (weights or {}).get(name)] for name, corpus in corpora.items()
    ]
    if sets:
        parts += [["valid", name, corpus.fingerprint()] for name, corpus in sets.items()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ---- its text -----------------------------------------------------------------------------------

_PIECE = 1 << 16
"""Bytes that are read at one place where not all of a corpus is."""


def training_text(found: RunData, most_bytes: int) -> Iterator[bytes]:
    """What a run trains on, in order, or `most_bytes` of it: by shares where sources are mixed."""
    if isinstance(found.windows, Mixture):
        for name, windows in found.windows.sources.items():
            share = int(most_bytes * found.windows.shares[name])
            yield from spread_text(windows.corpus, share)
    else:
        yield from spread_text(found.windows.corpus, most_bytes)


def spread_text(corpus: Corpus, most_bytes: int) -> Iterator[bytes]:
    """The text of a corpus, or `most_bytes` of it in pieces that are spread evenly over it."""
    total = corpus.total_bytes
    size = min(total, most_bytes)
    pieces = -(-size // _PIECE)
    stops = np.cumsum(corpus.lengths)
    for piece in range(pieces):
        place = piece * total // pieces
        left = (piece + 1) * size // pieces - piece * size // pieces
        document = int(np.searchsorted(stops, place, "right"))
        while left:
            start = place - int(stops[document] - corpus.lengths[document])
            stop = min(start + left, int(corpus.lengths[document]))
            yield corpus.read(document, start, stop).tobytes()
            place, left, document = place + stop - start, left - (stop - start), document + 1


# ---- the first lines ----------------------------------------------------------------------------


def first_lines(
    recipe: Recipe, found: RunData, parameters: int, machine: str, frozen: int = 0
) -> list[str]:
    """What a run is, in a few lines, and warnings about its data.

    `machine` says on what it trains, and `frozen` how many of its parameters it does not train.
    """
    run, config, windows = recipe.train, recipe.data, found.windows
    held_out = {} if config.valid else found.validation
    epoch = len(windows) / run.batch_size
    fixed = f", {frozen:,} of them frozen" if frozen else ""
    lines = [f"{recipe.name}: {parameters:,} parameters{fixed}, on {machine}"]
    lines += [f"began from {one_line(recipe.origin, 200)}"] if recipe.origin else []
    if run.lora_rank and not recipe.origin:
        lines += ["warning: lora_rank adapts random weights; --init-from names weights to adapt"]
    if isinstance(windows, Mixture):
        named = data.named_paths(config.paths, "data.paths")
        for name, part in windows.sources.items():
            share = windows.shares[name]
            epochs = run.steps * run.batch_size * share / len(part)
            what = _what(recipe, part.corpus, held_out.get(name))
            where = one_line(", ".join(named[name]), 120)
            lines += [f"data {name}: {where}: {what}; {share:.1%} of rows, {epochs:,.2f} epochs"]
        corpora, once = [part.corpus for part in windows.sources.values()], "all windows once are"
    else:
        where = ", ".join(config.paths) or "the source of Python's standard library"
        what = _what(recipe, windows.corpus, held_out.get(""))
        lines += [f"data: {one_line(where, 120)}: {what}"]
        corpora, once = [windows.corpus], "an epoch is"
    if config.valid:
        for name, paths in data.named_paths(config.valid, "data.valid").items():
            corpus = found.validation[name].corpus
            corpora.append(corpus)
            size = f"{corpus.total_bytes:,} bytes in {_counted(corpus.documents, 'document')}"
            lines += [f"{f'valid {name}'.strip()}: {one_line(', '.join(paths), 120)}: {size}"]
    lines += [
        f"{run.steps:,} steps of {run.batch_size:,} windows of "
        f"{config.sequence_length:,}; {once} {epoch:,.1f} steps"
    ]
    return lines + [f"warning: data: {note}" for corpus in corpora for note in corpus.notes]


def _what(recipe: Recipe, train: Corpus, held_out: Windows | None) -> str:
    """How much of a source is trained on, and what is held out of it."""
    if held_out is None:
        whole, split = train.total_bytes, "none held out"
    else:
        rest, documents = held_out.corpus, train.documents + held_out.corpus.documents
        whole = train.total_bytes + rest.total_bytes
        if rest.is_cut:
            few = data.FEWEST_DOCUMENTS if recipe.data.split_rule == "content" else 2
            why = f"fewer than {few} documents" if documents <= few else "no other way to split"
            split = f"the last {rest.total_bytes:,} held out ({why})"
        else:
            chosen = f"{rest.total_bytes:,} bytes in {_counted(rest.documents, 'document')}"
            split = f"{chosen} held out by {recipe.data.split_rule}"
    counted = f"{train.total_bytes:,} in {_counted(train.documents, 'document')}"
    masked = f" ({train.counted_bytes:,} counted)" if train.is_masked else ""
    return f"{whole:,} bytes; {counted} to train on{masked}, {split}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
