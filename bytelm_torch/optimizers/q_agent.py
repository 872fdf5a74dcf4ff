"""The tabular Q-learning agent that steers learning rate and momentum: its table and one step.

Watkins & Dayan 1992. Every `interval` steps the agent observes a cell of its table (the current
learning rate and momentum, how the smoothed loss falls, how steady the gradient norm is), picks one
factor for the learning rate and one for 1 / (1 - momentum), and is rewarded at its next decision.
With `signal="trust"` it observes the schedule's phase and the pooled trust ratio in place of
momentum and trend (`q_table.py`), and steers the learning rate alone.
It works on tensors on the parameters' device and never asks for their values: no step waits. What
the optimizers that hold an agent share stands here, too: saving it, reading it, and its metrics.
"""

import functools
import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm.config.base import require
from bytelm.config.q_learning import QLearningConfig
from bytelm.q_table import (
    CLEAR,
    COUNTS,
    EDGES,
    FALL_LIMIT,
    LEARNING_RATE_ACTIONS,
    LEAST_SHARE,
    LEAST_SPREAD,
    MOMENTUM_ACTIONS,
    RISING,
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
from bytelm_torch.optimizers.q_trust import TrustState, init_trust
from bytelm_torch.optimizers.threefry import random_bits, seed_key

Scalar = Float[Tensor, ""]
Flag = Bool[Tensor, ""]
Loss = Tensor | float


# ---- the agent ------------------------------------------------------------------------------


class QLearningState(NamedTuple):
    """The agent's state.

    Pairs are (learning rate, momentum); tables are float32 and changed in place, other floats
    float32, or float64 with float64 parameters. `position` is (log of rate / base rate, log of 1 /
    (1 - μ)).
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride] (a name on disk)
    skipped: Int[Tensor, ""]
    surges: Int[Tensor, ""]
    last_surge: Int[Tensor, ""]
    judged: Int[Tensor, ""]
    key: tuple[int, int]
    q_learning_rate: Float[Tensor, "cells 9"]
    q_momentum: Float[Tensor, "cells 7"]
    position: Float[Tensor, "2"]
    before: Float[Tensor, "2"]
    actions: Int[Tensor, "2"]
    explored: Bool[Tensor, "2"]
    cell: Int[Tensor, ""]
    pending: Flag
    epsilon: Scalar
    first: Scalar
    smoothed: Scalar
    reference: Scalar
    fall: Scalar
    last_fall: Scalar
    norms: Float[Tensor, " window"]
    means: Float[Tensor, "2"]
    variances: Float[Tensor, "2"]
    baselines: Float[Tensor, " trends"]
    trend: Scalar
    stability: Scalar
    reward: Scalar
    learning_rate: Scalar
    trust: TrustState | None = None


@functools.cache
def _constant(
    values: tuple[float, ...] | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor copied to its device once: a copy in every step would wait for the device."""
    return torch.tensor(values, dtype=dtype, device=device)


def init_agent(
    config: QLearningConfig, momentum: float, seed: int, dtype: torch.dtype, device: torch.device
) -> QLearningState:
    """A new agent at the base learning rate and at `momentum`; its floats have type `dtype`."""

    def zeros(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    position = torch.stack([zeros(), -torch.log1p(zeros() - momentum)])
    return QLearningState(
        count=0,
        skipped=zeros(kind=torch.int64),
        surges=zeros(kind=torch.int64),
        last_surge=zeros(kind=torch.int64) - config.window,
        judged=zeros(kind=torch.int64),
        key=seed_key(seed),
        q_learning_rate=torch.tensor(first_values(config), device=device),
        q_momentum=zeros(cells(config), COUNTS[1], kind=torch.float32),
        position=position,
        before=position.clone(),
        actions=zeros(2, kind=torch.int64),
        explored=zeros(2, kind=torch.bool),
        cell=zeros(kind=torch.int64),
        pending=zeros(kind=torch.bool),
        epsilon=zeros() + config.epsilon,
        first=zeros(),
        smoothed=zeros(),
        reference=zeros(),
        fall=zeros(),
        last_fall=zeros(),
        norms=zeros(config.window),
        means=zeros(2),
        variances=zeros(2),
        baselines=zeros(TRENDS),
        trend=zeros(),
        stability=zeros(),
        reward=zeros(),
        learning_rate=zeros(),
        trust=init_trust(config, dtype, device),
    )


def step_agent(
    state: QLearningState,
    loss: Scalar,
    norm: Scalar,
    config: QLearningConfig,
    steers_momentum: bool,
    half_life: float | None = None,
) -> tuple[QLearningState, Flag]:
    """The agent after observing `loss` and gradient `norm`, and whether both are finite.

    The position that it returns already applies to this step. `half_life` is that of the smoothed
    loss, in steps, if it is not `config.window`.
    """
    half_life = float(config.window) if half_life is None else half_life
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    first = torch.where(finite & (state.count == state.skipped), loss, state.first)
    if config.surge == 0:
        surges = torch.zeros_like(finite)
    else:
        calm = state.count - state.last_surge >= config.window
        high = config.surge * first
        surges = finite & calm & (first > 0) & (loss > high) & (state.smoothed > high)
        # An outlier would stay in the running deviations and hide everything that follows.
        loss = torch.where(first > 0, torch.minimum(loss, 2 * high), loss)
    sound = finite & ~surges
    due = sound & (state.count % config.interval == 0)
    learns = state.pending & (due | ~sound)
    state = _observe(state, loss, norm, finite, config.window, half_life)
    carried = 0.5 ** (config.interval / half_life)
    state, alpha = _judge(state, due, sound, carried, config)
    cell = _cell(state, config)
    _learn(state, cell, learns, alpha, config)
    state = _choose(state, cell, due, config, steers_momentum)
    state = state._replace(
        count=state.count + 1,
        skipped=state.skipped + ~finite,
        surges=state.surges + surges,
        last_surge=torch.where(surges, state.count, state.last_surge),
        pending=due | (state.pending & sound),
        first=first,
        reference=torch.where(due, state.smoothed, state.reference),
        fall=torch.where(due, 0.0, state.fall),
    )
    return state, finite


def _observe(
    state: QLearningState, loss: Scalar, norm: Scalar, finite: Flag, window: int, half_life: float
) -> QLearningState:
    """Smooths the loss and stores the gradient norm.

    The fall is accumulated, not computed as the difference of two smoothed losses, in which float32
    would lose it.
    """
    seen = state.count - state.skipped
    rate = 1 - 0.5 ** (1 / half_life)
    drop = torch.where(finite & (seen > 0), rate * (state.smoothed - loss), 0.0)
    places = torch.arange(window, device=norm.device)
    norms = torch.where(finite & (places == seen % window), norm, state.norms)
    seen = seen + finite
    held = places < seen
    length = seen.clamp(1, window).to(norms.dtype)
    mean = (norms / length).sum().clamp(min=TINY)
    variance = (torch.where(held, (norms / mean - 1).square(), 0.0) / length).sum()
    return state._replace(
        smoothed=torch.where(finite & (seen == 1), loss, state.smoothed - drop),
        fall=state.fall + drop,
        norms=norms,
        stability=variance.sqrt(),
    )


def _judge(
    state: QLearningState, due: Flag, sound: Flag, carried: float, config: QLearningConfig
) -> tuple[QLearningState, Scalar]:
    """Rewards the last decision and undoes an exploration that did not pay.

    Also gives the step size of the table: a reward that stands out of the noise is learned at once,
    others by averaging. The reward is the new fall: the fall without the part, `carried` times the
    last one, that the smoothing carries over from before the decision, which would credit it with
    the effect of earlier ones. It is compared with its own mean before it is squashed; otherwise a
    steadily falling loss saturates every reward.
    """
    settled = due & state.pending
    judged = state.judged + settled
    fall = state.fall / state.reference.abs().clamp(min=TINY)
    fall = fall.clamp(-FALL_LIMIT, FALL_LIMIT)
    falls = torch.stack([fall, fall - carried * state.last_fall])
    weight = (1 / judged.clamp(min=1).to(fall.dtype)).clamp(min=1 / config.memory)
    surprise = falls - state.means
    means = state.means + weight * surprise
    variances = (1 - weight) * (state.variances + weight * surprise.square())
    spread = variances.sqrt() + LEAST_SPREAD + LEAST_SHARE * means.abs()
    slot = torch.arange(TRENDS, device=fall.device) == state.cell // STABILITIES % TRENDS
    baseline = torch.where(slot, state.baselines, 0.0).sum()
    standing = (falls[1] - means[1]) / spread[1]
    reward = torch.tanh(standing / 2) - baseline
    clear = torch.where(settled, (standing / CLEAR).square(), 1.0)
    alpha = (config.alpha * clear.clamp(min=1.0)).clamp(max=1.0)
    trend = (fall / spread[0]).clamp(-TREND_LIMIT, TREND_LIMIT)
    baselines = torch.where(settled & slot, state.baselines + weight * reward, state.baselines)
    undone = settled & state.explored & (reward <= config.undo_margin)
    position = torch.where(undone, state.before, state.position)
    state = state._replace(
        judged=judged,
        position=torch.where(sound, position, _halved(state.position, config)),
        means=torch.where(settled, means, state.means),
        variances=torch.where(settled, variances, state.variances),
        baselines=baselines,
        trend=torch.where(settled, trend, state.trend),
        reward=torch.where(settled, reward, torch.where(sound, state.reward, -1.0)),
        last_fall=torch.where(due, fall, state.last_fall),
    )
    return state, alpha


def _halved(position: Float[Tensor, "2"], config: QLearningConfig) -> Float[Tensor, "2"]:
    least = bounds(config)[0][0]
    return torch.stack([(position[0] - math.log(2)).clamp(min=least), position[1]])


def _cell(state: QLearningState, config: QLearningConfig) -> Int[Tensor, ""]:
    """Index of the table row for the current observation."""
    second, third = state.position[1], state.trend
    if state.trust is not None:
        second, third = third.new_full((), state.trust.phase), state.trust.ratio
    signals = (state.position[0], second, third, state.stability)
    cell = torch.zeros_like(state.cell)
    for signal, edges in zip(signals, EDGES[config.signal], strict=True):
        digit = (signal > _constant(edges, signal.dtype, signal.device)).sum()
        cell = cell * (len(edges) + 1) + digit
    return cell


def _rows(state: QLearningState, cell: Int[Tensor, ""]) -> Float[Tensor, "2 9"]:
    """Rows of values of both tables; momentum's is padded with values that are never chosen."""
    place = cell.reshape(1)  # a scalar index would ask the device for its value
    momentum = state.q_momentum.index_select(0, place)
    missing = momentum.new_full((1, COUNTS[0] - COUNTS[1]), -math.inf)
    rate = state.q_learning_rate.index_select(0, place)
    return torch.cat([rate, torch.cat([momentum, missing], dim=1)])


def _learn(
    state: QLearningState,
    cell: Int[Tensor, ""],
    learns: Flag,
    alpha: Scalar,
    config: QLearningConfig,
) -> None:
    """Q ← Q + α clip(r + γ max Q[s'] − Q, ±1) for the last decision's two actions."""
    tables = [table.view(-1) for table in (state.q_learning_rate, state.q_momentum)]
    places = state.cell * _constant(COUNTS, torch.int64, cell.device) + state.actions
    old = torch.cat([tables[i].index_select(0, places[i : i + 1]) for i in range(2)])
    target = state.reward.to(old.dtype) + config.gamma * _rows(state, cell).amax(dim=1)
    new = old + alpha.to(old.dtype) * (target - old).clamp(-1.0, 1.0)
    new = torch.where(learns, new, old)
    for i in range(2):
        tables[i].index_copy_(0, places[i : i + 1], new[i : i + 1])


def _choose(
    state: QLearningState,
    cell: Int[Tensor, ""],
    due: Flag,
    config: QLearningConfig,
    steers_momentum: bool,
) -> QLearningState:
    """Picks both actions, ε-greedily, and moves the position accordingly."""
    step = state.count + 1  # fold_in uses counter 0
    draws = [random_bits(state.key, step, i) for i in range(6)]
    actions, explored = _pick(_rows(state, cell), draws, state.epsilon, config)
    position = state.position
    low, high = (_constant(b, position.dtype, position.device) for b in bounds(config))
    if state.trust is not None and state.trust.phase != STEADY:
        actions, explored = torch.zeros_like(actions), torch.zeros_like(explored)
    steps = [_constant(m, position.dtype, position.device) for m in moves(config)]
    steps = [m.index_select(0, actions[i : i + 1]) for i, m in enumerate(steps)]
    moved = (position + torch.cat(steps)).clamp(low, high)
    if not steers_momentum or state.trust is not None:
        actions = torch.stack([actions[0], torch.zeros_like(actions[1])])
        explored = torch.stack([explored[0], torch.zeros_like(explored[1])])
        moved = torch.stack([moved[0], position[1]])
    epsilon = (state.epsilon * config.epsilon_decay).clamp(min=config.epsilon_floor)
    return state._replace(
        position=torch.where(due, moved, position),
        before=torch.where(due, position, state.before),
        actions=torch.where(due, actions, state.actions),
        explored=torch.where(due, explored, state.explored),
        cell=torch.where(due, cell, state.cell),
        epsilon=torch.where(due, epsilon, state.epsilon),
    )


def _pick(
    values: Float[Tensor, "2 9"], draws: list[int], epsilon: Scalar, config: QLearningConfig
) -> tuple[Int[Tensor, "2"], Bool[Tensor, "2"]]:
    """Actions, and which ones were explored; a coin decides between a factor and its inverse."""
    orders = []
    for coin in draws[2::3]:
        pairs = [(i + 1, i) if coin % 2 == 1 else (i, i + 1) for i in range(1, COUNTS[0], 2)]
        order = (0, *(rank for pair in pairs for rank in pair))
        orders.append(_constant(order, torch.int64, values.device))
    good = values >= values.amax(dim=1, keepdim=True) - config.indifference
    greedy = torch.where(good, torch.stack(orders), COUNTS[0]).argmin(dim=1)
    explores = torch.stack([epsilon > (draw >> 8) / 2**24 for draw in draws[::3]])
    uniform = [draw % count for draw, count in zip(draws[1::3], COUNTS, strict=True)]
    choices = [torch.where(explores[i], uniform[i], greedy[i]) for i in range(2)]
    actions = torch.stack(choices)
    return actions, explores & (actions != 0)


# ---- what optimizers do with their agent ----------------------------------------------------


@runtime_checkable
class Steered(Protocol):
    """An optimizer with an agent."""

    @property
    def agent(self) -> QLearningState:
        """The agent as the last step left it."""
        ...


def q_learning_metrics(optimizer: Steered) -> dict[str, Tensor]:
    """What the agent of an optimizer did last, as scalar tensors on its device.

    `learning_rate` (of the first group) and `momentum` as the last step used them,
    `learning_rate_scale` over the base, `epsilon`, `reward` (−1 at a skipped step and at a surge),
    the factors that the last decision chose (`learning_rate_action`, and `momentum_action` of
    1 / (1 − momentum)), `smoothed_loss`, `trend` (the fall of the loss over its deviation),
    `stability` (deviation over mean of the gradient norm), the counts `decisions`,
    `skipped_steps` and `surges`, and with `signal="trust"` the pooled `trust_ratio`.
    """
    agent = optimizer.agent
    moves = LEARNING_RATE_ACTIONS["trend" if agent.trust is None else "trust"], MOMENTUM_ACTIONS
    factors = [
        torch.exp(agent.position.new_tensor(actions)[agent.actions[i]])
        for i, actions in enumerate(moves)
    ]
    trust = {} if agent.trust is None else {"trust_ratio": agent.trust.ratio}
    return trust | {
        "learning_rate": agent.learning_rate,
        "learning_rate_scale": torch.exp(agent.position[0]),
        "momentum": -torch.expm1(-agent.position[1]),
        "epsilon": agent.epsilon,
        "reward": agent.reward,
        "learning_rate_action": factors[0],
        "momentum_action": factors[1],
        "smoothed_loss": agent.smoothed,
        "trend": agent.trend,
        "stability": agent.stability,
        "decisions": agent.judged,
        "skipped_steps": agent.skipped,
        "surges": agent.surges,
    }


def save_agent(agent: QLearningState) -> dict[str, Any]:
    """The agent for a state dict, which later steps leave alone."""
    saved: dict[str, Any] = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in agent._asdict().items()
    }
    trust = saved.pop("trust")
    if trust is None:
        return saved
    return saved | {"trust": {**trust._asdict(), "ratio": trust.ratio.clone()}}


def load_agent(saved: dict[str, Any], device: torch.device) -> QLearningState:
    """The agent that `save_agent` gave, on `device`."""
    agent: dict[str, Any] = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in saved.items()
    }
    trust = agent.pop("trust", None)
    if trust is not None:
        trust = TrustState(**{**trust, "ratio": trust["ratio"].to(device, copy=True)})
    return QLearningState(**{**agent, "key": tuple(agent["key"])}, trust=trust)


def begin_counting(saved: dict[str, Any]) -> None:
    """Lets the agent that `save_agent` gave count from the first step of another run.

    It keeps what it has learned.
    """
    zero = torch.zeros_like(saved["skipped"])
    surge = saved["last_surge"] - saved["count"]
    saved |= {"count": 0, "skipped": zero, "surges": zero.clone(), "last_surge": surge}
    if "trust" in saved:
        saved |= {"trust": saved["trust"] | {"phase": RISING, "peak": 0.0}}


def require_agent(state_dict: dict[str, Any], kind: str) -> None:
    """Raises `ValueError` for the state dict of an optimizer without an agent."""
    require(
        "q_learning" in state_dict,
        f"state_dict: has no q_learning; pass what {kind}.state_dict() returned",
    )


def mean_loss(loss: Loss | None, like: Tensor) -> Scalar:
    """The loss that a step was given, with dtype and device of `like`."""
    if loss is None:
        raise ValueError("loss=None: the agent needs the mean loss; step(loss=...) or a closure")
    if not isinstance(loss, Tensor):
        return torch.full((), loss, dtype=like.dtype, device=like.device)
    require(loss.ndim == 0, f"loss: has shape {tuple(loss.shape)}; pass the mean loss")
    return loss.detach().to(like.device, like.dtype)


def wide(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
