"""The configuration of the Q-learning agent that steers an optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bytelm.config.base import (
    require,
    require_fraction,
    require_non_negative,
    require_numbers,
    require_positive,
)


@dataclass(frozen=True, kw_only=True)
class QLearningConfig:
    """The agent that steers learning rate and momentum.

    Loss and gradient norm are smoothed over `window` steps. With smaller values of `indifference`
    and `undo_margin`, noise moves the learning rate. If both the loss and the smoothed loss exceed
    a multiple `surge` of the first loss, the last decision earns −1 and the learning rate is
    halved, at most once in `window` steps.

    With `signal="trust"` the agent observes the trust ratio, the actual over the predicted fall of
    the loss, on the rows of the step itself: near 1 a step is too short to matter, near 0 it
    overshoots. It is read at the last step before each decision, which costs one more forward pass,
    so an `interval` of 20 is advised. The agent then steers only the learning rate, starts with a
    table that says what the ratio means, and leaves the rate alone once the schedule has fallen
    below `hold_below` of its peak.
    """

    signal: Literal["trend", "trust"] = "trend"
    """What the agent observes: how the loss has been falling, or the trust ratio."""
    readings: int = 5
    """Trust ratios that are pooled, each counting less than the next one."""
    hold_below: float = 0.75
    """Fraction of the schedule's peak below which a trust ratio no longer changes the rate."""
    interval: int = 10
    """Steps between decisions."""
    alpha: float = 0.1
    """Smallest step size of the table's updates."""
    gamma: float = 0.5
    """Discount of later rewards."""
    epsilon: float = 0.15
    """Probability at first that a decision explores."""
    epsilon_decay: float = 0.999
    """Factor of that probability after each decision."""
    epsilon_floor: float = 0.05
    """Lowest probability of exploring."""
    indifference: float = 0.25
    """Values this close to the best count as equal; the smallest change wins."""
    undo_margin: float = 0.9
    """Reward below which an exploratory change is undone."""
    memory: int = 1000
    """Decisions that running means and deviations cover."""
    surge: float = 2.0
    """Multiple of the first loss that counts as a failure and halves the rate; 0: never."""
    min_scale: float = 0.1
    """Lowest learning rate, as a multiple of the schedule's."""
    max_scale: float = 10.0
    """Highest learning rate, as a multiple of the schedule's."""
    min_momentum: float = 0.5
    """Lowest momentum."""
    max_momentum: float = 0.995
    """Highest momentum."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(self, "interval", "memory", "readings")
        require_fraction(self, "gamma", "min_momentum", "max_momentum")
        held = self.hold_below
        require(0 <= held <= 1, f"hold_below={held}: must be between 0 and 1")
        for name in ("readings", "hold_below") if self.signal == "trend" else ():
            value, default = getattr(self, name), getattr(QLearningConfig, name)
            require(value == default, f"{name}={value}: has no effect on signal=trend")
        for name in ("alpha", "epsilon_decay"):
            value = getattr(self, name)
            require(0 < value <= 1, f"{name}={value}: must be above 0 and at most 1")
        for name in ("epsilon", "epsilon_floor"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value}: must be between 0 and 1")
        require_non_negative(self, "indifference", "undo_margin")
        require(
            self.surge == 0 or self.surge > 1,
            f"surge={self.surge}: must be above 1, or 0 for never",
        )
        low, high = self.min_scale, self.max_scale
        require(0 < low <= 1, f"min_scale={low}: must be above 0 and at most 1")
        require(high >= 1, f"max_scale={high}: must be at least 1")
        low, high = self.min_momentum, self.max_momentum
        require(low <= high, f"min_momentum={low}: must be at most max_momentum={high}")

    @property
    def window(self) -> int:
        """Half-life of the smoothed loss and length of the gradient-norm window, in steps."""
        return max(8, self.interval)
