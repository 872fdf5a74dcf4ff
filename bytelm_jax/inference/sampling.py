"""Samplers: from logits to the ids that follow.

Axes: B rows, L positions, V vocabulary, S candidates.

The sampler's numbers are arguments of the compiled programs, so that one program serves every
temperature; only its kind is compiled in: greedy, plain, ranked, or mixed, where every row has
numbers of its own, [B, 1].
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bytelm.config import ByteVocab
from bytelm.generation.automaton import END
from bytelm.sampling import LEAST_TOP_P, SamplerConfig
from bytelm_jax.kernels.decoding import where_needed

_NO_LIMIT = 2**31 - 1


class SamplerNumbers(NamedTuple):
    """What may change from call to call without a new program."""

    allow_eos: bool
    temperature: float
    top_k: int
    top_p: float
    low: float
    medium: float
    high: float


def split_settings(sampler: SamplerConfig, allow_eos: bool = True) -> tuple[str, SamplerNumbers]:
    """`sampler` as what the program is (greedy, plain or ranked) and what it is given."""
    s = sampler
    mixed = s.sampler == "entropy"
    cut = mixed or s.top_k or s.top_p < 1
    mode = "greedy" if s.sampler == "greedy" or s.temperature == 0 else "ranked" if cut else "plain"
    # Thresholds that no entropy meets make categorical of entropy; a cumulative sum may pass 1 by
    # rounding, and top_p=1 must cut nothing.
    thresholds = (s.entropy_low, s.entropy_medium, s.entropy_high)
    return mode, SamplerNumbers(
        allow_eos,
        s.temperature,
        min(s.top_k or _NO_LIMIT, _NO_LIMIT),
        max(s.top_p, LEAST_TOP_P) if s.top_p < 1 else math.inf,
        *(thresholds if mixed else (-math.inf, -math.inf, math.inf)),
    )


def numbers_of_a_row(sampler: SamplerConfig, allow_eos: bool = True) -> SamplerNumbers:
    """`sampler` as the numbers of one row of a mixed batch; the most likely byte is top_k=1."""
    mode, numbers = split_settings(sampler, allow_eos)
    if mode != "greedy":
        return numbers
    return SamplerNumbers(allow_eos, 1.0, 1, math.inf, -math.inf, -math.inf, math.inf)


def probabilities(logits: Float[Array, "B S"], sampler: SamplerConfig) -> Float[Array, "B S"]:
    """The distribution that `sampler` draws from, in at least float32. Logits may be −inf."""
    return _probabilities(logits, *split_settings(sampler))


def _probabilities(logits: Array, mode: str, numbers: SamplerNumbers) -> Array:
    size = logits.shape[-1]
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if mode == "greedy":
        return jax.nn.one_hot(logits.argmax(axis=-1), size, dtype=logits.dtype)
    # The maximum goes first: a small temperature must not make infinities of finite logits.
    relative = logits - logits.max(axis=-1, keepdims=True)
    if mode == "ranked":
        return _ranked(logits, relative, mode, numbers)
    plain = jax.nn.softmax(relative / numbers.temperature, axis=-1)
    if mode == "plain":
        return plain
    # One question for all rows: asking it costs as much as a softmax. The other rows keep what they
    # would have alone, so that no row's text depends on whether another one needs ranks.
    ranked = (numbers.top_k < size) | (numbers.top_p <= 1) | (numbers.low > -math.inf)
    ranked = ranked | (numbers.medium > -math.inf) | (numbers.high < math.inf)

    def where_ranked() -> Array:
        return jnp.where(ranked, _ranked(logits, relative, mode, numbers), plain)

    return where_needed(jnp.any(ranked), where_ranked, lambda: plain)


def _ranked(logits: Array, relative: Array, mode: str, numbers: SamplerNumbers) -> Array:
    """A distribution cut by rank, sum or entropy; `relative` are logits minus their maximum."""
    size = logits.shape[-1]
    nats = jax.scipy.special.entr(jax.nn.softmax(logits, axis=-1)).sum(axis=-1, keepdims=True)
    bits = nats / math.log(2)
    limit = jnp.where(bits < numbers.low, 1, jnp.where(bits < numbers.medium, 10, numbers.top_k))
    cooling = jnp.where(bits > numbers.high, 0.8 * numbers.temperature, numbers.temperature)
    limit = jnp.minimum(limit, numbers.top_k)

    def among_the_first() -> Array:
        return _ahead(logits).sum(axis=-1) < limit

    kept = _mask_where_needed(mode, limit < size, among_the_first, logits.shape)
    chances = jax.nn.softmax(relative / cooling, axis=-1, where=kept)

    def within_top_p() -> Array:
        return jnp.where(_ahead(logits), chances[:, None, :], 0).sum(axis=-1) < numbers.top_p

    kept = _mask_where_needed(mode, jnp.asarray(numbers.top_p) <= 1, within_top_p, logits.shape)
    chances = jnp.where(kept, chances, 0)
    return chances / chances.sum(axis=-1, keepdims=True)


def _ahead(logits: Array) -> Array:
    """[B, S, S]: whether the last axis' candidate ranks before that of the axis before.

    All pairs and no sort or scan, here and in `sample`: these are compiled once for every byte of a
    round and dominate its compile time, while S² comparisons fuse into one reduction.
    """
    mine, other = logits[:, :, None], logits[:, None, :]
    return (other > mine) | ((other == mine) & np.tri(logits.shape[-1], k=-1, dtype=bool)[None])


def _mask_where_needed(
    mode: str, needed: Array, keep: Callable[[], Array], shape: tuple[int, ...]
) -> Array:
    """`keep()`; where the mode is "mixed" and no row needs it, everything, without its work.

    The masks are exact, so that no row's text depends on whether another one needs them.
    """
    if mode != "mixed":
        return keep()
    return where_needed(needed.any(), keep, lambda: jnp.ones(shape, bool))


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
    """The ids that follow: a byte's id or, if allowed, `vocab.eos_id`, and never another.

    `vocab.pad_id` says that a row's logits are not finite.
    """
    return choose_ids(logits, uniform, *split_settings(sampler, allow_eos), vocab)


def candidate_columns(vocab: ByteVocab) -> Int[np.ndarray, " C"]:
    """What each id that may follow stands for: 0 to 255 a byte, 256 the end, −1 nothing.

    The candidates are a slice of the vocabulary, with the other special ids in it ruled out.
    """
    low = min(vocab.offset, vocab.eos_id)
    ids = np.arange(low, max(vocab.offset + 256, vocab.eos_id + 1))
    is_byte = (ids >= vocab.offset) & (ids < vocab.offset + 256)
    return np.where(is_byte, ids - vocab.offset, np.where(ids == vocab.eos_id, END, -1))


def choose_ids(
    logits: Array,
    uniform: Array,
    mode: str,
    numbers: SamplerNumbers,
    vocab: ByteVocab,
    allowed: Array | None = None,
) -> Array:
    """`next_ids` among the candidates `allowed` [B, C], all of them by default."""
    low, columns = min(vocab.offset, vocab.eos_id), candidate_columns(vocab)[None]
    open_to = jnp.asarray((columns >= 0) & ((columns != END) | numbers.allow_eos))
    if allowed is not None:
        open_to = open_to & allowed
    logits = jax.lax.slice_in_dim(logits, low, low + columns.shape[1], axis=-1)
    logits = jnp.where(open_to, logits, -jnp.inf)
    if mode == "greedy":
        chosen = logits.argmax(axis=-1)
    else:
        chosen = sample(_probabilities(logits, mode, numbers), uniform)
    finite = jnp.isfinite(logits.max(axis=-1))  # NaN if any of them is
    return jnp.where(finite, chosen + low, vocab.pad_id).astype(jnp.int32)


def random_uniforms(mode: str, seed: int, batch: int, length: int) -> Array | np.ndarray:
    """[B, L] numbers in [0, 1) that depend on the seed, the row and the position alone."""
    if mode == "greedy":  # nobody reads them, and the program that makes them takes a second
        return np.zeros((batch, length), np.float32)
    return _random_table(jax.random.key(seed), batch, length)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_table(key: Array, batch: int, length: int) -> Array:
    return jax.vmap(lambda row: _random_row(key, row, length))(jnp.arange(batch))


@functools.partial(jax.jit, static_argnums=2)
def random_row(seed: Array, row: Array, length: int) -> Array:
    """The numbers [L] of one row, as `random_uniforms` has them."""
    return _random_row(jax.random.key(seed), row, length)


def _random_row(key: Array, row: Array, length: int) -> Array:
    def number(position: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), position))

    return jax.vmap(number)(jnp.arange(length))
