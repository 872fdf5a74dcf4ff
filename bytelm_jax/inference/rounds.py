"""Rounds of cached decoding: rows that each write bytes from a position of their own.

Axes: B rows, L bytes of the longest sequence, P bytes per round, V vocabulary, C candidate ids, S
states of a constraint, T bytes that one round verifies.

Without speculation a round appends P bytes to every row that is not done. MEGABYTE's rounds are
patches, so a row starts at the last whole one of its prompt; there it takes the prompt's bytes and
drops the sampled ones. With speculation a round appends from one byte to T, and a row starts at its
prompt's end.

Batches, prompts and sequences are padded to powers of two, and parameters, the sampler's numbers
and constraints are arguments of the compiled programs, so that a few programs serve every call.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bytelm.config import ByteVocab
from bytelm.generation.automaton import Automaton, start_state
from bytelm.memory import host_memory
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.inference.sampling import SamplerNumbers, candidate_columns, choose_ids
from bytelm_jax.inference.speculative import Drafter, Propose
from bytelm_jax.inference.stored import stored_by_module, weights_to_store
from bytelm_jax.kernels.decode_choice import stored_weights
from bytelm_jax.kernels.decoding import min_rows
from bytelm_jax.kernels.dtypes import array_bytes
from bytelm_jax.layers.caches import positions_from, read_at, take_at, write_at

_LEAST_ROUNDS = 16  # the smallest bucket: short prompts and short answers share one program


class Rows(NamedTuple):
    """What the loop reads: each row's random numbers [B, L], its prompt's length and its end.

    All are arrays, of numpy before the program takes them.
    """

    uniforms: Any
    lengths: Any
    ends: Any
    numbers: SamplerNumbers
    allowed: Any
    """bool[R, S, C]: the candidates in each state of the constraint (`Automaton.allowed`)."""
    step: Any
    """int32[S, 256]: the state after each byte."""


class State(NamedTuple):
    """What the loop changes; the program takes it over (donation) and gives it back.

    `ids` [B, P + L] starts with one round of pads, which is what the first round finds before it.
    """

    cache: Any
    ids: Array
    index: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """The position of each row's next byte."""
    done: Array
    constraint: Array
    log_probs: Array
    """float32[B, L]: natural logarithms of what was written; [B, 0] if nobody asked for them."""
    rounds: Array
    """Rounds of each row; with `accepted`, the drafted bytes that were right."""
    accepted: Array
    draft_cache: Any


class Run(NamedTuple):
    """`advance(state, stop)` writes until every row is done or has reached `stop` [B]."""

    state: State
    advance: Callable[[State, np.ndarray], State]


class Settings(NamedTuple):
    """How a run chooses its bytes; `mode` is compiled into the program, and so is `log_probs`."""

    mode: str
    numbers: SamplerNumbers
    automaton: Automaton
    drafter: Drafter | None
    log_probs: bool


def begin(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    settings: Settings,
    uniforms: Callable[[int, int], Array | np.ndarray],
) -> Run:
    """Prefills the prompts in one pass; `uniforms(batch, length)` gives the random numbers."""
    structure, params = split_cached(model)
    weights = weights_to_store(structure, params, len(prompts))
    patch, batch = model.round_length, padded_rows(len(prompts), bool(weights))
    lengths = np.zeros(batch, np.int32)  # rows past the prompts end at 0: done from the start
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    ends = np.where(np.arange(batch) < len(prompts), lengths + np.int32(max_new_bytes), 0)
    length = padded(model, int(ends.max()))
    vocab, drafter = model.config.vocab, settings.drafter
    ids = prompt_ids(prompts, vocab, (batch, patch + length), patch)
    step = 1 if drafter else patch
    start = lengths // step * step
    # What the padded prefill writes past a row's prompt is overwritten before it is read.
    prefix = padded(model, int(start.max())) if start.max() else 0

    caches = [prefill_program(structure, bool(drafter))(params, ids[:, patch:], prefix)]
    if drafter and drafter.model is not None:
        width = min(padded(drafter.model, int(ends.max())), length)
        program = prefill_program(drafter.structure, True)
        caches.append(program(drafter.params, ids[:, patch : patch + width], min(prefix, width)))
    automaton = settings.automaton
    states = np.zeros(batch, np.int32)
    states[: len(prompts)] = [start_state(automaton, prompt) for prompt in prompts]
    rows = Rows(
        uniforms(batch, length),
        lengths,
        ends,
        settings.numbers,
        allowed_candidates(automaton, vocab),
        automaton.step,
    )
    zeros = jnp.zeros(batch, jnp.int32)
    kept = jnp.zeros((batch, length if settings.log_probs else 0), jnp.float32)
    state = State(
        caches[0],
        jnp.asarray(ids),
        jnp.asarray(start),
        jnp.asarray(ends <= start),
        jnp.asarray(states),
        kept,
        zeros,
        jnp.zeros_like(zeros),
        caches[1] if len(caches) == 2 else (),
    )
    program = append_program(structure, settings.mode, drafter.key if drafter else None)
    arguments = () if drafter is None else drafter.arguments

    def advance(state: State, stop: np.ndarray) -> State:
        return program(params, weights, arguments, rows, stop, state)

    return Run(state, advance)


@functools.lru_cache(maxsize=64)
def prefill_program(structure: CompiledModelKey, by_byte: bool) -> Callable[..., Any]:
    @functools.partial(jax.jit, static_argnums=2)
    def prefill(params: list[Array], ids: Array, prefix: int) -> Any:
        model = structure.model(params)
        cache = model.init_cache(*ids.shape, by_byte=by_byte)
        return model.prefill(ids[:, :prefix], cache) if prefix else cache

    return prefill


@functools.lru_cache(maxsize=64)
def append_program(
    structure: CompiledModelKey, mode: str, propose: Propose | None
) -> Callable[..., State]:
    """The loop over rounds, compiled once for a model, a kind of sampler and a kind of draft."""

    @functools.partial(jax.jit, donate_argnames="state")
    def append(
        params: list[Array], weights: Any, drafting: Any, rows: Rows, stop: Array, state: State
    ) -> State:
        model = structure.model(params)

        def unfinished(state: State) -> Array:
            return (~state.done & (state.index < stop)).any()

        def body(state: State) -> State:
            if propose is None:
                return append_round(model, mode, rows, state)
            return _verify_round(model, mode, rows, state, propose, drafting)

        with stored_weights(stored_by_module(model, weights)):
            return jax.lax.while_loop(unfinished, body, state)

    return append


def _pick(
    logits: Array,
    uniform: Array,
    state: Array,
    left: Array,
    mode: str,
    rows: Rows,
    vocab: ByteVocab,
) -> Array:
    """The ids [B] that follow, where `left` more bytes fit and the constraint is in `state`."""
    most = rows.allowed.shape[0]
    allowed = jnp.asarray(rows.allowed)[jnp.clip(left, 1, most) - 1, state]
    return choose_ids(logits, uniform, mode, rows.numbers, vocab, allowed)


def _after(state: Array, ids: Array, rows: Rows, vocab: ByteVocab) -> Array:
    """The constraint's states after these ids, which are bytes or end the row."""
    return jnp.asarray(rows.step)[state, jnp.clip(ids - vocab.offset, 0, 255)]


def _log_probs(logits: Array, ids: Array) -> Array:
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logs = jax.nn.log_softmax(wide, axis=-1)
    return jnp.take_along_axis(logs, ids[..., None], axis=-1)[..., 0].astype(jnp.float32)


def _places(state: State) -> tuple[Array, Array]:
    """Where each row's next bytes go in the cache and among the ids; nowhere, if it is done.

    A row that is done reads pads behind what it has written, whose cache stays as it is. It reads
    them at an odd position, where patches seldom start, so that it hardly ever makes a model do
    more than the others need.
    """
    behind, nowhere = state.index | 1, state.ids.shape[1]
    return jnp.where(state.done, behind, state.index), jnp.where(state.done, nowhere, state.index)


def append_round(
    model: Any,
    mode: str,
    rows: Rows,
    state: State,
    observe: Callable[[Array, Array], None] | None = None,
) -> State:
    """One round of every row that is not done; `observe` is called with each byte's logits and ids.

    Of a prompt's bytes in its last, unfinished round, too.
    """
    patch, vocab, start = model.round_length, model.config.vocab, state.index
    at, to = _places(state)
    previous, prompt = read_at(state.ids, start, patch), read_at(state.ids, start + patch, patch)
    previous = jnp.where(state.done[:, None], vocab.pad_id, previous)
    uniforms = read_at(rows.uniforms, start, patch)
    constraint, log_probs = state.constraint, []

    def choose(logits: Array, i: int) -> Array:
        nonlocal constraint
        is_new = start + i >= rows.lengths
        left = rows.ends - start - i
        chosen = _pick(logits, uniforms[:, i], constraint, left, mode, rows, vocab)
        chosen = jnp.where(is_new, chosen, prompt[:, i])
        constraint = jnp.where(is_new, _after(constraint, chosen, rows, vocab), constraint)
        if state.log_probs.shape[1]:
            log_probs.append(_log_probs(logits, chosen))
        if observe is not None:
            observe(logits, chosen)
        return chosen

    # What a row makes behind its end in its last round is cut off on the host.
    cache, chosen = model.decode_round(state.cache, previous, at // patch, choose)
    ended = (chosen == vocab.eos_id).any(axis=1) | (start + patch >= rows.ends)
    written = state.log_probs
    if log_probs:
        written = write_at(written, jnp.stack(log_probs, axis=1), to)
    return state._replace(
        cache=cache,
        ids=write_at(state.ids, chosen, to + patch),
        index=start + jnp.where(state.done, 0, patch),
        done=state.done | ended,
        constraint=constraint,
        log_probs=written,
        rounds=state.rounds + ~state.done,
    )


def _verify_round(
    model: Any, mode: str, rows: Rows, state: State, propose: Propose, drafting: Any
) -> State:
    """Appends the drafted bytes that the sampler would have chosen too, and one more byte.

    The sampler draws every byte with the random number of its own position, as without a draft:
    a draft says only which logits are at hand, so the text is the same.
    """
    patch, vocab, start = model.round_length, model.config.vocab, state.index

    def pick(logits: Array, at: Array, constraint: Array) -> Array:
        uniform = take_at(rows.uniforms, at[:, None])[:, 0]
        return _pick(logits, uniform, constraint, rows.ends - at, mode, rows, vocab)

    def after(constraint: Array, ids: Array) -> Array:
        return _after(constraint, ids, rows, vocab)

    drafts, cache, draft_cache = propose(model, drafting, state, patch, pick, after)
    last, (at, to) = take_at(state.ids, start[:, None] + patch - 1), _places(state)
    before = jnp.concatenate([last, drafts], axis=1)
    before = jnp.where(state.done[:, None], vocab.pad_id, before)
    logits, cache, reach = model.verify(before, cache, at)
    states = [state.constraint]
    for t in range(drafts.shape[1]):
        states.append(after(states[t], drafts[:, t]))
    constraints, positions = jnp.stack(states, axis=1), positions_from(start, len(states))
    ids = jax.vmap(pick, in_axes=1, out_axes=1)(logits, positions, constraints)
    right = jnp.cumprod(ids[:, :-1] == drafts, axis=1, dtype=jnp.int32).sum(axis=1, dtype=jnp.int32)
    count = jnp.minimum(jnp.minimum(right + 1, reach), rows.ends - start)
    count = jnp.where(state.done, 0, count)
    newest = jnp.maximum(count - 1, 0)[:, None]
    last_id = jnp.take_along_axis(ids, newest, axis=1)[:, 0]
    latest = jnp.take_along_axis(constraints, newest, axis=1)[:, 0]
    ended = (last_id == vocab.eos_id) | (start + count >= rows.ends)
    # What was not accepted lies behind the row's end: it is overwritten, or cut off on the host.
    log_probs = state.log_probs
    if log_probs.shape[1]:
        log_probs = write_at(log_probs, _log_probs(logits, ids), to)
    return state._replace(
        cache=cache,
        ids=write_at(state.ids, ids, to + patch),
        index=start + count,
        done=state.done | ended,
        constraint=jnp.where(state.done, state.constraint, after(latest, last_id)),
        log_probs=log_probs,
        rounds=state.rounds + ~state.done,
        accepted=state.accepted + jnp.maximum(count - 1, 0),
        draft_cache=draft_cache,
    )


def allowed_candidates(automaton: Automaton, vocab: ByteVocab) -> np.ndarray:
    """`automaton.allowed` with a column for each candidate id of the sampler."""
    columns = candidate_columns(vocab)
    return automaton.allowed[..., np.maximum(columns, 0)] & (columns >= 0)


def padded(model: Any, length: int) -> int:
    """`length` bytes as a power of two of rounds, but never past what the model can hold."""
    patch, limit = model.round_length, model.config.longest_input
    size = patch * max(_LEAST_ROUNDS, power_of_two(-(-length // patch)))
    return size if limit is None else min(size, limit)


def padded_rows(count: int, by_sums: bool = False) -> int:
    """The rows of a batch that serves `count` prompts."""
    return max(1 if by_sums else min_rows(), power_of_two(count))


def batch_bytes(model: Any, batch: int, length: int, by_byte: bool = False) -> int:
    """Bytes of memory that the caches, ids and random numbers of a batch take.

    Caches that are read `by_byte` serve drafts, and may be larger.
    """
    cache = jax.eval_shape(lambda: model.init_cache(batch, length, by_byte=by_byte))
    leaves = jax.tree.leaves(cache)
    return sum(array_bytes(leaf.shape, leaf.dtype) for leaf in leaves) + 8 * batch * length


def device_memory() -> int:
    """Bytes of memory of the device that generates, or of this machine if it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return (stats or {}).get("bytes_limit") or host_memory()


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`."""
    return 1 << max(0, least - 1).bit_length()


def prompt_ids(
    prompts: Sequence[bytes], vocab: ByteVocab, shape: tuple[int, int], start: int
) -> np.ndarray:
    """int32 of `shape`: each prompt's ids from column `start` on, pads elsewhere."""
    ids = np.full(shape, vocab.pad_id, np.int32)
    for row, prompt in zip(ids, prompts, strict=False):
        codes = np.frombuffer(prompt, np.uint8)
        row[start : start + len(prompt)] = codes.astype(np.int32) + vocab.offset
    return ids
