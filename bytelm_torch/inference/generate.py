"""Generation: bytes in, bytes out, by cached decoding (`inference.rounds`).

The mirror of `bytelm_jax/inference/generate.py`. Axes: B rows, L bytes of the longest sequence, V
vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from bytelm.config import require
from bytelm.generation.automaton import Automaton, start_state
from bytelm.generation.completion import Completion
from bytelm.generation.draft_table import DRAFT_BYTES
from bytelm.memory import host_memory
from bytelm.sampling import SamplerConfig, check_request
from bytelm.writing import Texts, written_bytes
from bytelm_torch.inference.rounds import (
    Run,
    Settings,
    allowed_candidates,
    begin,
    device_of,
    prompt_ids,
)
from bytelm_torch.inference.sampling import choose_ids, random_uniforms
from bytelm_torch.inference.speculative import Drafter, make_drafter
from bytelm_torch.models.interface import inference

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
    """As `generate` for one prompt, in pieces of about `chunk_bytes` as rounds finish.

    The pieces add up to what `generate` returns; no piece is empty. A piece may end
    inside a UTF-8 character, and never holds a part of a stop text.
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
        uniforms = partial(random_uniforms, seed)
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
        self._state = state = self._run.advance(state, state.index + count)
        ids, index, done = (_on_host(part) for part in (state.ids, state.index, state.done))
        pieces, met = self._texts.read(ids[:, self._pads :], index, done), self._texts.met
        if any(met):
            met = torch.tensor(met, device=state.done.device)
            self._state = state._replace(done=state.done | met)
        return pieces

    def completions(self) -> list[Completion]:
        """The texts, once all of them are complete."""
        state = self._state
        ids = _on_host(state.ids)[:, self._pads :]
        counts = _on_host(state.rounds), _on_host(state.accepted), self._drafted
        return self._texts.completions(ids, _on_host(state.log_probs), *counts)


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
    """As `generate`, by a full forward pass for every byte: the reference, slow and plain."""
    automaton = _check(model, prompts, max_new_bytes, seed, None, valid_utf8, ())
    if not prompts or max_new_bytes == 0:
        return [b""] * len(prompts)
    vocab, device, batch = model.config.vocab, device_of(model), len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    first, ends = int(lengths.min()), lengths + max_new_bytes
    ids = prompt_ids(prompts, vocab, (batch, int(ends.max())), 0).to(device)
    uniforms = random_uniforms(seed, batch, int(ends.max())).to(device)
    table = torch.from_numpy(allowed_candidates(automaton, vocab, stop_at_eos)).to(device)
    step = torch.from_numpy(automaton.step.astype(np.int64)).to(device)
    states = torch.tensor([start_state(automaton, prompt) for prompt in prompts], device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    with inference(model):
        for position in range(first, int(ends.max())):
            logits = model(ids[:, : position + 1])[:, position]
            left = (ends - position).clamp(1, len(table))
            allowed = table if table.ndim == 1 else table[left - 1, states]
            chosen = choose_ids(logits, uniforms[:, position], sampler, vocab, allowed)
            is_new = position >= lengths
            written = chosen.masked_fill(done, vocab.pad_id)
            ids[:, position] = written.where(is_new, ids[:, position])
            after = step[states, (ids[:, position] - vocab.offset).clamp(0, 255)]
            states = after.where(is_new, states)
            done |= (ids[:, position] == vocab.eos_id) | (position + 1 >= ends)
            if done.all():
                break
    return [
        written_bytes(row[length : length + max_new_bytes], vocab)
        for row, length in zip(_on_host(ids), lengths.tolist(), strict=True)
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
    capacity = partial(_capacity, model, speculate)
    return check_request(model.config, prompts, max_new_bytes, seed, valid_utf8, stop, capacity)


def _settings(
    sampler: SamplerConfig,
    stop_at_eos: bool,
    automaton: Automaton,
    drafter: Drafter | None,
    log_probs: bool,
) -> Settings:
    return Settings(sampler, stop_at_eos, automaton, drafter, log_probs)


def _capacity(model: Any, speculate: Any, rows: int) -> int:
    """Positions for which caches and random numbers fit into the memory of the model's device."""
    device = device_of(model)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()

    drafting = speculate not in (None, "none")
    models = [model, speculate] if hasattr(speculate, "init_cache") else [model]

    def size(length: int) -> int:
        caches = [
            each.init_cache(max(rows, 1), _at_most(each, length), by_byte=drafting)
            for each in models
        ]
        leaves, _ = tree_flatten(caches)
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    short = 64 * model.round_length
    per_position = (size(2 * short) - size(short)) / short + 12 * max(rows, 1)
    return int(memory / per_position)


def _at_most(model: Any, length: int) -> int:
    """`length`, or what the model can hold: a draft's limit is refused elsewhere."""
    return min(length, model.config.longest_input or length)


def _on_host(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()
