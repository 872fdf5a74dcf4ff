"""Samplers: from logits to the ids that follow.

Axes: B rows, L positions, V vocabulary, S candidates.

Greedy choices are those of the JAX package; random numbers come from torch and differ from JAX's.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.config import ByteVocab
from bytelm.generation.automaton import END
from bytelm.sampling import LEAST_TOP_P, SamplerConfig

_BLOCK = 64  # random numbers drawn at a time


def probabilities(logits: Float[Tensor, "B S"], sampler: SamplerConfig) -> Float[Tensor, "B S"]:
    """The distribution that `sampler` draws from, in at least float32. Logits may be −inf."""
    size = logits.shape[-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if _is_greedy(sampler):
        return F.one_hot(logits.argmax(dim=-1), size).to(logits.dtype)
    # The maximum goes first: a small temperature must not make infinities of finite logits.
    relative = logits - logits.amax(dim=-1, keepdim=True)
    temperature, top_k = sampler.temperature, min(sampler.top_k or size, size)
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
    chances = torch.where(likelier < max(sampler.top_p, LEAST_TOP_P), chances, 0)
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
    """The ids that follow: a byte's id or, if allowed, `vocab.eos_id`, and never another.

    `vocab.pad_id` says that a row's logits are not finite.
    """
    columns = candidate_columns(vocab)
    allowed = torch.from_numpy((columns >= 0) & ((columns != END) | allow_eos))
    return choose_ids(logits, uniform, sampler, vocab, allowed.to(logits.device))


def candidate_columns(vocab: ByteVocab) -> Int[np.ndarray, " C"]:
    """What each id that may follow stands for: 0 to 255 a byte, 256 the end, −1 nothing.

    The candidates are a slice of the vocabulary, with the other special ids in it ruled out.
    """
    low = min(vocab.offset, vocab.eos_id)
    ids = np.arange(low, max(vocab.offset + 256, vocab.eos_id + 1))
    is_byte = (ids >= vocab.offset) & (ids < vocab.offset + 256)
    return np.where(is_byte, ids - vocab.offset, np.where(ids == vocab.eos_id, END, -1))


def choose_ids(
    logits: Tensor,
    uniform: Tensor,
    sampler: SamplerConfig,
    vocab: ByteVocab,
    allowed: Tensor,
) -> Tensor:
    """`next_ids` among the candidates `allowed`, [C] or [B, C] (`candidate_columns`)."""
    low = min(vocab.offset, vocab.eos_id)
    logits = logits[:, low : low + allowed.shape[-1]].masked_fill(~allowed, -torch.inf)
    if _is_greedy(sampler):
        chosen = logits.argmax(dim=-1)
    else:
        chosen = sample(probabilities(logits, sampler), uniform)
    finite = logits.amax(dim=-1).isfinite()  # NaN if any of them is
    return torch.where(finite, chosen + low, vocab.pad_id)


def _is_greedy(sampler: SamplerConfig) -> bool:
    return sampler.sampler == "greedy" or sampler.temperature == 0


def random_uniforms(seed: int, batch: int, length: int) -> Float[Tensor, "B L"]:
    """Numbers in [0, 1) that depend on the seed, the row and the position alone.

    They are drawn on the CPU, so that every device sees the same, and in blocks of one size, so
    that those of a position do not depend on `length`.
    """
    return torch.stack([random_row(seed, row, length) for row in range(batch)])


def random_row(seed: int, row: int, length: int) -> Float[Tensor, " L"]:
    """The numbers of one row."""
    # A mixed seed: seed + row would give row 1 of seed 0 the numbers of row 0 of seed 1.
    mixed = np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    blocks = [  # float32 whatever torch's default is: another dtype draws other numbers
        torch.rand(_BLOCK, generator=generator, dtype=torch.float32)
        for _ in range(-(-length // _BLOCK))
    ]
    return torch.cat(blocks)[:length]
