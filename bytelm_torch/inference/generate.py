"""Cached decoding: bytes in, bytes out.

The mirror of `bytelm_jax/inference/generate.py`, which tells how a batch of unequal prompts is
decoded.
Axes: B rows, L bytes of the longest sequence, P bytes per round, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bytelm.config import ByteVocab, require
from bytelm.memory import host_memory
from bytelm.sampling import SamplerConfig, check_request, require_sampled
from bytelm_torch.inference.sampling import next_ids, random_uniforms
from bytelm_torch.models.interface import inference

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
    check_request(model.config, prompts, max_new_bytes, seed, partial(_capacity, model))
    if not prompts or max_new_bytes == 0:
        return [b""] * len(prompts)
    run = _begin(model, prompts, max_new_bytes, sampler, seed, stop_at_eos)
    state = run.advance(run.state, run.rounds)
    ids = state.ids.cpu()[:, model.round_length :]
    return [
        _new_bytes(row[len(prompt) : len(prompt) + max_new_bytes], model.config.vocab)
        for row, prompt in zip(ids, prompts, strict=True)
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
    """As `generate` for one prompt, in pieces of about `chunk_bytes` as rounds finish.

    The pieces add up to what `generate` returns; no piece is empty. A piece may end
    inside a UTF-8 character.
    """
    check_request(model.config, [prompt], max_new_bytes, seed, partial(_capacity, model))
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
        row, done = state.ids[0, patch:].cpu(), bool(state.done[0])
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
    """As `generate`, by a full forward pass for every byte: the reference, slow and plain."""
    check_request(model.config, prompts, max_new_bytes, seed, partial(_capacity, model))
    if not prompts or max_new_bytes == 0:
        return [b""] * len(prompts)
    vocab, device = model.config.vocab, _device(model)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    first, last = int(lengths.min()), int(lengths.max()) + max_new_bytes
    ids = _prompt_ids(prompts, vocab, (len(prompts), last), 0).to(device)
    uniforms = random_uniforms(seed, len(prompts), last).to(device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    with inference(model):
        for position in range(first, last):
            logits = model(ids[:, : position + 1])[:, position]
            chosen = next_ids(logits, uniforms[:, position], sampler, vocab, stop_at_eos)
            written = torch.where(done, vocab.pad_id, chosen)
            ids[:, position] = torch.where(position < lengths, ids[:, position], written)
            done |= (ids[:, position] == vocab.eos_id) | (position + 1 >= lengths + max_new_bytes)
            if done.all():
                break
    return [
        _new_bytes(row[length : length + max_new_bytes], vocab)
        for row, length in zip(ids.cpu(), lengths.tolist(), strict=True)
    ]


class _Rows(NamedTuple):
    """What the loop reads: random numbers [B, L], prompt length and end (with new bytes) a row."""

    uniforms: Tensor
    lengths: Tensor
    ends: Tensor


class _State(NamedTuple):
    """What the loop changes.

    `ids` [B, P + L] starts with one round of pads, which is what the first round finds before it.
    """

    cache: Any
    ids: Tensor
    round: int
    done: Tensor


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
    patch, batch, device = model.round_length, len(prompts), _device(model)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends = lengths + max_new_bytes
    total = -(-int(ends.max()) // patch)
    ids = _prompt_ids(prompts, model.config.vocab, (batch, (1 + total) * patch), patch).to(device)
    first = min(map(len, prompts)) // patch
    rows = _Rows(random_uniforms(seed, batch, total * patch).to(device), lengths, ends)
    with inference(model):
        cache = model.init_cache(batch, total * patch)
        if first:
            cache = model.prefill(ids[:, patch : (1 + first) * patch], cache)
    state = _State(cache, ids, first, ends == 0)

    def advance(state: _State, stop: int) -> _State:
        with inference(model):
            while state.round < stop and not state.done.all():
                state = _append_round(model, sampler, stop_at_eos, rows, state)
        return state

    return _Run(state, advance, first, total)


def _append_round(
    model: Any, sampler: SamplerConfig, allow_eos: bool, rows: _Rows, state: _State
) -> _State:
    patch, vocab = model.round_length, model.config.vocab
    start = state.round * patch
    previous = state.ids[:, start : start + patch]
    here = state.ids[:, start + patch : start + 2 * patch]  # a view: written below

    def choose(logits: Tensor, i: int) -> Tensor:
        chosen = next_ids(logits, rows.uniforms[:, start + i], sampler, vocab, allow_eos)
        return torch.where(start + i < rows.lengths, here[:, i], chosen)

    cache, chosen = model.decode_round(state.cache, previous, state.round, choose)
    # What a row makes behind its end in its last round is cut off at the end.
    here[:] = torch.where(state.done[:, None], vocab.pad_id, chosen)
    ended = (chosen == vocab.eos_id).any(dim=1) | (start + patch >= rows.ends)
    return _State(cache, state.ids, state.round + 1, state.done | ended)


def _capacity(model: Any, rows: int) -> int:
    """Positions for which caches and random numbers fit into the memory of the model's device."""
    device = _device(model)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()

    def size(length: int) -> int:
        leaves, _ = tree_flatten(model.init_cache(max(rows, 1), length))
        return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))

    short = 64 * model.round_length
    per_position = (size(2 * short) - size(short)) / short + 12 * max(rows, 1)
    return int(memory / per_position)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _prompt_ids(
    prompts: Sequence[bytes], vocab: ByteVocab, shape: tuple[int, int], start: int
) -> Tensor:
    """int64 of `shape`: each prompt's ids from column `start` on, pads elsewhere."""
    ids = np.full(shape, vocab.pad_id, np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        codes = np.frombuffer(prompt, np.uint8)
        row[start : start + len(prompt)] = codes.astype(np.int64) + vocab.offset
    return torch.from_numpy(ids)


def _new_bytes(ids: Tensor, vocab: ByteVocab) -> bytes:
    """The bytes up to end-of-sequence; raises `ValueError` where logits were not finite."""
    kept = list(itertools.takewhile(lambda item: item != vocab.eos_id, ids.tolist()))
    require_sampled(kept, vocab)
    return bytes(item - vocab.offset for item in kept)
