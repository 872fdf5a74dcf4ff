"""Rounds of cached decoding: rows that each write bytes from a position of their own.

Axes: B rows, L bytes of the longest sequence, P bytes per round, V vocabulary, C candidate ids, S
states of a constraint, T bytes that one round verifies. The mirror of
`bytelm_jax/inference/rounds.py`.

Without speculation a round appends P bytes to every row that is not done. MEGABYTE's rounds are
patches, so a row starts at the last whole one of its prompt; there it takes the prompt's bytes and
drops the sampled ones. With speculation a round appends from one byte to T, and a row starts at its
prompt's end.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bytelm.config import ByteVocab
from bytelm.generation.automaton import END, Automaton, start_state
from bytelm.sampling import SamplerConfig
from bytelm_torch.inference.sampling import candidate_columns, choose_ids
from bytelm_torch.inference.speculative import Drafter, Propose
from bytelm_torch.layers.caches import (
    Index,
    positions_from,
    read_at,
    take_at,
    write_at,
)
from bytelm_torch.models.interface import inference


class Rows(NamedTuple):
    """What the loop reads: each row's random numbers [B, L], its prompt's length and its end."""

    uniforms: Tensor
    lengths: Tensor
    ends: Tensor
    sampler: SamplerConfig
    allowed: Tensor
    """bool[R, S, C]: the candidates in each state of the constraint (`Automaton.allowed`).

    bool[C] if nothing is constrained.
    """
    step: Tensor
    """int64[S, 256]: the state after each byte."""


class State(NamedTuple):
    """What the loop changes; caches, ids and probabilities in place.

    `ids` [B, P + L] starts with one round of pads, which is what the first round finds before it.
    """

    cache: Any
    ids: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    """The position of each row's next byte."""
    done: Tensor
    constraint: Tensor
    log_probs: Tensor
    """float32[B, L]: natural logarithms of what was written; [B, 0] if nobody asked for them."""
    rounds: Tensor
    """Rounds of each row; with `accepted`, the drafted bytes that were right."""
    accepted: Tensor
    draft_cache: Any


class Run(NamedTuple):
    """`advance(state, stop)` writes until every row is done or has reached `stop` [B]."""

    state: State
    advance: Callable[[State, Tensor], State]


class Settings(NamedTuple):
    """How a run chooses its bytes."""

    sampler: SamplerConfig
    allow_eos: bool
    automaton: Automaton
    drafter: Drafter | None
    log_probs: bool


Pick = Callable[[Tensor, Tensor, Tensor, Tensor, Rows, ByteVocab], Tensor]
"""What `pick_ids` is, for batches whose rows have samplers of their own."""


def begin(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    settings: Settings,
    uniforms: Callable[[int, int], Tensor],
) -> Run:
    """Prefills the prompts in one pass; `uniforms(batch, length)` gives the random numbers."""
    patch, batch, device = model.round_length, len(prompts), device_of(model)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ends, drafter, automaton = lengths + max_new_bytes, settings.drafter, settings.automaton
    length = -(-int(ends.max()) // patch) * patch
    vocab = model.config.vocab
    ids = prompt_ids(prompts, vocab, (batch, patch + length), patch).to(device)
    step = 1 if drafter else patch
    start = lengths // step * step
    # What the prefill writes past a row's prompt is overwritten before it is read.
    prompt = ids[:, patch : patch + int(start.max())]
    with _inference(model, drafter):
        cache = _prefill(model, prompt, length, bool(drafter))
        smaller = drafter.model if drafter else None
        width = min(length, (smaller and smaller.config.longest_input) or length)
        draft_cache = () if smaller is None else _prefill(smaller, prompt, width, True)
    rows = Rows(
        uniforms(batch, length).to(device),
        lengths.to(device),
        ends.to(device),
        settings.sampler,
        torch.from_numpy(allowed_candidates(automaton, vocab, settings.allow_eos)).to(device),
        torch.from_numpy(automaton.step.astype(np.int64)).to(device),
    )
    states = torch.tensor([start_state(automaton, prompt) for prompt in prompts], device=device)
    zeros = torch.zeros_like(states)
    kept = torch.zeros(batch, length if settings.log_probs else 0, device=device)
    state = State(
        cache,
        ids,
        start.to(device),
        (ends <= start).to(device),
        states,
        kept.float(),  # whatever torch's default is
        zeros,
        zeros,
        draft_cache,
    )
    propose = drafter.propose if drafter else None

    def advance(state: State, stop: Tensor) -> State:
        with _inference(model, drafter):
            return append(model, rows, stop, state, propose)

    return Run(state, advance)


def _prefill(model: Any, prompt: Tensor, length: int, by_byte: bool) -> Any:
    cache = model.init_cache(len(prompt), length, by_byte=by_byte)
    return model.prefill(prompt, cache) if prompt.shape[1] else cache


def append(
    model: Any,
    rows: Rows,
    stop: Tensor,
    state: State,
    propose: Propose | None,
    pick: Pick | None = None,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> State:
    """The loop over rounds; without speculation, `pick` and `observe` are for `append_round`."""
    while True:
        live = ~state.done
        going = live & (state.index < stop.to(live.device))
        columns = torch.stack([state.index, live.long(), going.long()], dim=1).tolist()
        if not any(is_going for *_, is_going in columns):
            return state
        # One number for all rows reads caches by slices. A row that is done writes behind its end,
        # wherever that is, but never before it.
        at = {index for index, is_live, _ in columns if is_live}
        alike = len(at) == 1 and max(at) >= max(index for index, *_ in columns)
        places = _places(state, at.pop() if alike else None)
        if propose is None:
            state = append_round(model, rows, state, *places, pick or pick_ids, observe)
        else:
            state = _verify_round(model, rows, state, *places, propose)


def pick_ids(
    logits: Tensor, uniforms: Tensor, states: Tensor, left: Tensor, rows: Rows, vocab: ByteVocab
) -> Tensor:
    """The ids [B, T] that follow, where `left` more bytes fit and the constraint is in `states`."""
    allowed = rows.allowed
    if allowed.ndim == 3:
        allowed = allowed[left.clamp(1, len(allowed)) - 1, states].flatten(0, 1)
    chosen = choose_ids(logits.flatten(0, 1), uniforms.flatten(), rows.sampler, vocab, allowed)
    return chosen.reshape(uniforms.shape)


def _after(state: Tensor, ids: Tensor, rows: Rows, vocab: ByteVocab) -> Tensor:
    """The constraint's states after these ids, which are bytes or end the row."""
    if rows.allowed.ndim == 1:
        return state
    return rows.step[state, (ids - vocab.offset).clamp(0, 255)]


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0].float()


def _places(state: State, index: int | None) -> tuple[Index, Index]:
    """Where each row's next bytes go in the cache and among the ids: `index`, if it serves all.

    Otherwise a row that is done reads pads behind what it has written, whose cache stays as it is.
    It reads them at an odd position, where patches seldom start, so that it hardly ever makes a
    model do more than the others need.
    """
    if index is not None:
        return index, index
    behind, nowhere = state.index | 1, state.ids.shape[1]
    return behind.where(state.done, state.index), state.index.masked_fill(state.done, nowhere)


def append_round(
    model: Any,
    rows: Rows,
    state: State,
    at: Index,
    to: Index,
    pick: Pick,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> State:
    """One round of every row that is not done; `observe` is called with each byte's logits and ids.

    Of a prompt's bytes in its last, unfinished round, too.
    """
    patch, vocab, start = model.round_length, model.config.vocab, state.index
    previous, prompt = read_at(state.ids, at, patch), read_at(state.ids, at + patch, patch)
    previous = previous.masked_fill(state.done[:, None], vocab.pad_id)
    uniforms, constraint, log_probs = read_at(rows.uniforms, at, patch), state.constraint, []

    def choose(logits: Tensor, i: int) -> Tensor:
        nonlocal constraint
        is_new, left = start + i >= rows.lengths, rows.ends - start - i
        numbers, states = uniforms[:, i : i + 1], constraint[:, None]
        chosen = pick(logits[:, None], numbers, states, left[:, None], rows, vocab)[:, 0]
        chosen = chosen.where(is_new, prompt[:, i])
        constraint = _after(constraint, chosen, rows, vocab).where(is_new, constraint)
        if state.log_probs.shape[1]:
            log_probs.append(_log_probs(logits, chosen))
        if observe is not None:
            observe(logits, chosen)
        return chosen

    # What a row makes behind its end in its last round is cut off in the end.
    cache, chosen = model.decode_round(state.cache, previous, at // patch, choose)
    ended = (chosen == vocab.eos_id).any(dim=1) | (start + patch >= rows.ends)
    if log_probs:
        write_at(state.log_probs, torch.stack(log_probs, dim=1), to)
    return state._replace(
        cache=cache,
        ids=write_at(state.ids, chosen, to + patch),
        index=start + patch * ~state.done,
        done=state.done | ended,
        constraint=constraint,
        rounds=state.rounds + ~state.done,
    )


def _verify_round(
    model: Any, rows: Rows, state: State, at: Index, to: Index, propose: Propose
) -> State:
    """Appends the drafted bytes that the sampler would have chosen too, and one more byte.

    The sampler draws every byte with the random number of its own position, as without a draft:
    a draft says only which logits are at hand, so the text is the same.
    """
    patch, vocab, start = model.round_length, model.config.vocab, state.index

    def pick(logits: Tensor, positions: Tensor, constraints: Tensor) -> Tensor:
        uniforms, left = take_at(rows.uniforms, positions), rows.ends[:, None] - positions
        return pick_ids(logits, uniforms, constraints, left, rows, vocab)

    def after(constraint: Tensor, ids: Tensor) -> Tensor:
        return _after(constraint, ids, rows, vocab)

    drafts = propose(model, state, at, patch, pick, after)
    last = read_at(state.ids, at + patch - 1, 1)
    before = torch.cat([last, drafts], dim=1).masked_fill(state.done[:, None], vocab.pad_id)
    logits, cache, reach = model.verify(before, state.cache, at)
    states = [state.constraint]
    for t in range(drafts.shape[1]):
        states.append(after(states[t], drafts[:, t]))
    constraints = torch.stack(states, dim=1)
    ids = pick(logits, positions_from(at, len(states), last.device), constraints)
    right = (ids[:, :-1] == drafts).cumprod(dim=1).sum(dim=1)
    count = torch.minimum(torch.minimum(right + 1, reach), rows.ends - start)
    count = count.masked_fill(state.done, 0)
    newest = (count - 1).clamp(min=0)[:, None]
    last_id = ids.gather(1, newest)[:, 0]
    latest = constraints.gather(1, newest)[:, 0]
    ended = (last_id == vocab.eos_id) | (start + count >= rows.ends)
    # What was not accepted lies behind the row's end: it is overwritten, or cut off in the end.
    if state.log_probs.shape[1]:
        write_at(state.log_probs, _log_probs(logits, ids), to)
    return state._replace(
        cache=cache,
        ids=write_at(state.ids, ids, to + patch),
        index=start + count,
        done=state.done | ended,
        constraint=after(latest, last_id).where(~state.done, state.constraint),
        rounds=state.rounds + ~state.done,
        accepted=state.accepted + (count - 1).clamp(min=0),
    )


def allowed_candidates(automaton: Automaton, vocab: ByteVocab, allow_eos: bool) -> np.ndarray:
    """`automaton.allowed` with a column for each candidate id of the sampler.

    [C] if it allows everything.
    """
    columns = candidate_columns(vocab)
    open_to = (columns >= 0) & ((columns != END) | allow_eos)
    if automaton.allowed.all():
        return open_to
    return automaton.allowed[..., np.maximum(columns, 0)] & open_to


def prompt_ids(
    prompts: Sequence[bytes], vocab: ByteVocab, shape: tuple[int, int], start: int
) -> Tensor:
    """int64 of `shape`: each prompt's ids from column `start` on, pads elsewhere."""
    ids = np.full(shape, vocab.pad_id, np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        codes = np.frombuffer(prompt, np.uint8)
        row[start : start + len(prompt)] = codes.astype(np.int64) + vocab.offset
    return torch.from_numpy(ids)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def _inference(model: nn.Module, drafter: Drafter | None) -> AbstractContextManager[Any]:
    """`inference` of the model and of one that drafts for it."""
    stack = ExitStack()
    for each in (model, drafter.model if drafter else None):
        if each is not None:
            stack.enter_context(inference(each))
    return stack
