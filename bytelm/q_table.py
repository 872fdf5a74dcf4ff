"""The Q-learning agent's table: its cells, its actions, and the limits of what it is told."""

import math

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
EDGES = (SCALE_EDGES, MOMENTUM_EDGES, TREND_EDGES, STABILITY_EDGES)
CELLS = math.prod(len(edges) + 1 for edges in EDGES)

LEARNING_RATE_ACTIONS = actions(1.025, 1.05, 1.1, 1.15)
MOMENTUM_ACTIONS = actions(1.025, 1.05, 1.1)
COUNTS = len(LEARNING_RATE_ACTIONS), len(MOMENTUM_ACTIONS)
MOVES = LEARNING_RATE_ACTIONS, MOMENTUM_ACTIONS + (0.0,) * (COUNTS[0] - COUNTS[1])

TRENDS, STABILITIES = len(TREND_EDGES) + 1, len(STABILITY_EDGES) + 1
TREND_LIMIT = 10.0
FALL_LIMIT = 1e3  # a finite loss of 1e30 must not make the table NaN
CLEAR = 2.0  # deviations above which a reward is learned faster
LEAST_SPREAD, LEAST_SHARE = 1e-7, 1e-3  # of a fall, and of its mean: anything below is rounding
TINY = 1e-30


def bounds(config: QLearningConfig) -> tuple[tuple[float, float], tuple[float, float]]:
    """Lowest and highest positions of (learning rate, momentum)."""
    least = math.log(config.min_scale), log_memory(config.min_momentum)
    return least, (math.log(config.max_scale), log_memory(config.max_momentum))
