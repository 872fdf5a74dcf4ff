"""Continuous batching: texts that join and leave a batch of one shape between short advances.

What a text reads is its own: its row of the caches, its random numbers, its sampler, its constraint
and its end. Its bytes are those of `generate` for its seed, whatever else the batch holds, but
where rounding decides between two of them.

A prompt is read in one pass, between advances; samples of one prompt read it once. Everything is
compiled before the first request.

Axes: B slots, C bytes of the longest text, P bytes per round, W bytes that one advance can write, K
likely bytes that are reported, S states of the constraints.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bytelm.config import ByteVocab, require
from bytelm.sampling import SamplerConfig, require_sampled
from bytelm.serving.engine import (
    TOP,
    Scores,
    Settings,
    Written,
    both_constraints,
    nothing,
    state_after,
)
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.inference.rounds import (
    Rows,
    State,
    allowed_candidates,
    append_round,
    batch_bytes,
    device_memory,
    padded,
    padded_rows,
    prefill_program,
    prompt_ids,
)
from bytelm_jax.inference.sampling import (
    SamplerNumbers,
    candidate_columns,
    numbers_of_a_row,
    random_row,
)
from bytelm_jax.layers.caches import positions_from, take_at, write_at

_MOST_BYTES = 256  # of an advance and a row, or one round if that is longer


class _Device(NamedTuple):
    """What stays on the device; programs take it over and give it back."""

    cache: Any
    ids: Array
    """[B, P + C], starting with a round of pads."""
    uniforms: Array
    """[B, C]."""


class _Host(NamedTuple):
    """What the host knows of every slot, numpy arrays [B]; a free slot is done."""

    position: np.ndarray
    """Of the next byte."""
    lengths: np.ndarray
    ends: np.ndarray
    done: np.ndarray
    constraint: np.ndarray
    scored: np.ndarray
    numbers: Any
    """`SamplerNumbers` of arrays [B, 1]."""


class _Out(NamedTuple):
    """What an advance reports: every row's new position, done and constraint [B], and its bytes."""

    position: Array
    done: Array
    constraint: Array
    rounds: Array
    """The rounds that were run."""
    ids: Array
    """[B, W], from the position before the advance on."""
    scores: Scores
    """[B, W] and [B, W, K]; zeros if nobody asked for them."""


class JaxSlots:
    """`bytelm.serving.engine.Engine` of a model.

    Raises `ValueError` if caches of so many texts of `capacity` bytes do not fit into memory.
    """

    def __init__(self, model: Any, slots: int, capacity: int) -> None:
        require(model.config.causal, "causal=False: generation needs a causal model")
        self._model, self.config, self.slots = model, model.config, slots
        limit = self.config.longest_input
        self.capacity = capacity if limit is None else min(capacity, limit)
        self._patch, self._length = model.round_length, padded(model, self.capacity)
        self._batch = max(padded_rows(1), slots)
        size = batch_bytes(model, self._batch, self._length)
        require(
            size <= device_memory(),
            f"slots={slots}: caches of {slots} texts of {self._length} bytes take "
            f"{size / 2**30:.1f} GiB, more than there is; give fewer slots or shorter texts",
        )
        self.most_rounds = max(1, _MOST_BYTES // self._patch)
        self._structure, self._params = split_cached(model)
        constraints = both_constraints()
        allowed = allowed_candidates(constraints, self.config.vocab)
        self._tables = (jnp.asarray(allowed), jnp.asarray(constraints.step))
        self._device = self._empty()
        self._host = _free_slots(self._batch)
        self._read = [0] * self._batch
        self._last: tuple[bytes, Any, Any] | None = None

    @property
    def device_bytes(self) -> int:
        """Memory in use on the device; all arrays of this process if it does not say."""
        stats = jax.local_devices()[0].memory_stats() or {}
        used = stats.get("bytes_in_use")
        return sum(array.nbytes for array in jax.live_arrays()) if used is None else used

    def warm_up(self) -> None:
        """Compiles everything but `score`."""
        settings = Settings(max_new_bytes=1, sampler=SamplerConfig(), seed=0)
        longest = self.capacity - 1
        lengths, length = [0], padded(self._model, 1)
        while lengths[-1] < longest:
            lengths.append(min(length, longest))
            length *= 2
        for length in lengths:
            self.join(0, b"\0" * length, settings)
        self.advance(1)
        self.leave(0)
        self._last = None

    def join(self, slot: int, prompt: bytes, settings: Settings) -> None:
        """Reads the prompt, unless the last one to join was the same, and writes the slot's row."""
        cache, ids = self._prefilled(prompt)
        uniforms = random_row(np.uint32(settings.seed), np.int32(settings.sample), self._length)
        self._device = _join_program()(self._device, np.int32(slot), cache, ids, uniforms)
        host, size = self._host, len(prompt)
        host.position[slot] = size // self._patch * self._patch
        host.lengths[slot], host.ends[slot] = size, size + settings.max_new_bytes
        host.done[slot], host.scored[slot] = False, settings.scores
        host.constraint[slot] = state_after(prompt, settings.valid_utf8)
        numbers = numbers_of_a_row(settings.sampler, settings.stop_at_eos)
        for column, number in zip(host.numbers, numbers, strict=True):
            column[slot] = number
        self._read[slot] = size

    def leave(self, slot: int) -> None:
        """Frees a slot."""
        self._host.done[slot] = True

    def advance(
        self, rounds: int, meanwhile: Callable[[], None] = nothing
    ) -> tuple[list[Written], int]:
        """Writes rounds of every text until all have ended, and waits for them."""
        program = _advance_program(self._structure, self.most_rounds)
        host = self._host
        # Copies: the arrays that were given may be read after the call has returned.
        given = jax.tree.map(np.copy, host)
        self._device, out = program(
            self._params, self._device, given, self._tables, np.int32(rounds)
        )
        meanwhile()
        jax.block_until_ready(out)
        index, done, constraint, ids = (
            np.array(part) for part in (out.position, out.done, out.constraint, out.ids)
        )
        busy = np.flatnonzero(~host.done)
        scores = None
        if host.scored[busy].any():
            scores = Scores(*(np.asarray(part) for part in out.scores))
        written = []
        for slot in busy.tolist():
            start = self._read[slot] - int(host.position[slot])
            end = min(int(index[slot]), int(host.ends[slot])) - int(host.position[slot])
            mine = None if scores is None or not host.scored[slot] else scores
            written.append(self._written(slot, ids[slot], start, end, bool(done[slot]), mine))
            self._read[slot] += max(0, end - start)
        failed = [each.slot for each in written if each.error]
        done[failed] = True
        self._host = host._replace(position=index, done=done, constraint=constraint)
        return written, int(out.rounds)

    def score(self, text: bytes) -> Scores:
        """A full forward pass over the text, padded to a power of two."""
        ids = prompt_ids([text], self.config.vocab, (1, padded(self._model, max(1, len(text)))), 0)
        found = _score_program(self._structure)(self._params, ids)
        return Scores(*(np.asarray(part)[0, : len(text)] for part in found))

    def _written(
        self, slot: int, ids: np.ndarray, start: int, end: int, done: bool, scores: Scores | None
    ) -> Written:
        """The new bytes of a row, which are `ids[start:end]` up to its end of sequence."""
        vocab, fresh = self.config.vocab, ids[start:end]
        at_eos = np.flatnonzero(fresh == vocab.eos_id)
        kept = fresh[: at_eos[0]] if at_eos.size else fresh
        why = ("eos" if at_eos.size else "length") if done else None
        try:
            require_sampled(kept.tolist(), vocab)
        except ValueError as error:
            return Written(slot, b"", None, None, str(error))
        mine = None
        if scores is not None:
            mine = Scores(*(part[slot, start : start + len(kept)] for part in scores))
        return Written(slot, (kept - vocab.offset).astype(np.uint8).tobytes(), mine, why)

    def _prefilled(self, prompt: bytes) -> tuple[Any, Any]:
        """One row's cache and ids, with the prompt."""
        if self._last is not None and self._last[0] == prompt:
            return self._last[1:]
        patch, rows = self._patch, padded_rows(1)
        ids = prompt_ids([prompt], self.config.vocab, (rows, patch + self._length), patch)
        start = len(prompt) // patch * patch
        prefix = padded(self._model, start) if start else 0
        program = prefill_program(self._structure, False)
        self._last = (prompt, program(self._params, ids[:, patch:], prefix), ids[0])
        return self._last[1:]

    def _empty(self) -> _Device:
        """Nothing in any slot."""
        ids = jnp.full(
            (self._batch, self._patch + self._length), self.config.vocab.pad_id, jnp.int32
        )
        cache = prefill_program(self._structure, False)(self._params, ids[:, self._patch :], 0)
        return _Device(cache, ids, jnp.zeros((self._batch, self._length), jnp.float32))


def _free_slots(batch: int) -> _Host:
    zeros = lambda: np.zeros(batch, np.int32)  # noqa: E731
    numbers = [np.full((batch, 1), value) for value in numbers_of_a_row(SamplerConfig())]
    kinds = [np.bool_, np.float32, np.int32, *[np.float32] * 4]
    columns: Any = [n.astype(kind) for n, kind in zip(numbers, kinds, strict=True)]
    done, scored = np.ones(batch, bool), np.zeros(batch, bool)
    return _Host(zeros(), zeros(), zeros(), done, zeros(), scored, SamplerNumbers(*columns))


@functools.lru_cache(maxsize=1)
def _join_program() -> Callable[..., _Device]:
    @functools.partial(jax.jit, donate_argnums=0)
    def join(device: _Device, slot: Array, cache: Any, ids: Array, uniforms: Array) -> _Device:
        """Overwrites all of a row, so that nothing of the text before it is left."""

        def put(buffer: Array, row: Array) -> Array:
            if buffer.ndim == 0:  # a count that no row reads
                return buffer
            return jax.lax.dynamic_update_slice_in_dim(buffer, row[:1], slot, axis=0)

        rows = (cache, ids[None], uniforms[None])
        return _Device(*jax.tree.map(put, tuple(device), rows))

    return join


@functools.lru_cache(maxsize=8)
def _advance_program(structure: CompiledModelKey, most_rounds: int) -> Callable[..., Any]:
    """Rounds of every row that is not done; compiled once for a model and a number of slots."""

    @functools.partial(jax.jit, donate_argnums=1)
    def advance(
        params: list[Array], device: _Device, host: _Host, tables: Any, rounds: Array
    ) -> tuple[_Device, _Out]:
        model = structure.model(params)
        vocab, patch, batch = model.config.vocab, model.round_length, host.position.shape[0]
        width = most_rounds * patch
        rows = Rows(device.uniforms, host.lengths, host.ends, host.numbers, *tables)
        zeros, nothing = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, 0), jnp.float32)
        start = jnp.asarray(host.position)
        done, constraint = jnp.asarray(host.done), jnp.asarray(host.constraint)
        begun = State(device.cache, device.ids, start, done, constraint, nothing, zeros, zeros, ())
        wanted = (host.scored & ~host.done).any()

        def unfinished(carry: tuple[State, Scores, Array]) -> Array:
            return (~carry[0].done).any() & (carry[2] < rounds)

        def body(carry: tuple[State, Scores, Array]) -> tuple[State, Scores, Array]:
            state, scores, number = carry
            heard: list[Scores] = []

            def observe(logits: Array, chosen: Array) -> None:
                found = lambda: _scores(logits, chosen, vocab)  # noqa: E731
                empty = lambda: _no_scores((batch,))  # noqa: E731
                heard.append(jax.lax.cond(wanted, found, empty))

            at = state.index - start
            state = append_round(model, "mixed", rows, state, observe)
            new = jax.tree.map(lambda *each: jnp.stack(each, axis=1), *heard)
            return state, write_at(scores, new, at), number + 1

        carry = (begun, _no_scores((batch, width)), jnp.int32(0))
        state, scores, count = jax.lax.while_loop(unfinished, body, carry)
        ids = take_at(state.ids, positions_from(start + patch, width))
        out = _Out(state.index, state.done, state.constraint, count, ids, scores)
        return _Device(state.cache, state.ids, device.uniforms), out

    return advance


@functools.lru_cache(maxsize=8)
def _score_program(structure: CompiledModelKey) -> Callable[..., Scores]:
    @jax.jit
    def score(params: list[Array], ids: Array) -> Scores:
        model = structure.model(params)
        logits = model(ids)
        found = _scores(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1), model.config.vocab)
        return jax.tree.map(lambda leaf: leaf.reshape(*ids.shape, *leaf.shape[1:]), found)

    return score


def _scores(logits: Array, ids: Array, vocab: ByteVocab) -> Scores:
    """The logarithm of each id's probability [N], and the most likely candidates."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logs = jax.nn.log_softmax(wide, axis=-1).astype(jnp.float32)
    mine = jnp.take_along_axis(logs, ids[:, None], axis=-1)[:, 0]
    columns, low = candidate_columns(vocab), min(vocab.offset, vocab.eos_id)
    among = jax.lax.slice_in_dim(logs, low, low + len(columns), axis=-1)
    values, places = jax.lax.top_k(jnp.where((columns >= 0)[None], among, -jnp.inf), TOP)
    return Scores(mine, jnp.asarray(columns, jnp.int32)[places], values)  # type: ignore[arg-type]


def _no_scores(shape: tuple[int, ...]) -> Scores:
    many = (*shape, TOP)
    parts = jnp.zeros(shape, jnp.float32), jnp.zeros(many, jnp.int32), jnp.zeros(many, jnp.float32)
    return Scores(*parts)  # type: ignore[arg-type]
