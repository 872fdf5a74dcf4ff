"""Continuous batching: texts that join and leave a batch of one shape between short advances.

What a text reads is its own: its row of the caches, its random numbers, its sampler, its constraint
and its end. Its bytes are those of `generate` for its seed, whatever else the batch holds, but
where rounding decides between two of them.

Prompts are read between advances, short ones several at a time and long ones in parts
(`bytelm.serving.prompts`). An advance runs few rows alone if no others are in use. Everything
is compiled before the first request.

Axes: B slots, C bytes of the longest text, P bytes per round, W bytes that one advance can write, K
likely bytes that are reported, S states of the constraints.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bytelm.config import ByteVocab, require
from bytelm.sampling import SamplerConfig
from bytelm.serving.engine import (
    TOP,
    Scores,
    Settings,
    Written,
    both_constraints,
    nothing,
    state_after,
    written_by,
)
from bytelm.serving.prompts import GROUP, PART_BYTES, Pass, Prompts, many
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
from bytelm_jax.layers.caches import positions_from, read_at, take_at

_MOST_BYTES = 512  # of an advance and a row, or one round if that is longer


class _Device(NamedTuple):
    """What stays on the device; programs take it over and give it back."""

    cache: Any
    ids: Array
    """[B, P + C], starting with a round of pads."""
    uniforms: Array
    """[B, C]."""
    logits: Array
    """[B, W, V], those of the last advance."""


class _Host(NamedTuple):
    """What the host knows of every slot, numpy arrays [B].

    A free slot is done, and so is one whose prompt is still to be read.
    """

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
        need = lambda read: batch_bytes(model, self._batch + read, self._length)  # noqa: E731
        size, memory = need(GROUP), device_memory()
        require(
            size <= memory,
            f"slots={slots}: caches of {slots} texts of {self._length} bytes take "
            f"{size / 2**30:.1f} GiB, more than there is; give fewer slots or shorter texts",
        )
        self._many = many(slots) if need(many(slots)) <= memory else GROUP
        self.most_rounds = max(1, _MOST_BYTES // self._patch)
        few = max(padded_rows(1), math.isqrt(self._batch))
        self._counts = sorted({few, self._batch})
        """Rows that an advance may run."""
        self._structure, self._params = split_cached(model)
        constraints = both_constraints()
        allowed = allowed_candidates(constraints, self.config.vocab)
        self._tables = (jnp.asarray(allowed), jnp.asarray(constraints.step))
        self._device = self._empty()
        self._host = _free_slots(self._batch)
        self._caller = ThreadPoolExecutor(1, "bytelm advance")
        self._read = [0] * self._batch
        self._part = min(PART_BYTES // self._patch * self._patch, self._length)
        goes_on = self._part > 0 and model.prefills_in_parts
        self._prompts = Prompts(self._patch, self._part if goes_on else None)

    @property
    def device_bytes(self) -> int:
        """Memory in use on the device; all arrays of this process if it does not say."""
        stats = jax.local_devices()[0].memory_stats() or {}
        used = stats.get("bytes_in_use")
        return sum(array.nbytes for array in jax.live_arrays()) if used is None else used

    def warm_up(self) -> None:
        """Compiles everything but `score`: prompts of every length and what few and all rows do.

        Prompts are read alone, in a group and, where the batch is larger, in half of a batch.
        """
        longest, part = self.capacity - 1, self._prompts.part or self.capacity
        lengths = [min(padded(self._model, 1), longest, part)]
        while lengths[-1] < min(longest, part):
            lengths.append(min(2 * lengths[-1], longest, part))
        if longest > part:
            lengths.append(longest)
        slots = list(dict.fromkeys([0, self.slots - 1, *range(self.slots)]))[: GROUP + 2]
        groups = sorted({1, min(2, self.slots), min(GROUP + 1, self.slots)})
        # No prompt begins like another one, which would be copied; but all of the last ones do.
        numbers = itertools.count()
        for length in lengths:
            for group in groups:
                prompts = [bytes([next(numbers) % 256]) * length for _ in range(group)]
                self._read_and_advance(slots[:group], prompts)
        for group in groups:
            prompt = bytes([next(numbers) % 256]) * lengths[0]
            self._read_and_advance(slots[:1], [prompt])
            self._read_and_advance(slots[1 : 1 + group], [prompt] * group)
        for slot in slots:
            self.leave(slot)
            self._prompts.forget(slot)

    def _read_and_advance(self, slots: Sequence[int], prompts: Sequence[bytes]) -> None:
        settings = Settings(max_new_bytes=1, sampler=SamplerConfig(), seed=0)
        self.join([(*each, settings) for each in zip(slots, prompts, strict=False)])
        while self.read(writing=False):
            pass
        self.advance(1)

    def join(self, texts: Sequence[tuple[int, bytes, Settings]]) -> None:
        """Writes the rows of slots, but for their caches."""
        host = self._host
        for start in range(0, len(texts), self._many):
            some = texts[start : start + self._many]
            prompts = [prompt for _, prompt, _ in some]
            slots = self._nobody(len(some))
            shape = (len(slots), self._patch + self._length)
            ids = prompt_ids(prompts, self.config.vocab, shape, self._patch)
            seeds, samples = np.zeros(len(slots), np.uint32), np.zeros_like(slots)
            for at, (slot, prompt, settings) in enumerate(some):
                slots[at], seeds[at], samples[at] = slot, settings.seed, settings.sample
                self._read[slot] = size = len(prompt)
                host.position[slot] = size // self._patch * self._patch
                host.lengths[slot], host.ends[slot] = size, size + settings.max_new_bytes
                host.done[slot], host.scored[slot] = True, settings.scores
                host.constraint[slot] = state_after(prompt, settings.valid_utf8)
                numbers = numbers_of_a_row(settings.sampler, settings.stop_at_eos)
                for column, number in zip(host.numbers, numbers, strict=True):
                    column[slot] = number
                self._prompts.join(slot, prompt)
            self._device = _join_program()(self._device, slots, ids, seeds, samples)

    def read(self, writing: bool) -> bool:
        """One pass over prompts, and waits for it."""
        work = self._prompts.next(GROUP if writing else self._many)
        if work is None:
            return False
        alone = len(work.slots) == 1 and not work.sources
        slots = self._nobody(len(work.slots))[: 1 if alone else None]
        slots[: len(work.slots)] = work.slots
        if work.sources:
            sources = np.resize(np.array(work.sources, np.int32), len(slots))
            self._device = _copy_program()(self._device, slots, sources)
        else:
            self._device = self._after_pass(work, slots)
        jax.block_until_ready(self._device)
        for slot in self._prompts.done(work):
            self._host.done[slot] = False
        return self._prompts.waiting

    def _nobody(self, count: int) -> np.ndarray:
        """Places for the slots that a program works on; one past the end is nobody's."""
        return np.full(GROUP if count <= GROUP else self._many, self._batch, np.int32)

    def _after_pass(self, work: Pass, slots: np.ndarray) -> _Device:
        """The caches with a part of the prompts of these slots."""
        if work.start:
            program = _further_program(self._structure, self._part)
            return program(self._params, self._device, slots, np.int32(work.start))
        prefix = padded(self._model, max(1, work.size))
        program = _first_program(self._structure, prefix)
        return program(self._params, self._device, slots)

    def leave(self, slot: int) -> None:
        """Frees a slot."""
        self._host.done[slot] = True
        self._prompts.leave(slot)

    def advance(
        self, rounds: int, meanwhile: Callable[[], None] = nothing
    ) -> tuple[list[Written], int]:
        """Writes rounds of every text until all have ended, and waits for them."""
        host = self._host
        busy = np.flatnonzero(~host.done).tolist()
        if not busy:
            meanwhile()
            return [], 0
        count = next(count for count in self._counts if busy[-1] - busy[0] < count)
        first = min(busy[0], self._batch - count)
        # Copies: the arrays that were given may be read after the call has returned.
        given = jax.tree.map(lambda column: column[first : first + count].copy(), host)
        program = _advance_program(self._structure, self.most_rounds)
        # On a GPU the host takes part in loops, so that the call returns as the device is done.
        called = self._caller.submit(
            program, self._params, self._device, given, self._tables, np.int32(first),
            np.int32(rounds),
        )  # fmt: skip
        meanwhile()
        self._device, out = called.result()
        scores = out.scores if host.scored[busy].any() else None
        # All of it at once: each part would be waited for.
        index, done, constraint, made, ids, scores = jax.device_get((*out[:-1], scores))
        written = []
        for slot in busy:
            row, at = slot - first, int(host.position[slot])
            start = self._read[slot] - at
            end = min(int(index[row]), int(host.ends[slot])) - at
            mine = None
            if scores is not None and host.scored[slot]:
                mine = Scores(*(part[row, start:end] for part in scores))
            fresh = ids[row, start : max(start, end)]
            written.append(written_by(slot, fresh, bool(done[row]), mine, self.config.vocab))
            self._read[slot] += len(fresh)
        # Of the others not even the constraint stays as it was.
        rows = np.array(busy) - first
        host.position[busy], host.done[busy] = index[rows], done[rows]
        host.constraint[busy] = constraint[rows]
        for each in written:
            if each.error:
                host.done[each.slot] = True
                self._prompts.forget(each.slot)
        return written, int(made)

    def score(self, text: bytes) -> Scores:
        """A full forward pass over the text, padded to a power of two."""
        ids = prompt_ids([text], self.config.vocab, (1, padded(self._model, max(1, len(text)))), 0)
        found = _score_program(self._structure)(self._params, ids)
        return Scores(*(np.asarray(part)[0, : len(text)] for part in found))

    def _empty(self) -> _Device:
        """Nothing in any slot."""
        ids = jnp.full(
            (self._batch, self._patch + self._length), self.config.vocab.pad_id, jnp.int32
        )
        cache = prefill_program(self._structure, False)(self._params, ids[:, self._patch :], 0)
        uniforms = jnp.zeros((self._batch, self._length), jnp.float32)
        shape = (self._batch, self.most_rounds * self._patch, self.config.vocab.size)
        wide = jnp.result_type(jnp.float32, *self._params)
        return _Device(cache, ids, uniforms, jnp.zeros(shape, wide))


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
    def join(device: _Device, slots: Array, ids: Array, seeds: Array, samples: Array) -> _Device:
        """Overwrites the ids and random numbers of rows, so that nothing is left in them."""
        length = device.uniforms.shape[1]
        uniforms = jax.vmap(lambda seed, row: random_row(seed, row, length))(seeds, samples)
        ids, uniforms = _put((device.ids, device.uniforms), (ids, uniforms), slots)
        return device._replace(ids=ids, uniforms=uniforms)

    return join


@functools.lru_cache(maxsize=1)
def _copy_program() -> Callable[..., _Device]:
    @functools.partial(jax.jit, donate_argnums=0)
    def copy(device: _Device, slots: Array, sources: Array) -> _Device:
        rows = _rows_at(device.cache, sources)
        return device._replace(cache=_put(device.cache, rows, slots))

    return copy


@functools.lru_cache(maxsize=64)
def _first_program(structure: CompiledModelKey, prefix: int) -> Callable[..., _Device]:
    @functools.partial(jax.jit, donate_argnums=1)
    def first(params: list[Array], device: _Device, slots: Array) -> _Device:
        """Overwrites all of the rows, so that nothing of the texts before is left in them."""
        model = structure.model(params)
        patch, length = model.round_length, device.uniforms.shape[1]
        ids = _rows_at(device.ids, slots)[:, patch : patch + prefix]
        rows = model.prefill(ids, model.init_cache(len(slots), length))
        return device._replace(cache=_put(device.cache, rows, slots))

    return first


@functools.lru_cache(maxsize=8)
def _further_program(structure: CompiledModelKey, part: int) -> Callable[..., _Device]:
    @functools.partial(jax.jit, donate_argnums=1)
    def further(params: list[Array], device: _Device, slots: Array, start: Array) -> _Device:
        model = structure.model(params)
        rows, starts = _rows_at(device.cache, slots), jnp.full(len(slots), start)
        # The ids start with a round of pads, so that this is the round before.
        previous = read_at(_rows_at(device.ids, slots), starts, part)
        rows = model.prefill_further(previous, rows, starts // model.round_length)
        return device._replace(cache=_put(device.cache, rows, slots))

    return further


def _rows_at(buffers: Any, slots: Array) -> Any:
    """Rows of every array of a tree; any row for a slot past the end."""
    take = lambda buffer: buffer.at[slots].get(mode="clip") if buffer.ndim else buffer  # noqa: E731
    return jax.tree.map(take, buffers)


def _rows_from(buffer: Array, first: Array, count: int) -> Array:
    """`count` rows of an array that has rows."""
    return jax.lax.dynamic_slice_in_dim(buffer, first, count) if buffer.ndim else buffer


def _put_rows_from(buffer: Array, new: Array, first: Array) -> Array:
    """The array with these rows from `first` on."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, first, 0) if buffer.ndim else buffer


def _put(buffers: Any, rows: Any, slots: Array) -> Any:
    """The arrays of a tree with these rows; a slot past the end is dropped."""

    def put(buffer: Array, new: Array) -> Array:
        # An array without rows is a count that no row reads.
        return buffer.at[slots].set(new, mode="drop") if buffer.ndim else buffer

    return jax.tree.map(put, buffers, rows)


@functools.lru_cache(maxsize=8)
def _advance_program(structure: CompiledModelKey, most_rounds: int) -> Callable[..., Any]:
    """Rounds of every row that is not done; compiled once for a model and a number of slots."""

    @functools.partial(jax.jit, donate_argnums=1)
    def advance(
        params: list[Array], whole: _Device, host: _Host, tables: Any, first: Array, rounds: Array
    ) -> tuple[_Device, _Out]:
        """Advances as many rows as `host` has, from row `first` on."""
        model = structure.model(params)
        vocab, patch, batch = model.config.vocab, model.round_length, host.position.shape[0]
        device = jax.tree.map(lambda buffer: _rows_from(buffer, first, batch), whole)
        width = most_rounds * patch
        # Who is not there must not make the others wait for ranks.
        numbers = jax.tree.map(
            lambda mine, free: jnp.where(host.done[:, None], free, mine),
            host.numbers,
            numbers_of_a_row(SamplerConfig()),
        )
        rows = Rows(device.uniforms, host.lengths, host.ends, numbers, *tables)
        zeros, nothing = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, 0), jnp.float32)
        start = jnp.asarray(host.position)
        done, constraint = jnp.asarray(host.done), jnp.asarray(host.constraint)
        begun = State(device.cache, device.ids, start, done, constraint, nothing, zeros, zeros, ())

        def unfinished(carry: tuple[State, Array, Array]) -> Array:
            return (~carry[0].done).any() & (carry[2] < rounds)

        def body(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
            state, logits, number = carry
            heard: list[Array] = []
            state = append_round(model, "mixed", rows, state, lambda each, _: heard.append(each))
            # All rows that are written have come as far; what others leave there, nobody reads.
            at, new = (0, number * patch, 0), jnp.stack(heard, axis=1).astype(logits.dtype)
            return state, jax.lax.dynamic_update_slice(logits, new, at), number + 1

        carry = (begun, device.logits, jnp.int32(0))
        state, logits, count = jax.lax.while_loop(unfinished, body, carry)
        fresh = take_at(state.ids, positions_from(start + patch, width))
        # Asked once an advance: on a GPU, the host waits for whatever it asks.
        wanted, found = (host.scored & ~host.done).any(), lambda: _scores_of(logits, fresh, vocab)
        scores = jax.lax.cond(wanted, found, lambda: _no_scores((batch, width)))
        out = _Out(state.index, state.done, state.constraint, count, fresh, scores)
        new = device._replace(cache=state.cache, ids=state.ids, logits=logits)
        put = lambda buffer, rows: _put_rows_from(buffer, rows, first)  # noqa: E731
        return jax.tree.map(put, whole, new), out

    return advance


@functools.lru_cache(maxsize=8)
def _score_program(structure: CompiledModelKey) -> Callable[..., Scores]:
    @jax.jit
    def score(params: list[Array], ids: Array) -> Scores:
        model = structure.model(params)
        return _scores_of(model(ids), ids, model.config.vocab)

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


def _scores_of(logits: Array, ids: Array, vocab: ByteVocab) -> Scores:
    """`_scores` of rows of ids [B, L]."""
    found = _scores(logits.reshape(-1, logits.shape[-1]), ids.reshape(-1), vocab)
    return jax.tree.map(lambda leaf: leaf.reshape(*ids.shape, *leaf.shape[1:]), found)


def _no_scores(shape: tuple[int, ...]) -> Scores:
    many = (*shape, TOP)
    parts = jnp.zeros(shape, jnp.float32), jnp.zeros(many, jnp.int32), jnp.zeros(many, jnp.float32)
    return Scores(*parts)  # type: ignore[arg-type]
