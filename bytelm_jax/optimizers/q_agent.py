"""The tabular Q-learning agent that steers learning rate and momentum: its table and one step.

Watkins & Dayan 1992. Every `interval` steps the agent observes a cell of its table (the current
learning rate and momentum, how the smoothed loss falls, how steady the gradient norm is), picks one
factor for the learning rate and one for 1 / (1 - momentum), and is rewarded at its next decision.
With `signal="trust"` it observes the schedule's phase and the pooled trust ratio in place of
momentum and trend (`q_table.py`), and steers the learning rate alone.
Everything is an array of fixed shape, and a step has no branch: on a GPU a branch waits for the
host.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt32

from bytelm.config.q_learning import QLearningConfig
from bytelm.q_table import (
    CLEAR,
    COUNTS,
    EDGES,
    FALL_LIMIT,
    LEAST_SHARE,
    LEAST_SPREAD,
    STABILITIES,
    STEADY,
    TINY,
    TREND_LIMIT,
    TRENDS,
    bounds,
    cells,
    first_values,
    moves,
)
from bytelm_jax.optimizers.q_trust import init_trust
from bytelm_jax.optimizers.threefry import random_bits, seed_key

Scalar = Float[Array, ""]
Flag = Bool[Array, ""]


# ---- the agent ------------------------------------------------------------------------------


class QLearningState(NamedTuple):
    """The agent's state.

    Pairs are (learning rate, momentum); tables are float32, other floats float32, or float64 with
    float64 parameters. `position` is (log of rate / base rate, log of 1 / (1 - μ)).
    """

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] (a name on disk)
    skipped: Int[Array, ""]
    surges: Int[Array, ""]
    last_surge: Int[Array, ""]
    judged: Int[Array, ""]
    key: UInt32[Array, "2"]
    q_learning_rate: Float[Array, "cells 9"]
    q_momentum: Float[Array, "cells 7"]
    position: Float[Array, "2"]
    before: Float[Array, "2"]
    actions: Int[Array, "2"]
    explored: Bool[Array, "2"]
    cell: Int[Array, ""]
    pending: Flag
    epsilon: Scalar
    first: Scalar
    smoothed: Scalar
    reference: Scalar
    fall: Scalar
    last_fall: Scalar
    norms: Float[Array, " window"]
    means: Float[Array, "2"]
    variances: Float[Array, "2"]
    baselines: Float[Array, " trends"]
    trend: Scalar
    stability: Scalar
    reward: Scalar
    learning_rate: Scalar
    trust: Any = None
    """A `TrustState` under that signal; Optax's type of states has no place for None."""


def init_agent(
    config: QLearningConfig, momentum: ArrayLike, seed: ArrayLike, dtype: DTypeLike
) -> QLearningState:
    """A new agent at the base learning rate and at `momentum`; its floats have type `dtype`."""
    integer, real = jnp.int32(0), jnp.zeros((), dtype)
    position = jnp.stack([real, -jnp.log1p(-jnp.asarray(momentum, dtype))])
    return QLearningState(
        count=integer,
        skipped=integer,
        surges=integer,
        last_surge=jnp.int32(-config.window),
        judged=integer,
        key=seed_key(seed),
        q_learning_rate=jnp.asarray(first_values(config)),
        q_momentum=jnp.zeros((cells(config), COUNTS[1]), jnp.float32),
        position=position,
        before=position,
        actions=jnp.zeros(2, jnp.int32),
        explored=jnp.zeros(2, bool),
        cell=integer,
        pending=jnp.zeros((), bool),
        epsilon=jnp.asarray(config.epsilon, dtype),
        first=real,
        smoothed=real,
        reference=real,
        fall=real,
        last_fall=real,
        norms=jnp.zeros(config.window, dtype),
        means=jnp.zeros(2, dtype),
        variances=jnp.zeros(2, dtype),
        baselines=jnp.zeros(TRENDS, dtype),
        trend=real,
        stability=real,
        reward=real,
        learning_rate=real,
        trust=init_trust(config, dtype),
    )


def begin_counting(state: QLearningState) -> QLearningState:
    """The agent at the first step of another run: it keeps what it has learned, not its counts."""
    zero = 0 * state.count
    surge = state.last_surge - state.count
    trust = state.trust and state.trust._replace(phase=zero, peak=0 * state.trust.peak)
    return state._replace(count=zero, skipped=zero, surges=zero, last_surge=surge, trust=trust)


def step_agent(
    state: QLearningState,
    loss: Scalar,
    norm: Scalar,
    config: QLearningConfig,
    steers_momentum: bool,
) -> tuple[QLearningState, Flag]:
    """The agent after observing `loss` and gradient `norm`, and whether both are finite.

    The position that it returns already applies to this step.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    first = jnp.where(finite & (state.count == state.skipped), loss, state.first)
    if config.surge == 0:
        surges = jnp.zeros_like(finite)
    else:
        calm = state.count - state.last_surge >= config.window
        high = config.surge * first
        surges = finite & calm & (first > 0) & (loss > high) & (state.smoothed > high)
        # An outlier would stay in the running deviations and hide everything that follows.
        loss = jnp.where(first > 0, jnp.minimum(loss, 2 * high), loss)
    sound = finite & ~surges
    due = sound & (state.count % config.interval == 0)
    learns = state.pending & (due | ~sound)
    state = _observe(state, loss, norm, finite, config)
    state, alpha = _judge(state, due, sound, config)
    cell = _cell(state, config)
    state = _learn(state, cell, learns, alpha, config)
    state = _choose(state, cell, due, config, steers_momentum)
    state = state._replace(
        count=state.count + 1,
        skipped=state.skipped + ~finite,
        surges=state.surges + surges,
        last_surge=jnp.where(surges, state.count, state.last_surge),
        pending=due | (state.pending & sound),
        first=first,
        reference=jnp.where(due, state.smoothed, state.reference),
        fall=jnp.where(due, 0.0, state.fall),
    )
    return state, finite


def _observe(
    state: QLearningState, loss: Scalar, norm: Scalar, finite: Flag, config: QLearningConfig
) -> QLearningState:
    """Smooths the loss and stores the gradient norm.

    The fall is accumulated, not computed as the difference of two smoothed losses, in which float32
    would lose it.
    """
    seen = state.count - state.skipped
    rate = 1 - 0.5 ** (1 / config.window)
    drop = jnp.where(finite & (seen > 0), rate * (state.smoothed - loss), 0.0)
    slot = seen % config.window
    norms = state.norms.at[slot].set(jnp.where(finite, norm, state.norms[slot]))
    seen = seen + finite
    held = jnp.arange(config.window) < seen
    length = jnp.clip(seen, 1, config.window).astype(norms.dtype)
    mean = jnp.maximum(jnp.sum(norms / length), TINY)
    variance = jnp.sum(jnp.where(held, jnp.square(norms / mean - 1), 0.0) / length)
    return state._replace(
        smoothed=jnp.where(finite & (seen == 1), loss, state.smoothed - drop),
        fall=state.fall + drop,
        norms=norms,
        stability=jnp.sqrt(variance),
    )


def _judge(
    state: QLearningState, due: Flag, sound: Flag, config: QLearningConfig
) -> tuple[QLearningState, Scalar]:
    """Rewards the last decision and undoes an exploration that did not pay.

    Also gives the step size of the table: a reward that stands out of the noise is learned at once,
    others by averaging. The reward is the new fall: the fall without the part that the smoothing
    carries over from before the decision, which would credit it with the effect of earlier ones. It
    is compared with its own mean before it is squashed; otherwise a steadily falling loss saturates
    every reward.
    """
    settled = due & state.pending
    judged = state.judged + settled
    fall = state.fall / jnp.maximum(jnp.abs(state.reference), TINY)
    fall = jnp.clip(fall, -FALL_LIMIT, FALL_LIMIT)
    carried = 0.5 ** (config.interval / config.window) * state.last_fall
    falls = jnp.stack([fall, fall - carried])
    weight = jnp.maximum(1 / config.memory, 1 / jnp.maximum(judged, 1).astype(fall.dtype))
    surprise = falls - state.means
    means = state.means + weight * surprise
    variances = (1 - weight) * (state.variances + weight * jnp.square(surprise))
    spread = jnp.sqrt(variances) + LEAST_SPREAD + LEAST_SHARE * jnp.abs(means)
    slot = state.cell // STABILITIES % TRENDS
    baseline = state.baselines[slot]
    standing = (falls[1] - means[1]) / spread[1]
    reward = jnp.tanh(standing / 2) - baseline
    clear = jnp.where(settled, jnp.square(standing / CLEAR), 1.0)
    alpha = jnp.minimum(config.alpha * jnp.maximum(clear, 1.0), 1.0)
    trend = jnp.clip(fall / spread[0], -TREND_LIMIT, TREND_LIMIT)
    baselines = state.baselines.at[slot].add(weight * reward)
    undone = settled & state.explored & (reward <= config.undo_margin)
    position = jnp.where(undone, state.before, state.position)
    state = state._replace(
        judged=judged,
        position=jnp.where(sound, position, _halved(state.position, config)),
        means=jnp.where(settled, means, state.means),
        variances=jnp.where(settled, variances, state.variances),
        baselines=jnp.where(settled, baselines, state.baselines),
        trend=jnp.where(settled, trend, state.trend),
        reward=jnp.where(settled, reward, jnp.where(sound, state.reward, -1.0)),
        last_fall=jnp.where(due, fall, state.last_fall),
    )
    return state, alpha


def _halved(position: Float[Array, "2"], config: QLearningConfig) -> Float[Array, "2"]:
    least = bounds(config)[0][0]
    return position.at[0].set(jnp.maximum(position[0] - math.log(2), least))


def _cell(state: QLearningState, config: QLearningConfig) -> Int[Array, ""]:
    """Index of the table row for the current observation."""
    second, third = state.position[1], state.trend
    if state.trust is not None:
        second, third = state.trust.phase.astype(third.dtype), state.trust.ratio
    signals = (state.position[0], second, third, state.stability)
    cell = jnp.int32(0)
    for signal, edges in zip(signals, EDGES[config.signal], strict=True):
        digit = jnp.sum(signal > jnp.asarray(edges, signal.dtype), dtype=jnp.int32)
        cell = cell * (len(edges) + 1) + digit
    return cell


def _rows(state: QLearningState, cell: Int[Array, ""]) -> Float[Array, "2 9"]:
    """Rows of values of both tables; momentum's is padded with values that are never chosen."""
    missing = jnp.full(COUNTS[0] - COUNTS[1], -jnp.inf, jnp.float32)
    return jnp.stack([state.q_learning_rate[cell], jnp.append(state.q_momentum[cell], missing)])


def _learn(
    state: QLearningState,
    cell: Int[Array, ""],
    learns: Flag,
    alpha: Scalar,
    config: QLearningConfig,
) -> QLearningState:
    """Q ← Q + α clip(r + γ max Q[s'] − Q, ±1) for the last decision's two actions."""
    entries = [(state.cell, state.actions[i]) for i in range(2)]
    old = jnp.stack([state.q_learning_rate[entries[0]], state.q_momentum[entries[1]]])
    target = state.reward.astype(old.dtype) + config.gamma * jnp.max(_rows(state, cell), axis=1)
    new = old + alpha.astype(old.dtype) * jnp.clip(target - old, -1.0, 1.0)
    new = jnp.where(learns, new, old)
    return state._replace(
        q_learning_rate=state.q_learning_rate.at[entries[0]].set(new[0]),
        q_momentum=state.q_momentum.at[entries[1]].set(new[1]),
    )


def _choose(
    state: QLearningState,
    cell: Int[Array, ""],
    due: Flag,
    config: QLearningConfig,
    steers_momentum: bool,
) -> QLearningState:
    """Picks both actions, ε-greedily, and moves the position accordingly."""
    step = state.count.astype(jnp.uint32) + 1  # fold_in uses counter 0
    draws = random_bits(state.key, step, jnp.arange(6, dtype=jnp.uint32)).reshape(2, 3)
    actions, explored = _pick(_rows(state, cell), draws, state.epsilon, config)
    position, (low, high) = state.position, jnp.asarray(bounds(config), state.position.dtype)
    if state.trust is not None:
        steady = state.trust.phase == STEADY
        actions, explored = jnp.where(steady, actions, 0), explored & steady
    steps = jnp.asarray(moves(config), position.dtype)[jnp.arange(2), actions]
    moved = jnp.clip(position + steps, low, high)
    if not steers_momentum or state.trust is not None:
        actions, explored = actions.at[1].set(0), explored.at[1].set(False)
        moved = moved.at[1].set(position[1])
    epsilon = jnp.maximum(state.epsilon * config.epsilon_decay, config.epsilon_floor)
    return state._replace(
        position=jnp.where(due, moved, position),
        before=jnp.where(due, position, state.before),
        actions=jnp.where(due, actions, state.actions),
        explored=jnp.where(due, explored, state.explored),
        cell=jnp.where(due, cell, state.cell),
        epsilon=jnp.where(due, epsilon, state.epsilon),
    )


def _pick(
    values: Float[Array, "2 9"],
    draws: UInt32[Array, "2 3"],
    epsilon: Scalar,
    config: QLearningConfig,
) -> tuple[Int[Array, "2"], Bool[Array, "2"]]:
    """Actions, and which ones were explored; a coin decides between a factor and its inverse."""
    chance, choice, coin = draws.T
    order = jnp.arange(COUNTS[0])
    mirrored = jnp.where(order == 0, 0, order + jnp.where(order % 2 == 1, 1, -1))
    order = jnp.where(coin[:, None] % 2 == 1, mirrored[None], order[None])
    good = values >= jnp.max(values, axis=1, keepdims=True) - config.indifference
    greedy = jnp.argmin(jnp.where(good, order, COUNTS[0]), axis=1)
    explores = (chance >> 8).astype(epsilon.dtype) / 2**24 < epsilon
    uniform = choice % jnp.asarray(COUNTS, jnp.uint32)
    actions = jnp.where(explores, uniform.astype(jnp.int32), greedy.astype(jnp.int32))
    return actions, explores & (actions != 0)
