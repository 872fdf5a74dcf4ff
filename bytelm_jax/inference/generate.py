"""Cached decoding: bytes in, bytes out, one compiled loop on the device.

Axes: B rows, L bytes of the longest sequence, P bytes per round, V vocabulary.

A round appends P bytes to every row, so all rows share one position. Generation starts at the last
whole round of the shortest prompt; a row still inside its prompt takes the prompt's bytes and drops
the sampled ones. So a patch that a prompt leaves half full is replayed and is no special case.

Batches, prompts and sequences are padded to powers of two, and parameters and the sampler's numbers
are arguments of the compiled programs, so that a few programs serve every call.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bytelm.config import ByteVocab, require
from bytelm.memory import host_memory
from bytelm.sampling import SamplerConfig, check_request, require_sampled
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.inference.sampling import (
    SamplerNumbers,
    choose_ids,
    random_uniforms,
    split_settings,
)
from bytelm_jax.kernels.decoding import min_rows
from bytelm_jax.kernels.dtypes import array_bytes

_LEAST_ROUNDS = 16  # the smallest bucket: short prompts and short answers share one program

_DEFAULT = SamplerConfig()


def generate(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    sampler: SamplerConfig = _DEFAULT,
    seed: int = 0,
    stop_at_eos: bool = True,
) -> list[bytes]:
    """Continues each prompt by up to `max_new_bytes`; returns the new bytes alone, in order.

    A row ends at end-of-sequence, which is not returned; `stop_at_eos=False` rules it out, so that
    every row gets exactly `max_new_bytes`. The random numbers depend on `seed` (below 2^32), the
    row's number and the position, never on the other rows. Prompts may be empty and differ in
    length; the longer ones replay the difference, so batch like with like. Raises `ValueError`
    before anything runs when a row would outgrow the model's `max_length`.
    """
    check_request(model.config, prompts, max_new_bytes, seed, functools.partial(_capacity, model))
    if not prompts or max_new_bytes == 0:
        return [b""] * len(prompts)
    run = _begin(model, prompts, max_new_bytes, sampler, seed, stop_at_eos)
    state = run.advance(run.state, run.rounds)
    ids = np.asarray(state.ids)[:, model.round_length :]
    return [
        _new_bytes(row[len(prompt) : len(prompt) + max_new_bytes], model.config.vocab)
        for row, prompt in zip(ids, prompts, strict=False)  # rows past the prompts are padding
    ]


def stream(
    model: Any,
    prompt: bytes,
    max_new_bytes: int,
    sampler: SamplerConfig = _DEFAULT,
    seed: int = 0,
    stop_at_eos: bool = True,
    chunk_bytes: int = 64,
) -> Iterator[bytes]:
    """As `generate` for one prompt, in pieces of about `chunk_bytes` as the device finishes them.

    The pieces add up to what `generate` returns; no piece is empty. One piece is one device call.
    A piece may end inside a UTF-8 character.
    """
    check_request(model.config, [prompt], max_new_bytes, seed, functools.partial(_capacity, model))
    require(chunk_bytes >= 1, f"chunk_bytes={chunk_bytes}: must be at least 1")
    if max_new_bytes == 0:
        return iter(())
    run = _begin(model, [prompt], max_new_bytes, sampler, seed, stop_at_eos)
    return _pieces(model, run, len(prompt), len(prompt) + max_new_bytes, chunk_bytes)


def _pieces(model: Any, run: "_Run", sent: int, end: int, chunk_bytes: int) -> Iterator[bytes]:
    patch, state, stop, done = model.round_length, run.state, run.first, False
    while not done:
        stop = min(stop + max(1, chunk_bytes // patch), run.rounds)
        state = run.advance(state, stop)
        row, done = np.asarray(state.ids)[0, patch:], bool(state.done[0])
        piece = _new_bytes(row[sent : min(stop * patch, end)], model.config.vocab)
        sent += len(piece)
        if piece:
            yield piece


def generate_uncached(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    sampler: SamplerConfig = _DEFAULT,
    seed: int = 0,
    stop_at_eos: bool = True,
) -> list[bytes]:
    """As `generate`, by a full forward pass for every byte: the reference, slow and plain.

    The pass runs over the sequence so far, padded to a bucket (at most twice the length, or
    16 rounds), and not over the whole length asked for.
    """
    check_request(model.config, prompts, max_new_bytes, seed, functools.partial(_capacity, model))
    if not prompts or max_new_bytes == 0:
        return [b""] * len(prompts)
    vocab, lengths = model.config.vocab, np.array([len(prompt) for prompt in prompts])
    first, last = int(lengths.min()), int(lengths.max()) + max_new_bytes
    ids = _prompt_ids(prompts, vocab, (len(prompts), _padded(model, last)), 0)
    structure, params = split_cached(model)
    mode, numbers = split_settings(sampler, stop_at_eos)
    uniforms = random_uniforms(mode, seed, *ids.shape)
    full = _full_forward(structure, mode)
    done = np.zeros(len(prompts), bool)
    for position in range(first, last):
        past = ids[:, : _padded(model, position + 1)]
        chosen = np.asarray(full(params, numbers, uniforms, past, np.int32(position)))
        written = np.where(done, vocab.pad_id, chosen)
        ids[:, position] = np.where(position < lengths, ids[:, position], written)
        done |= (ids[:, position] == vocab.eos_id) | (position + 1 >= lengths + max_new_bytes)
        if done.all():
            break
    return [
        _new_bytes(row[length : length + max_new_bytes], vocab)
        for row, length in zip(ids, lengths, strict=True)
    ]


class _Rows(NamedTuple):
    """What the loop reads: random numbers [B, L], prompt length and end (with new bytes) a row."""

    uniforms: Array | np.ndarray
    lengths: np.ndarray
    ends: np.ndarray


class _State(NamedTuple):
    """What the loop changes; the program takes it over (donation) and gives it back.

    `ids` [B, P + L] starts with one round of pads, which is what the first round finds before it.
    """

    cache: Any
    ids: Array
    round: Array
    done: Array


class _Run(NamedTuple):
    """`advance(state, stop)` appends rounds up to number `stop`, out of `first` … `rounds`."""

    state: _State
    advance: Callable[[_State, int], _State]
    first: int
    rounds: int


def _begin(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    sampler: SamplerConfig,
    seed: int,
    stop_at_eos: bool,
) -> _Run:
    """Prefills the rounds that every prompt fills, in one pass."""
    patch, batch = model.round_length, max(min_rows(), _power_of_two(len(prompts)))
    lengths = np.zeros(batch, np.int32)  # rows past the prompts end at 0: done from the start
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    ends = np.where(np.arange(batch) < len(prompts), lengths + np.int32(max_new_bytes), 0)
    length = _padded(model, int(ends.max()))
    ids = _prompt_ids(prompts, model.config.vocab, (batch, patch + length), patch)
    first = min(map(len, prompts)) // patch
    # What the padded prefill writes past round `first` is overwritten before it is read.
    prefix = _padded(model, first * patch) if first else 0

    structure, params = split_cached(model)
    mode, numbers = split_settings(sampler, stop_at_eos)
    append = _append_rounds(structure, mode)
    rows = _Rows(random_uniforms(mode, seed, batch, length), lengths, ends)
    cache = _prefill(structure)(params, ids[:, patch:], prefix)
    state = _State(cache, jnp.asarray(ids), jnp.int32(first), jnp.asarray(ends == 0))

    def advance(state: _State, stop: int) -> _State:
        return append(params, numbers, rows, np.int32(stop), state)

    return _Run(state, advance, first, -(-int(ends.max()) // patch))


@functools.lru_cache(maxsize=64)
def _prefill(structure: CompiledModelKey) -> Callable[..., Any]:
    @functools.partial(jax.jit, static_argnums=2)
    def prefill(params: list[Array], ids: Array, prefix: int) -> Any:
        model = structure.model(params)
        cache = model.init_cache(*ids.shape)
        return model.prefill(ids[:, :prefix], cache) if prefix else cache

    return prefill


@functools.lru_cache(maxsize=64)
def _append_rounds(structure: CompiledModelKey, mode: str) -> Callable[..., _State]:
    @functools.partial(jax.jit, donate_argnames="state")
    def append(
        params: list[Array], numbers: SamplerNumbers, rows: _Rows, stop: Array, state: _State
    ) -> _State:
        model = structure.model(params)

        def unfinished(state: _State) -> Array:
            return (state.round < stop) & ~state.done.all()

        def body(state: _State) -> _State:
            return _append_round(model, mode, numbers, rows, state)

        return jax.lax.while_loop(unfinished, body, state)

    return append


def _append_round(
    model: Any, mode: str, numbers: SamplerNumbers, rows: _Rows, state: _State
) -> _State:
    patch, vocab = model.round_length, model.config.vocab
    start = state.round * patch
    previous = jax.lax.dynamic_slice_in_dim(state.ids, start, patch, axis=1)
    prompt = jax.lax.dynamic_slice_in_dim(state.ids, start + patch, patch, axis=1)
    uniforms = jax.lax.dynamic_slice_in_dim(rows.uniforms, start, patch, axis=1)

    def choose(logits: Array, i: int) -> Array:
        chosen = choose_ids(logits, uniforms[:, i], mode, numbers, vocab)
        return jnp.where(start + i < rows.lengths, prompt[:, i], chosen)

    cache, chosen = model.decode_round(state.cache, previous, state.round, choose)
    # What a row makes behind its end in its last round is cut off on the host.
    kept = jnp.where(state.done[:, None], vocab.pad_id, chosen)
    ids = jax.lax.dynamic_update_slice_in_dim(state.ids, kept, start + patch, axis=1)
    ended = (chosen == vocab.eos_id).any(axis=1) | (start + patch >= rows.ends)
    return _State(cache, ids, state.round + 1, state.done | ended)


@functools.lru_cache(maxsize=64)
def _full_forward(structure: CompiledModelKey, mode: str) -> Callable[..., Array]:
    @jax.jit
    def step(
        params: list[Array], numbers: SamplerNumbers, uniforms: Array, ids: Array, position: Array
    ) -> Array:
        model = structure.model(params)
        logits = jax.lax.dynamic_index_in_dim(model(ids), position, axis=1, keepdims=False)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, position, axis=1, keepdims=False)
        return choose_ids(logits, uniform, mode, numbers, model.config.vocab)

    return step


def _capacity(model: Any, rows: int) -> int:
    """Positions, a power of two of rounds, for which caches and random numbers fit into memory."""
    batch, stats = max(min_rows(), _power_of_two(rows)), jax.local_devices()[0].memory_stats()
    memory = (stats or {}).get("bytes_limit") or host_memory()

    def size(length: int) -> int:
        leaves = jax.tree.leaves(jax.eval_shape(lambda: model.init_cache(batch, length)))
        return sum(array_bytes(leaf.shape, leaf.dtype) for leaf in leaves) + 8 * batch * length

    length = model.round_length * _LEAST_ROUNDS
    while 2 * length <= 2**30 and size(2 * length) <= memory:
        length *= 2
    return length


def _padded(model: Any, length: int) -> int:
    """`length` bytes as a power of two of rounds, but never past what the model can hold."""
    patch, limit = model.round_length, model.config.longest_input
    padded = patch * max(_LEAST_ROUNDS, _power_of_two(-(-length // patch)))
    return padded if limit is None else min(padded, limit)


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()


def _prompt_ids(
    prompts: Sequence[bytes], vocab: ByteVocab, shape: tuple[int, int], start: int
) -> np.ndarray:
    """int32 of `shape`: each prompt's ids from column `start` on, pads elsewhere."""
    ids = np.full(shape, vocab.pad_id, np.int32)
    for row, prompt in zip(ids, prompts, strict=False):
        codes = np.frombuffer(prompt, np.uint8)
        row[start : start + len(prompt)] = codes.astype(np.int32) + vocab.offset
    return ids


def _new_bytes(ids: np.ndarray, vocab: ByteVocab) -> bytes:
    """The bytes up to end-of-sequence; raises `ValueError` where logits were not finite."""
    ended = np.flatnonzero(ids == vocab.eos_id)
    kept = ids[: ended[0]] if ended.size else ids
    require_sampled(kept.tolist(), vocab)
    return (kept - vocab.offset).astype(np.uint8).tobytes()
