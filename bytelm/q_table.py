"""The Q-learning agent's table: its cells, its actions, and the limits of what it is told.

By the signal "trend" the table starts at 0 and everything is learned. By "trust" the phase of the
schedule takes the place of momentum in it and the trust ratio that of the trend, and its first
values say which move each ratio asks for; rewards then move them.
"""

import functools
import math

import numpy as np

from bytelm.config.q_learning import QLearningConfig


def log_memory(momentum: float) -> float:
    """log of 1 / (1 - momentum), the scale on which momentum is binned and changed."""
    return -math.log1p(-momentum)


def actions(*factors: float) -> tuple[float, ...]:
    """Logarithms of the factors: no change, then nearest first, each before its inverse."""
    return (0.0, *(sign * math.log(f) for f in factors for sign in (1.0, -1.0)))


SCALE_EDGES = tuple(math.log(x) for x in (0.15, 0.4, 0.8, 1.25, 2.5, 6.0))
MOMENTUM_EDGES = tuple(log_memory(x) for x in (0.6, 0.8, 0.87, 0.93, 0.96, 0.985))
TREND_EDGES = (-2.0, -1.0, -0.3, 0.3, 1.0, 2.0)
STABILITY_EDGES = (0.05, 0.1, 0.2, 0.3, 0.5)
RISING, STEADY, HELD = range(3)
"""Phases of the schedule: it reaches a new peak, it is near its peak, it has left it."""
PHASE_EDGES = (RISING + 0.5, STEADY + 0.5)
TRUST_EDGES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8)
EDGES = {
    "trend": (SCALE_EDGES, MOMENTUM_EDGES, TREND_EDGES, STABILITY_EDGES),
    "trust": (SCALE_EDGES, PHASE_EDGES, TRUST_EDGES, STABILITY_EDGES),
}
"""By signal, the edges between the bins of each of the four observations."""

MOMENTUM_ACTIONS = actions(1.025, 1.05, 1.1)
LEARNING_RATE_ACTIONS = {
    "trend": actions(1.025, 1.05, 1.1, 1.15),
    "trust": actions(1.1, 1.25, 1.5, 2.0),
}
"""By signal; a trust ratio speaks of the rate itself, so that larger moves are sound."""
COUNTS = len(LEARNING_RATE_ACTIONS["trend"]), len(MOMENTUM_ACTIONS)

TRUST_MOVES = {
    RISING: (1.0,) * 7,
    STEADY: (1 / 2, 1 / 1.5, 1 / 1.25, 1.0, 1.1, 1.25, 1.5),
    HELD: (1.0,) * 7,
}
"""By phase, the factor of the learning rate that each bin of the trust ratio asks for at first."""
TRUST_START = 0.475
"""The trust ratio before the first reading: in the bin that asks for no change."""
TRUST_LIMITS = -1.0, 1.5
"""A reading counts as no less and no more, so that an outlier does not stay in the running mean."""
PRIOR = 4.0
"""First value that an action loses per unit of its distance, in the logarithm, from that factor:
neighbours differ by more than `indifference`, and by more than a few rewards change."""

TRENDS, STABILITIES = len(TREND_EDGES) + 1, len(STABILITY_EDGES) + 1
TREND_LIMIT = 10.0
FALL_LIMIT = 1e3  # a finite loss of 1e30 must not make the table NaN
CLEAR = 2.0  # deviations above which a reward is learned faster
LEAST_SPREAD, LEAST_SHARE = 1e-7, 1e-3  # of a fall, and of its mean: anything below is rounding
TINY = 1e-30


def moves(config: QLearningConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Logarithms of the factors of (learning rate, 1 / (1 - momentum)), of one length."""
    return LEARNING_RATE_ACTIONS[config.signal], MOMENTUM_ACTIONS + (0.0,) * (COUNTS[0] - COUNTS[1])


def cells(config: QLearningConfig) -> int:
    """Rows of the table."""
    return math.prod(len(edges) + 1 for edges in EDGES[config.signal])


@functools.cache
def first_values(config: QLearningConfig) -> np.ndarray:
    """The table of the learning rate before anything is learned, float32 [cells, actions]."""
    values = np.zeros((cells(config), COUNTS[0]), np.float32)
    if config.signal == "trust":
        each = np.asarray(LEARNING_RATE_ACTIONS["trust"])
        for phase, factors in TRUST_MOVES.items():
            wanted = np.log(factors)[:, None]
            prior = -PRIOR * np.abs(each[None] - wanted)  # [trust, actions]
            shape = (len(SCALE_EDGES) + 1, len(TRUST_MOVES), len(factors), STABILITIES, COUNTS[0])
            values.reshape(shape)[:, phase] = prior[None, :, None]
    return values


def bounds(config: QLearningConfig) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lowest and highest positions of (learning rate, momentum)."""
    least = math.log(config.min_scale), log_memory(config.min_momentum)
    return least, (math.log(config.max_scale), log_memory(config.max_momentum))
