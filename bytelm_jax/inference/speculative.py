"""Drafts for speculative decoding: guesses at the bytes that follow, cheaper than the model itself.

Leviathan et al. 2023 (arXiv 2211.17192) verify drafts by rejection sampling. Here every byte is
drawn with a random number that belongs to its seed, row and position; the verification draws it
with that number and accepts the draft if it is equal, so the text of a seed is the same with and
without speculation. A draft that is sampled itself uses the same number, so that two models that
mostly agree mostly draw the same byte.

Axes: B rows, L bytes, K drafted bytes, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from bytelm.generation.draft_table import (
    CHECK,
    DRAFT_BYTES,
    HASH,
    LONGEST_MATCH,
    MIX,
    ORDERS,
    DraftTable,
)
from bytelm.generation.drafts import draft_kind
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.layers.caches import read_at, take_at

_REPEATED = 6
"""Bytes of a repetition in the text itself that says more than the table does."""

Propose = Callable[..., tuple[Array, Any, Any]]
"""`propose(model, arguments, state, pads, pick, after) -> (drafts [B, K], cache, draft cache)`.

`pick(logits, positions, constraints)` is what the sampler draws, `after(constraints, ids)` the
constraint's next states. Equal for drafts that one compiled program can serve.
"""


class Drafter(NamedTuple):
    """Where drafts come from: `key` is compiled into the program, `arguments` are given to it."""

    key: Propose
    arguments: Any
    model: Any = None
    structure: CompiledModelKey | None = None
    params: Any = None


def make_drafter(model: Any, speculate: Any, longest: int) -> Drafter | None:
    """What drafts for `model`: None or "none", "ngram", "self", a `DraftTable`, or a model.

    Raises `ValueError` for a draft that this model cannot use.
    """
    match draft_kind(model, speculate, longest):
        case "none":
            return None
        case "ngram":
            return Drafter(_propose_ngram, ())
        case "self":
            return Drafter(_propose_self, ())
        case "table":
            return Drafter(_propose_table, tuple(jnp.asarray(part) for part in speculate))
        case "model":
            structure, params = split_cached(speculate)
            return Drafter(_propose_model(structure), params, speculate, structure, params)


def _propose_ngram(
    model: Any, arguments: Any, state: Any, pads: int, pick: Any, after: Any
) -> tuple[Array, Any, Any]:
    drafts, _ = ngram_drafts(state.ids[:, pads:], state.index, DRAFT_BYTES)
    return drafts, state.cache, state.draft_cache


def ngram_drafts(
    text: Int[Array, "B L"], index: Int[Array, " B"], count: int
) -> tuple[Int[Array, "B {count}"], Int[Array, " B"]]:
    """What followed the longest end of each row's first `index` ids where it last appeared.

    Also gives the length of that end, at most 16. A continuation that runs into the text's end goes
    on with itself (`bytelm.generation.draft_table.ngram_draft`).
    """
    length = text.shape[1]
    behind = jnp.pad(text, ((0, 0), (LONGEST_MATCH, 0)), constant_values=-1)
    newest = read_at(behind, index, LONGEST_MATCH)
    # same[b, j]: bytes before position j that equal those before the row's end, from the last on.
    going, same = jnp.ones(text.shape, bool), jnp.zeros(text.shape, jnp.int32)
    for k in range(LONGEST_MATCH):
        there = behind[:, LONGEST_MATCH - 1 - k : LONGEST_MATCH - 1 - k + length]
        mine = newest[:, LONGEST_MATCH - 1 - k][:, None]
        going = going & (there == mine) & (mine >= 0)
        same = same + going
    positions = jnp.arange(length)[None, :]
    same = jnp.where(positions < index[:, None], same, 0)
    best = jnp.argmax(same * length + positions, axis=1)  # the longest, then the latest
    period = jnp.maximum(index - best, 1)[:, None]
    drafts = take_at(text, best[:, None] + jnp.arange(count)[None, :] % period)
    return drafts, jnp.take_along_axis(same, best[:, None], axis=1)[:, 0]


def _propose_table(
    model: Any, arguments: Any, state: Any, pads: int, pick: Any, after: Any
) -> tuple[Array, Any, Any]:
    text, vocab = state.ids[:, pads:], model.config.vocab
    # A text of fewer bytes than a table is asked with is filled with zeros in front.
    behind = jnp.pad(text, ((0, 0), (DRAFT_BYTES, 0)), constant_values=vocab.offset)
    recent = read_at(behind, state.index, DRAFT_BYTES) - vocab.offset
    drafts = table_drafts(DraftTable(*arguments), jnp.clip(recent, 0, 255)) + vocab.offset
    repeated, length = ngram_drafts(text, state.index, DRAFT_BYTES)
    drafts = jnp.where((length >= _REPEATED)[:, None], repeated, drafts)
    return drafts, state.cache, state.draft_cache


def table_drafts(table: Any, recent: Int[Array, "B 8"]) -> Int[Array, "B 8"]:
    """The drafts of a `DraftTable` on the device (`bytelm.generation.draft_table.look_up`)."""
    h, hashes = jnp.zeros(recent.shape[0], jnp.uint32), []
    for back in range(1, DRAFT_BYTES + 1):
        h = h * jnp.uint32(HASH) + recent[:, -back].astype(jnp.uint32) + jnp.uint32(1)
        if back in ORDERS:
            hashes.insert(0, h)  # as ORDERS, the longest first
    h = jnp.stack(hashes)
    x = (h ^ (h >> 16)) * jnp.uint32(MIX)
    slots = ((x ^ (x >> 15)) & jnp.uint32(table.keys.shape[1] - 1)).astype(jnp.int32)
    rows = jnp.arange(len(ORDERS))[:, None]
    held = table.keys[rows, slots] == ((h * jnp.uint32(CHECK)) | 1)
    first = jnp.argmax(held, axis=0)
    slot = jnp.take_along_axis(slots, first[None], axis=0)[0]
    return jnp.where(held.any(axis=0)[:, None], table.drafts[first, slot], 0).astype(jnp.int32)


def _propose_self(
    model: Any, arguments: Any, state: Any, pads: int, pick: Any, after: Any
) -> tuple[Array, Any, Any]:
    drafts, cache = _chain(model.draft, state.cache, state, pads, pick, after, DRAFT_BYTES)
    return drafts, cache, state.draft_cache


@functools.lru_cache(maxsize=64)
def _propose_model(structure: CompiledModelKey) -> Propose:
    def propose(
        model: Any, arguments: Any, state: Any, pads: int, pick: Any, after: Any
    ) -> tuple[Array, Any, Any]:
        drafting = structure.model(arguments)
        # One byte more than is used: if all are accepted, the next round goes on behind the last.
        drafts, cache = _chain(
            drafting.extend, state.draft_cache, state, pads, pick, after, DRAFT_BYTES + 1
        )
        return drafts[:, :DRAFT_BYTES], state.cache, cache

    return propose


def _chain(
    extend: Callable[..., tuple[Array, Any]],
    cache: Any,
    state: Any,
    pads: int,
    pick: Any,
    after: Any,
    count: int,
) -> tuple[Array, Any]:
    """`count` bytes, each drawn from what `extend` says after the one before; and its cache."""
    last = take_at(state.ids, state.index[:, None] + pads - 1)
    index = jnp.where(state.done, 1, state.index)

    def step(carry: tuple[Any, Array, Array, Array], _: None) -> tuple[Any, Array]:
        cache, before, index, constraint = carry
        logits, cache = extend(before, cache, index)
        chosen = pick(logits[:, 0], index, constraint)
        return (cache, chosen[:, None], index + 1, after(constraint, chosen)), chosen

    carry = (cache, last, index, state.constraint)
    (cache, *_), drafts = jax.lax.scan(step, carry, None, length=count)
    return drafts.T, cache
