"""The trust ratio, which the Q-learning agent observes: actual over predicted fall of the loss.

Predicted is the raw gradient times the applied update, with momentum, clipping and decay; actual is
what the loss of the same rows, with the same dropout, does. Named after the ratio by which
trust-region methods judge a step (Conn, Gould & Toint 2000). A reading is noisy, so that several
are pooled, as a running mean of ratios within `TRUST_LIMITS`: falls of the loss shrink by orders
of magnitude while a model trains, so that a ratio of sums would be that of long ago.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from bytelm.config.q_learning import QLearningConfig
from bytelm.q_table import HELD, RISING, STEADY, TINY, TRUST_LIMITS, TRUST_START

Scalar = Float[Array, ""]


class TrustState(NamedTuple):
    """The running mean of the readings, and where the schedule stands."""

    ratio: Scalar
    phase: Int[Array, ""]
    peak: Scalar
    """The highest base learning rate so far."""


class Step(NamedTuple):
    """A step that an optimizer took; trees are like the parameters before it."""

    finite: Bool[Array, ""]
    gradients: optax.Updates
    updates: optax.Updates
    params: optax.Params | None
    loss: Scalar
    base: Any
    """The schedule's learning rate."""


def init_trust(config: QLearningConfig, dtype: DTypeLike) -> TrustState | None:
    """The state before the first step; None for another signal."""
    if config.signal != "trust":
        return None
    return TrustState(jnp.asarray(TRUST_START, dtype), jnp.int32(RISING), jnp.zeros((), dtype))


def read_trust(
    trust: TrustState | None,
    count: Int[Array, ""],
    step: Step,
    config: QLearningConfig,
    *,
    value_fn: Callable[[Any], Any] | None = None,
    applied_fn: Callable[[Any], Any] | None = None,
    **extra_args: Any,
) -> TrustState | None:
    """The state after `step`, the last of `count`; a reading is due at the last before a decision.

    Only near the schedule's peak: elsewhere the agent changes nothing, and the loss would be
    computed for nothing.

    `value_fn` gives the loss at other parameters, `applied_fn` what is made of the updates, where
    that differs from them.
    """
    del extra_args
    if trust is None:
        return None
    if value_fn is None or step.params is None:
        raise ValueError(
            "value_fn=None: signal=trust needs the loss at other parameters; "
            "update(grads, state, params, value=loss, value_fn=loss_of)"
        )
    dtype, steady = trust.peak.dtype, trust.phase == STEADY
    due = step.finite & steady & (count % config.interval == 0)

    def read() -> tuple[Scalar, Scalar]:
        applied = step.updates if applied_fn is None else applied_fn(step.updates)
        products = jax.tree.map(
            lambda g, u: jnp.sum(g.astype(dtype) * u.astype(dtype)), step.gradients, applied
        )
        predicted = -jax.tree.reduce(jnp.add, products, jnp.zeros((), dtype))
        after = value_fn(jax.tree.map(jnp.add, step.params, applied))
        return step.loss - jnp.asarray(after).astype(dtype), predicted

    nothing = jnp.zeros((), dtype)
    # A branch, since the loss costs a third of a step; a GPU waits for the host at it.
    actual, predicted = jax.lax.cond(due, read, lambda: (nothing, nothing))
    return _in_phase(_pooled(trust, actual, predicted, due, config), step.base, config)


def _pooled(
    trust: TrustState,
    actual: Scalar,
    predicted: Scalar,
    due: Bool[Array, ""],
    config: QLearningConfig,
) -> TrustState:
    """With one more reading: 0 where the step leads up the gradient, as momentum may."""
    low, high = TRUST_LIMITS
    reading = jnp.clip(actual / jnp.maximum(predicted, TINY), low, high)
    reading = jnp.where(jnp.isfinite(actual), reading, low)
    reading = jnp.where(predicted > 0, reading, 0.0)
    ratio = trust.ratio + (reading - trust.ratio) / config.readings
    return trust._replace(ratio=jnp.where(due & jnp.isfinite(predicted), ratio, trust.ratio))


def _in_phase(trust: TrustState, base: ArrayLike, config: QLearningConfig) -> TrustState:
    base = jnp.asarray(base, trust.peak.dtype)
    phase = jnp.where(base < config.hold_below * trust.peak, HELD, STEADY)
    phase = jnp.where(base > trust.peak, RISING, phase).astype(jnp.int32)
    return trust._replace(phase=phase, peak=jnp.maximum(base, trust.peak))
