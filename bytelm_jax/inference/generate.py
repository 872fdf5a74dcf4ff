"""Generation: bytes in, bytes out, by cached decoding in one compiled loop (`inference.rounds`).

Axes: B rows, L bytes of the longest sequence, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from bytelm.config import require
from bytelm.generation.automaton import Automaton, start_state
from bytelm.generation.completion import Completion
from bytelm.generation.draft_table import DRAFT_BYTES
from bytelm.sampling import SamplerConfig, check_request
from bytelm.writing import Texts, written_bytes
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.inference.rounds import (
    Run,
    Settings,
    allowed_candidates,
    batch_bytes,
    begin,
    device_memory,
    padded,
    padded_rows,
    prompt_ids,
)
from bytelm_jax.inference.sampling import (
    SamplerNumbers,
    choose_ids,
    random_uniforms,
    split_settings,
)
from bytelm_jax.inference.speculative import Drafter, make_drafter
from bytelm_jax.kernels.decode_choice import decode_form

_DEFAULT = SamplerConfig()
_STOP_CHUNK = 64  # bytes after which stop texts are looked for


def generate(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    sampler: SamplerConfig = _DEFAULT,
    seed: int = 0,
    stop_at_eos: bool = True,
    *,
    speculate: Any = None,
    valid_utf8: bool = False,
    stop: Sequence[bytes] = (),
) -> list[bytes]:
    """Continues each prompt by up to `max_new_bytes`; returns the new bytes alone, in order.

    A row ends at end-of-sequence, which is not returned; `stop_at_eos=False` rules it out, so that
    every row gets exactly `max_new_bytes`. It also ends before the first of the texts `stop`. The
    random numbers depend on `seed` (below 2^32), the row's number and the position, never on the
    other rows. Prompts may be empty and differ in length.

    With `valid_utf8` no byte is written from which the text could not become valid UTF-8, and the
    text ends between characters; one that the prompt leaves unfinished is completed first.

    `speculate` says what drafts bytes that the model then verifies several at a time: "ngram" (what
    followed where the text's end last appeared), a `bytelm.generation.draft_table.DraftTable`,
    "self" (a Byte Latent Transformer's local stacks), or a smaller model. The text is the same as
    without, but where rounding decides between two bytes.

    Raises `ValueError` before anything runs when a row would outgrow the model's `max_length`, and
    for a draft that does not fit the model.
    """
    request = (sampler, seed, stop_at_eos)
    rest: dict[str, Any] = {"speculate": speculate, "valid_utf8": valid_utf8, "stop": stop}
    return [row.text for row in complete(model, prompts, max_new_bytes, *request, **rest)]


def complete(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    sampler: SamplerConfig = _DEFAULT,
    seed: int = 0,
    stop_at_eos: bool = True,
    *,
    speculate: Any = None,
    valid_utf8: bool = False,
    stop: Sequence[bytes] = (),
    log_probs: bool = False,
) -> list[Completion]:
    """As `generate`, with why each text ended, and what speculation did.

    With `log_probs` also the logarithm of each byte's probability under the model, whatever the
    sampler made of it.
    """
    automaton = _check(model, prompts, max_new_bytes, seed, speculate, valid_utf8, stop)
    if not prompts or max_new_bytes == 0:
        empty = np.zeros(0, np.float32) if log_probs else None
        return [Completion(b"", empty, "length", 0, 0, 0)] * len(prompts)
    drafter = make_drafter(model, speculate, max(map(len, prompts)) + max_new_bytes)
    settings = _settings(sampler, stop_at_eos, automaton, drafter, log_probs)
    writing = _Writing(model, prompts, max_new_bytes, settings, seed, stop)
    chunk = _STOP_CHUNK if stop else max_new_bytes + model.round_length
    while not writing.done:
        writing.advance(chunk)
    return writing.completions()


def stream(
    model: Any,
    prompt: bytes,
    max_new_bytes: int,
    sampler: SamplerConfig = _DEFAULT,
    seed: int = 0,
    stop_at_eos: bool = True,
    chunk_bytes: int = 64,
    *,
    speculate: Any = None,
    valid_utf8: bool = False,
    stop: Sequence[bytes] = (),
) -> Iterator[bytes]:
    """As `generate` for one prompt, in pieces of about `chunk_bytes` as the device finishes them.

    The pieces add up to what `generate` returns; no piece is empty. One piece is one device call.
    A piece may end inside a UTF-8 character, and never holds a part of a stop text.
    """
    automaton = _check(model, [prompt], max_new_bytes, seed, speculate, valid_utf8, stop)
    require(chunk_bytes >= 1, f"chunk_bytes={chunk_bytes}: must be at least 1")
    if max_new_bytes == 0:
        return iter(())
    drafter = make_drafter(model, speculate, len(prompt) + max_new_bytes)
    settings = _settings(sampler, stop_at_eos, automaton, drafter, False)
    writing = _Writing(model, [prompt], max_new_bytes, settings, seed, stop)
    whole_rounds = chunk_bytes // model.round_length * model.round_length
    return _pieces(writing, max(1, whole_rounds))


def _pieces(writing: "_Writing", chunk_bytes: int) -> Iterator[bytes]:
    while not writing.done:
        (piece,) = writing.advance(chunk_bytes)
        if piece:
            yield piece


class _Writing:
    """The texts of a batch as they are written: what the device has, and what may be given out."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[bytes],
        max_new_bytes: int,
        settings: Settings,
        seed: int,
        stop: Sequence[bytes],
    ) -> None:
        uniforms = functools.partial(random_uniforms, settings.mode, seed)
        self._run: Run = begin(model, prompts, max_new_bytes, settings, uniforms)
        self._state, self._pads = self._run.state, model.round_length
        self._drafted = DRAFT_BYTES if settings.drafter else 0
        self._texts = Texts(prompts, max_new_bytes, stop, model.config.vocab)

    @property
    def done(self) -> bool:
        """Whether every text is complete."""
        return self._texts.done

    def advance(self, count: int) -> list[bytes]:
        """Writes about `count` bytes in each row; gives what of each text is new and certain."""
        state = self._state
        begun = np.asarray(state.index)
        self._state = state = self._run.advance(state, begun + np.int32(count))
        ids, index, done = (np.asarray(part) for part in (state.ids, state.index, state.done))
        pieces, met = self._texts.read(ids[:, self._pads :], index, done), self._texts.met
        if any(met):
            ended = done.copy()
            ended[: len(met)] |= met
            self._state = state._replace(done=jax.numpy.asarray(ended))
        return pieces

    def completions(self) -> list[Completion]:
        """The texts, once all of them are complete."""
        state = self._state
        ids = np.asarray(state.ids)[:, self._pads :]
        counts = np.asarray(state.rounds), np.asarray(state.accepted), self._drafted
        return self._texts.completions(ids, np.asarray(state.log_probs), *counts)


def generate_uncached(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    sampler: SamplerConfig = _DEFAULT,
    seed: int = 0,
    stop_at_eos: bool = True,
    *,
    valid_utf8: bool = False,
) -> list[bytes]:
    """As `generate`, by a full forward pass for every byte: the reference, slow and plain.

    The pass runs over the sequence so far, padded to a bucket (at most twice the length, or
    16 rounds), and not over the whole length asked for.
    """
    automaton = _check(model, prompts, max_new_bytes, seed, None, valid_utf8, ())
    if not prompts or max_new_bytes == 0:
        return [b""] * len(prompts)
    vocab, lengths = model.config.vocab, np.array([len(prompt) for prompt in prompts])
    first, ends = int(lengths.min()), lengths + max_new_bytes
    ids = prompt_ids(prompts, vocab, (len(prompts), padded(model, int(ends.max()))), 0)
    structure, params = split_cached(model)
    mode, numbers = split_settings(sampler, stop_at_eos)
    uniforms = random_uniforms(mode, seed, *ids.shape)
    full, table = _full_forward(structure, mode), allowed_candidates(automaton, vocab)
    states = np.array([start_state(automaton, prompt) for prompt in prompts])
    done = np.zeros(len(prompts), bool)
    for position in range(first, int(ends.max())):
        past = ids[:, : padded(model, position + 1)]
        allowed = table[np.clip(ends - position, 1, len(table)) - 1, states]
        chosen = np.asarray(full(params, numbers, uniforms, past, np.int32(position), allowed))
        written = np.where(done, vocab.pad_id, chosen)
        is_new = position >= lengths
        ids[:, position] = np.where(is_new, written, ids[:, position])
        after = automaton.step[states, np.clip(ids[:, position] - vocab.offset, 0, 255)]
        states = np.where(is_new, after, states)
        done |= (ids[:, position] == vocab.eos_id) | (position + 1 >= ends)
        if done.all():
            break
    return [
        written_bytes(row[length : length + max_new_bytes], vocab)
        for row, length in zip(ids, lengths, strict=True)
    ]


def _check(
    model: Any,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    seed: int,
    speculate: Any,
    valid_utf8: bool,
    stop: Sequence[bytes],
) -> Automaton:
    """`check_request` with the memory of the device that generates."""
    capacity = functools.partial(_capacity, model, speculate)
    return check_request(model.config, prompts, max_new_bytes, seed, valid_utf8, stop, capacity)


def _settings(
    sampler: SamplerConfig,
    stop_at_eos: bool,
    automaton: Automaton,
    drafter: Drafter | None,
    log_probs: bool,
) -> Settings:
    mode, numbers = split_settings(sampler, stop_at_eos)
    return Settings(mode, numbers, automaton, drafter, log_probs)


@functools.lru_cache(maxsize=64)
def _full_forward(structure: CompiledModelKey, mode: str) -> Callable[..., Array]:
    @jax.jit
    def step(
        params: list[Array],
        numbers: SamplerNumbers,
        uniforms: Array,
        ids: Array,
        position: Array,
        allowed: Array,
    ) -> Array:
        model = structure.model(params)
        logits = jax.lax.dynamic_index_in_dim(model(ids), position, axis=1, keepdims=False)
        uniform = jax.lax.dynamic_index_in_dim(uniforms, position, axis=1, keepdims=False)
        return choose_ids(logits, uniform, mode, numbers, model.config.vocab, allowed)

    return step


def _capacity(model: Any, speculate: Any, rows: int) -> int:
    """Positions, a power of two of rounds, for which caches and random numbers fit into memory."""
    batch, memory = padded_rows(rows), device_memory()
    if decode_form(rows) == "sums":  # a second copy of the weights
        memory -= sum(x.nbytes for x in split_cached(model)[1])
    drafting = speculate not in (None, "none")

    def size(length: int) -> int:
        models = [model, speculate] if hasattr(speculate, "init_cache") else [model]
        return sum(batch_bytes(each, batch, _at_most(each, length), drafting) for each in models)

    length = padded(model, 1)
    while 2 * length <= 2**30 and size(2 * length) <= memory:
        length *= 2
    return length


def _at_most(model: Any, length: int) -> int:
    """`length`, or what the model can hold: a draft's limit is refused elsewhere."""
    return min(length, model.config.longest_input or length)
