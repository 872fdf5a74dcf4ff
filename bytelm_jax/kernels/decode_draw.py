"""A byte drawn from its logits by one kernel on a GPU, where XLA takes some ten.

Axes: B rows, V vocabulary, C candidates.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from bytelm_jax.kernels.decode_linear import kernel_call
from bytelm_jax.kernels.decode_weights import power_of_two


class _Shape(NamedTuple):
    low: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    nothing: int
    greedy: bool


def draw(
    logits: Float[Array, "B V"],
    open_to: Bool[Array, "B C"],
    uniform: Float[Array, " B"],
    temperature: Any,
    low: int,
    nothing: int,
    greedy: bool,
) -> Int[Array, " B"]:
    """An id of each row: among the candidates from `low` on that are open, by its uniform number.

    The likeliest, the first of equals, if `greedy`. `nothing` says that a row's logits are not
    finite. Cumulative sums are those of a scan, whose last digits differ from `sampling.sample`'s.
    """
    shape = _Shape(low, open_to.shape[1], nothing, greedy)
    warmth = jnp.asarray(temperature, logits.dtype).reshape(-1)
    return kernel_call(
        _draw_kernel,
        shape,
        (logits, open_to.astype(jnp.int32), uniform.astype(logits.dtype), warmth),
        (len(logits),),
        jax.ShapeDtypeStruct((len(logits),), jnp.int32),
        name="decode_draw",
    )


def _draw_kernel(shape: _Shape, logits: Any, open_to: Any, uniform: Any, warmth: Any, out: Any):
    row, lanes = pl.program_id(0), jnp.arange(power_of_two(shape.count))
    inside = lanes < shape.count
    is_open = plgpu.load(open_to.at[row, lanes], mask=inside, other=0) != 0
    score = plgpu.load(logits.at[row, shape.low + lanes], mask=inside, other=-jnp.inf)
    # Comparisons drop NaN: they are looked for by themselves.
    broken = jnp.where(is_open & (score != score), 1, 0).sum(axis=0) > 0
    score = jnp.where(is_open & inside, score, -jnp.inf)
    most = score.max(axis=0)
    finite = (most > -jnp.inf) & (most < jnp.inf) & jnp.logical_not(broken)
    if shape.greedy:
        chosen = jnp.where(score == most, lanes, shape.count).min(axis=0)
    else:
        chances = jnp.where(is_open & inside, jnp.exp((score - most) / warmth[0]), 0)
        below = jnp.cumsum(chances, axis=0) - chances
        target = uniform[row] * chances.sum(axis=0)
        reached = (below <= target) & (chances > 0)
        chosen = jnp.where(reached, lanes, 0).max(axis=0)
    chosen = jnp.where(finite, chosen + shape.low, shape.nothing)
    out[row] = chosen.astype(jnp.int32)
