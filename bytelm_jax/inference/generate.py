"""Samplers and cached decoding: bytes in, bytes out, one compiled loop on the device.

Axes: B rows, L bytes of the longest sequence, P bytes per round, V vocabulary, S candidates.

A round appends P bytes to every row, so all rows share one position. Generation starts at the last
whole round of the shortest prompt; a row still inside its prompt takes the prompt's bytes and drops
the sampled ones. So a patch that a prompt leaves half full is replayed and is no special case.

Batches, prompts and sequences are padded to powers of two, and parameters and the sampler's numbers
are arguments of the compiled programs, so that a few programs serve every call.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bytelm.config import ByteVocab, require
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.kernels.decoding import min_rows

_NO_LIMIT = 2**31 - 1
_LEAST_ROUNDS = 16  # the smallest bucket: short prompts and short answers share one program


_DEFAULT = SamplerConfig()


class _Numbers(NamedTuple):
    """What may change from call to call without a new program."""

    allow_eos: bool
    temperature: float
    top_k: int
    top_p: float
    low: float
    medium: float
    high: float


def _settings(sampler: SamplerConfig, allow_eos: bool = True) -> tuple[str, _Numbers]:
    """`sampler` as what the program is (greedy, plain or ranked) and what it is given."""
    s = sampler
    mixed = s.sampler == "entropy"
    cut = mixed or s.top_k or s.top_p < 1
    mode = "greedy" if s.sampler == "greedy" or s.temperature == 0 else "ranked" if cut else "plain"
    # Thresholds that no entropy meets make categorical of entropy; a cumulative sum may pass 1 by
    # rounding, and top_p=1 must cut nothing.
    thresholds = (s.entropy_low, s.entropy_medium, s.entropy_high)
    return mode, _Numbers(
        allow_eos,
        s.temperature,
        min(s.top_k or _NO_LIMIT, _NO_LIMIT),
        s.top_p if s.top_p < 1 else math.inf,
        *(thresholds if mixed else (-math.inf, -math.inf, math.inf)),
    )


def probabilities(logits: Float[Array, "B S"], sampler: SamplerConfig) -> Float[Array, "B S"]:
    """The distribution that `sampler` draws from, in at least float32. Logits may be −inf."""
    return _probabilities(logits, *_settings(sampler))


def _probabilities(logits: Array, mode: str, numbers: _Numbers) -> Array:
    size = logits.shape[-1]
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if mode == "greedy":
        return jax.nn.one_hot(logits.argmax(axis=-1), size, dtype=logits.dtype)
    # The maximum goes first: a small temperature must not make infinities of finite logits.
    relative = logits - logits.max(axis=-1, keepdims=True)
    if mode == "plain":
        return jax.nn.softmax(relative / numbers.temperature, axis=-1)
    nats = jax.scipy.special.entr(jax.nn.softmax(logits, axis=-1)).sum(axis=-1, keepdims=True)
    bits = nats / math.log(2)
    limit = jnp.where(bits < numbers.low, 1, jnp.where(bits < numbers.medium, 10, numbers.top_k))
    cooling = jnp.where(bits > numbers.high, 0.8 * numbers.temperature, numbers.temperature)
    # All pairs and no sort or scan, here and in `sample`: these are compiled once for every byte of
    # a round and dominate its compile time, while S² comparisons fuse into one reduction.
    mine, other = logits[:, :, None], logits[:, None, :]
    ahead = (other > mine) | ((other == mine) & np.tri(size, k=-1, dtype=bool)[None])
    kept = ahead.sum(axis=-1) < jnp.minimum(limit, numbers.top_k)
    chances = jax.nn.softmax(relative / cooling, axis=-1, where=kept)
    likelier = jnp.where(ahead, chances[:, None, :], 0).sum(axis=-1)
    chances = jnp.where(likelier < numbers.top_p, chances, 0)
    return chances / chances.sum(axis=-1, keepdims=True)


def sample(chances: Float[Array, "B S"], uniform: Float[Array, " B"]) -> Int[Array, " B"]:
    """One index a row by inversion of the cumulative sum; `uniform` lies in [0, 1).

    What has probability 0 is never drawn, whatever the rounding of the sum.
    """
    size = chances.shape[-1]
    lower = np.tri(size, k=-1, dtype=bool)[None]
    below = jnp.where(lower, chances[:, None, :], 0).sum(axis=-1)
    target = uniform.astype(chances.dtype) * chances.sum(axis=-1)
    reached = (below <= target[:, None]) & (chances > 0)
    return jnp.where(reached, jnp.arange(size)[None], 0).max(axis=-1)


def next_ids(
    logits: Float[Array, "B V"],
    uniform: Float[Array, " B"],
    sampler: SamplerConfig,
    vocab: ByteVocab,
    allow_eos: bool = True,
) -> Int[Array, " B"]:
    """The ids that follow: a byte's id or, if allowed, `vocab.eos_id`, and never another."""
    return _next_ids(logits, uniform, *_settings(sampler, allow_eos), vocab)


def _next_ids(
    logits: Array, uniform: Array, mode: str, numbers: _Numbers, vocab: ByteVocab
) -> Array:
    # The candidates: a slice of the vocabulary, with the other specials in it ruled out.
    low = min(vocab.offset, vocab.eos_id)
    high = max(vocab.offset + 256, vocab.eos_id + 1)
    ids = np.arange(low, high)[None]
    is_byte = (ids >= vocab.offset) & (ids < vocab.offset + 256)
    allowed = is_byte | (ids == vocab.eos_id) & numbers.allow_eos
    logits = jnp.where(allowed, jax.lax.slice_in_dim(logits, low, high, axis=-1), -jnp.inf)
    if mode == "greedy":
        chosen = logits.argmax(axis=-1)
    else:
        chosen = sample(_probabilities(logits, mode, numbers), uniform)
    return (chosen + low).astype(jnp.int32)


def _uniforms(mode: str, seed: int, batch: int, length: int) -> Array | np.ndarray:
    """[B, L] numbers in [0, 1) that depend on the seed, the row and the position alone."""
    if mode == "greedy":  # nobody reads them, and the program that makes them takes a second
        return np.zeros((batch, length), np.float32)
    return _random_table(jax.random.key(seed), batch, length)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_table(key: Array, batch: int, length: int) -> Array:
    def number(row: Array, position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), position))

    by_position = jax.vmap(number, (None, 0))
    return jax.vmap(by_position, (0, None))(jnp.arange(batch), jnp.arange(length))


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
    _check(model, prompts, max_new_bytes, seed)
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
    _check(model, [prompt], max_new_bytes, seed)
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
    _check(model, prompts, max_new_bytes, seed)
    if not prompts or max_new_bytes == 0:
        return [b""] * len(prompts)
    vocab, lengths = model.config.vocab, np.array([len(prompt) for prompt in prompts])
    first, last = int(lengths.min()), int(lengths.max()) + max_new_bytes
    ids = _prompt_ids(prompts, vocab, (len(prompts), _padded(model, last)), 0)
    structure, params = split_cached(model)
    mode, numbers = _settings(sampler, stop_at_eos)
    uniforms = _uniforms(mode, seed, *ids.shape)
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
    index: Array
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
    mode, numbers = _settings(sampler, stop_at_eos)
    append = _append_rounds(structure, mode)
    rows = _Rows(_uniforms(mode, seed, batch, length), lengths, ends)
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
        params: list[Array], numbers: _Numbers, rows: _Rows, stop: Array, state: _State
    ) -> _State:
        model = structure.model(params)

        def unfinished(state: _State) -> Array:
            return (state.index < stop) & ~state.done.all()

        def body(state: _State) -> _State:
            return _append_round(model, mode, numbers, rows, state)

        return jax.lax.while_loop(unfinished, body, state)

    return append


def _append_round(model: Any, mode: str, numbers: _Numbers, rows: _Rows, state: _State) -> _State:
    patch, vocab = model.round_length, model.config.vocab
    start = state.index * patch
    previous = jax.lax.dynamic_slice_in_dim(state.ids, start, patch, axis=1)
    prompt = jax.lax.dynamic_slice_in_dim(state.ids, start + patch, patch, axis=1)
    uniforms = jax.lax.dynamic_slice_in_dim(rows.uniforms, start, patch, axis=1)

    def choose(logits: Array, i: int) -> Array:
        chosen = _next_ids(logits, uniforms[:, i], mode, numbers, vocab)
        return jnp.where(start + i < rows.lengths, prompt[:, i], chosen)

    cache, chosen = model.decode_round(state.cache, previous, state.index, choose)
    # What a row makes behind its end in its last round is cut off on the host.
    kept = jnp.where(state.done[:, None], vocab.pad_id, chosen)
    ids = jax.lax.dynamic_update_slice_in_dim(state.ids, kept, start + patch, axis=1)
    ended = (chosen == vocab.eos_id).any(axis=1) | (start + patch >= rows.ends)
    return _State(cache, ids, state.index + 1, state.done | ended)


@functools.lru_cache(maxsize=64)
def _full_forward(structure: CompiledModelKey, mode: str) -> Callable[..., Array]:
    @jax.jit
    def step(
        params: list[Array], numbers: _Numbers, uniforms: Array, ids: Array, position: Array
    ) -> Array:
        model = structure.model(params)
        logits = jax.lax.dynamic_index_in_dim(model(ids), position, axis=1, keepdims=False)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, position, axis=1, keepdims=False)
        return _next_ids(logits, uniform, mode, numbers, model.config.vocab)

    return step


def _check(model: Any, prompts: Sequence[bytes], max_new_bytes: int, seed: int) -> None:
    """Everything that can be refused, before anything is built."""
    require(max_new_bytes >= 0, f"max_new_bytes={max_new_bytes}: must be at least 0")
    require(0 <= seed < 2**32, f"seed={seed}: choose one from 0 to {2**32 - 1}")
    longest = max(map(len, prompts), default=0)
    limit = model.config.longest_input
    if limit is not None and longest + max_new_bytes > limit:
        raise ValueError(
            f"prompts: {longest} bytes and max_new_bytes={max_new_bytes} make "
            f"{longest + max_new_bytes}, but this model has max_length={limit} positions; "
            'shorten them, or train with a larger max_length or variant="in_action"'
        )


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
    """The bytes up to end-of-sequence."""
    ended = np.flatnonzero(ids == vocab.eos_id)
    kept = ids[: ended[0]] if ended.size else ids
    return (kept - vocab.offset).astype(np.uint8).tobytes()
