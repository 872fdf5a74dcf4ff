"""Drafts for speculative decoding: guesses at the bytes that follow, cheaper than the model itself.

Leviathan et al. 2023 (arXiv 2211.17192) verify drafts by rejection sampling. Here every byte is
drawn with a random number that belongs to its seed, row and position; the verification draws it
with that number and accepts the draft if it is equal, so the text of a seed is the same with and
without speculation. A draft that is sampled itself uses the same number, so that two models that
mostly agree mostly draw the same byte.

Axes: B rows, L bytes, K drafted bytes, V vocabulary. The mirror of
`bytelm_jax/inference/speculative.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from bytelm.config import require
from bytelm.generation.draft_table import (
    CHECK,
    DRAFT_BYTES,
    HASH,
    LONGEST_MATCH,
    MIX,
    ORDERS,
)
from bytelm.generation.drafts import draft_kind
from bytelm_torch.layers.caches import Index, positions_from, read_at, take_at

_REPEATED = 6
"""Bytes of a repetition in the text itself that says more than the table does."""

Propose = Callable[..., Tensor]
"""`propose(model, state, start, pads, pick, after) -> drafts [B, K]`.

`start` is the position of the first draft, `pick(logits, positions, constraints)` what the sampler
draws, and `after(constraints, ids)` the constraint's next states.
"""


class Drafter(NamedTuple):
    """Where drafts come from; `model` is the smaller one, if it is one that drafts."""

    propose: Propose
    model: Any = None


def make_drafter(model: Any, speculate: Any, longest: int) -> Drafter | None:
    """What drafts for `model`: None or "none", "ngram", "self", a `DraftTable`, or a model.

    Raises `ValueError` for a draft that this model cannot use.
    """
    device = next(model.parameters()).device
    match draft_kind(model, speculate, longest):
        case "none":
            return None
        case "ngram":
            return Drafter(_propose_ngram)
        case "self":
            return Drafter(_propose_self)
        case "table":
            # Torch has no arithmetic of uint32; int64 holds every product of the hash.
            keys, drafts = (torch.from_numpy(part.astype("int64")).to(device) for part in speculate)
            return Drafter(partial(_propose_table, keys, drafts))
        case "model":
            there = next(speculate.parameters()).device
            require(
                there == device,
                f"speculate: the drafting model is on {there}, this model on {device}",
            )
            return Drafter(partial(_propose_model, speculate), speculate)


def _propose_ngram(
    model: Any, state: Any, start: Index, pads: int, pick: Any, after: Any
) -> Tensor:
    return ngram_drafts(state.ids[:, pads:], state.index, DRAFT_BYTES)[0]


def ngram_drafts(
    text: Int[Tensor, "B L"], index: Int[Tensor, " B"], count: int
) -> tuple[Int[Tensor, "B {count}"], Int[Tensor, " B"]]:
    """What followed the longest end of each row's first `index` ids where it last appeared.

    Also gives the length of that end, at most 16. A continuation that runs into the text's end goes
    on with itself (`bytelm.generation.draft_table.ngram_draft`).
    """
    length, device = text.shape[1], text.device
    behind = F.pad(text, (LONGEST_MATCH, 0), value=-1)
    newest = read_at(behind, index, LONGEST_MATCH)
    # same[b, j]: bytes before position j that equal those before the row's end, from the last on.
    going, same = torch.ones_like(text, dtype=torch.bool), torch.zeros_like(text)
    for k in range(LONGEST_MATCH):
        there = behind[:, LONGEST_MATCH - 1 - k : LONGEST_MATCH - 1 - k + length]
        mine = newest[:, LONGEST_MATCH - 1 - k][:, None]
        going = going & (there == mine) & (mine >= 0)
        same = same + going
    positions = torch.arange(length, device=device)[None, :]
    same = same.where(positions < index[:, None], 0)
    best = (same * length + positions).argmax(dim=1)  # the longest, then the latest
    period = (index - best).clamp(min=1)[:, None]
    drafts = take_at(text, best[:, None] + torch.arange(count, device=device)[None, :] % period)
    return drafts, same.gather(1, best[:, None])[:, 0]


def _propose_table(
    keys: Tensor,
    table: Tensor,
    model: Any,
    state: Any,
    start: Index,
    pads: int,
    pick: Any,
    after: Any,
) -> Tensor:
    text, vocab = state.ids[:, pads:], model.config.vocab
    # A text of fewer bytes than a table is asked with is filled with zeros in front.
    behind = F.pad(text, (DRAFT_BYTES, 0), value=vocab.offset)
    recent = read_at(behind, state.index, DRAFT_BYTES) - vocab.offset
    drafts = table_drafts(keys, table, recent.clamp(0, 255)) + vocab.offset
    repeated, length = ngram_drafts(text, state.index, DRAFT_BYTES)
    return repeated.where((length >= _REPEATED)[:, None], drafts)


def table_drafts(
    keys: Int[Tensor, "R S"], drafts: Int[Tensor, "R S 8"], recent: Int[Tensor, "B 8"]
) -> Int[Tensor, "B 8"]:
    """The drafts of a `DraftTable` on the device (`bytelm.generation.draft_table.look_up`)."""
    most, found, held = 2**32 - 1, [], []
    for row, order in enumerate(ORDERS):
        h = torch.zeros_like(recent[:, 0])
        for column in recent.unbind(1)[: -order - 1 : -1]:
            h = (h * HASH + column + 1) & most
        x = ((h ^ (h >> 16)) * MIX) & most
        slot = (x ^ (x >> 15)) & (keys.shape[1] - 1)
        held.append(keys[row][slot] == (((h * CHECK) & most) | 1))
        found.append(drafts[row][slot])
    first = torch.stack(held).long().argmax(dim=0)
    drafted = torch.stack(found)[first, torch.arange(len(recent), device=recent.device)]
    return drafted.where(torch.stack(held).any(dim=0)[:, None], 0)


def _propose_self(model: Any, state: Any, start: Index, pads: int, pick: Any, after: Any) -> Tensor:
    return _chain(model.draft, state.cache, state, start, pads, pick, after, DRAFT_BYTES)


def _propose_model(
    drafting: Any, model: Any, state: Any, start: Index, pads: int, pick: Any, after: Any
) -> Tensor:
    # One byte more than is used: if all are accepted, the next round goes on behind the last.
    count = DRAFT_BYTES + 1
    drafts = _chain(drafting.extend, state.draft_cache, state, start, pads, pick, after, count)
    return drafts[:, :DRAFT_BYTES]


def _chain(
    extend: Callable[..., tuple[Tensor, Any]],
    cache: Any,
    state: Any,
    start: Index,
    pads: int,
    pick: Any,
    after: Any,
    count: int,
) -> Tensor:
    """`count` bytes, each drawn from what `extend` says after the one before."""
    before, constraint, drafts = read_at(state.ids, start + pads - 1, 1), state.constraint, []
    for t in range(count):
        logits, cache = extend(before, cache, start + t)
        at = positions_from(start + t, 1, before.device)
        before = pick(logits, at, constraint[:, None])
        constraint = after(constraint, before[:, 0])
        drafts.append(before)
    return torch.cat(drafts, dim=1)
