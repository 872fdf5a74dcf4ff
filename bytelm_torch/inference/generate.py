"""Samplers and cached decoding: bytes in, bytes out.

The mirror of `bytelm_jax/inference/generate.py`, which tells how a batch of unequal prompts is
decoded.
Axes: B rows, L bytes of the longest sequence, P bytes per round, V vocabulary, S candidates.

Greedy choices are those of the JAX package; random numbers come from torch and differ from JAX's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.config import ByteVocab, require
from bytelm.sampling import SamplerConfig
from bytelm_torch.models.interface import inference

_BLOCK = 64  # random numbers drawn at a time


_DEFAULT = SamplerConfig()


def probabilities(logits: Float[Tensor, "B S"], sampler: SamplerConfig) -> Float[Tensor, "B S"]:
    """The distribution that `sampler` draws from, in at least float32. Logits may be −inf."""
    size = logits.shape[-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if _is_greedy(sampler):
        return F.one_hot(logits.argmax(dim=-1), size).to(logits.dtype)
    # The maximum goes first: a small temperature must not make infinities of finite logits.
    relative = logits - logits.amax(dim=-1, keepdim=True)
    temperature, top_k = sampler.temperature, sampler.top_k or size
    if sampler.sampler == "categorical" and top_k >= size and sampler.top_p == 1:
        return (relative / temperature).softmax(dim=-1)
    if sampler.sampler == "entropy":
        nats = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1, keepdim=True)
        bits = nats / math.log(2)
        limit = torch.where(bits < sampler.entropy_medium, 10, top_k)
        top_k = torch.where(bits < sampler.entropy_low, 1, limit).clamp(max=top_k)
        asked = torch.full_like(bits, temperature)
        temperature = asked.masked_fill(bits > sampler.entropy_high, 0.8 * temperature)
    order = logits.argsort(dim=-1, stable=True, descending=True)
    rank = order.argsort(dim=-1)
    chances = (relative / temperature).masked_fill(rank >= top_k, -torch.inf).softmax(dim=-1)
    if sampler.top_p == 1:  # a cumulative sum may pass 1 by rounding, and would cut something
        return chances
    falling = chances.gather(-1, order)
    likelier = (falling.cumsum(dim=-1) - falling).gather(-1, rank)
    chances = torch.where(likelier < sampler.top_p, chances, 0)
    return chances / chances.sum(dim=-1, keepdim=True)


def sample(chances: Float[Tensor, "B S"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """One index a row by inversion of the cumulative sum; `uniform` lies in [0, 1).

    What has probability 0 is never drawn, whatever the rounding of the sum.
    """
    below = chances.cumsum(dim=-1)
    total, below = below[:, -1:], below - chances
    reached = (below <= uniform[:, None].to(chances.dtype) * total) & (chances > 0)
    return torch.where(reached, torch.arange(chances.shape[-1], device=chances.device), 0).amax(-1)


def next_ids(
    logits: Float[Tensor, "B V"],
    uniform: Float[Tensor, " B"],
    sampler: SamplerConfig,
    vocab: ByteVocab,
    allow_eos: bool = True,
) -> Int[Tensor, " B"]:
    """The ids that follow: a byte's id or, if allowed, `vocab.eos_id`, and never another."""
    # The candidates: a slice of the vocabulary, with the other specials in it ruled out.
    low = min(vocab.offset, vocab.eos_id)
    high = max(vocab.offset + 256, vocab.eos_id + 1)
    ids = torch.arange(low, high, device=logits.device)
    allowed = (ids >= vocab.offset) & (ids < vocab.offset + 256)
    if allow_eos:
        allowed |= ids == vocab.eos_id
    logits = logits[:, low:high].masked_fill(~allowed, -torch.inf)
    if _is_greedy(sampler):
        chosen = logits.argmax(dim=-1)
    else:
        chosen = sample(probabilities(logits, sampler), uniform)
    return chosen + low


def _is_greedy(sampler: SamplerConfig) -> bool:
    return sampler.sampler == "greedy" or sampler.temperature == 0


def _uniforms(seed: int, batch: int, length: int) -> Float[Tensor, "B L"]:
    """Numbers in [0, 1) that depend on the seed, the row and the position alone.

    They are drawn on the CPU, so that every device sees the same, and in blocks of one size, so
    that those of a position do not depend on `length`.
    """
    rows, generator = [], torch.Generator()
    for row in range(batch):
        # A mixed seed: seed + row would give row 1 of seed 0 the numbers of row 0 of seed 1.
        mixed = np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)
        generator.manual_seed(int(mixed[0]))
        blocks = [torch.rand(_BLOCK, generator=generator) for _ in range(-(-length // _BLOCK))]
        rows.append(torch.cat(blocks)[:length])
    return torch.stack(rows)


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
    _check(model, prompts, max_new_bytes, seed)
    if not prompts or max_new_bytes == 0:
        return [b""] * len(prompts)
    vocab, device = model.config.vocab, _device(model)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    first, last = int(lengths.min()), int(lengths.max()) + max_new_bytes
    ids = _prompt_ids(prompts, vocab, (len(prompts), last), 0).to(device)
    uniforms = _uniforms(seed, len(prompts), last).to(device)
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
    index: int
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
    rows = _Rows(_uniforms(seed, batch, total * patch).to(device), lengths, ends)
    with inference(model):
        cache = model.init_cache(batch, total * patch)
        if first:
            cache = model.prefill(ids[:, patch : (1 + first) * patch], cache)
    state = _State(cache, ids, first, ends == 0)

    def advance(state: _State, stop: int) -> _State:
        with inference(model):
            while state.index < stop and not state.done.all():
                state = _append_round(model, sampler, stop_at_eos, rows, state)
        return state

    return _Run(state, advance, first, total)


def _append_round(
    model: Any, sampler: SamplerConfig, allow_eos: bool, rows: _Rows, state: _State
) -> _State:
    patch, vocab = model.round_length, model.config.vocab
    start = state.index * patch
    previous = state.ids[:, start : start + patch]
    here = state.ids[:, start + patch : start + 2 * patch]  # a view: written below

    def choose(logits: Tensor, i: int) -> Tensor:
        chosen = next_ids(logits, rows.uniforms[:, start + i], sampler, vocab, allow_eos)
        return torch.where(start + i < rows.lengths, here[:, i], chosen)

    cache, chosen = model.decode_round(state.cache, previous, state.index, choose)
    # What a row makes behind its end in its last round is cut off at the end.
    here[:] = torch.where(state.done[:, None], vocab.pad_id, chosen)
    ended = (chosen == vocab.eos_id).any(dim=1) | (start + patch >= rows.ends)
    return _State(cache, state.ids, state.index + 1, state.done | ended)


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
    """The bytes up to end-of-sequence."""
    kept = []
    for item in ids.tolist():
        if item == vocab.eos_id:
            break
        kept.append(item - vocab.offset)
    return bytes(kept)
