"""The configuration of the Q-learning agent that steers an optimizer."""

from __future__ import annotations

from dataclasses import dataclass

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

    It decides every `interval` steps; loss and gradient norm are smoothed over `window` steps.
    `alpha` is the smallest step size of the table, `gamma` the discount. Each decision explores
    with probability `epsilon`, which is multiplied by `epsilon_decay` down to `epsilon_floor`.
    Greedy choices whose values lie within `indifference` of the best count as equal, and the one
    closest to no change wins; an exploratory change whose reward does not exceed `undo_margin` is
    undone. Smaller values of these two let noise move the learning rate. Running means and
    deviations cover about the last `memory` decisions. It is a failure when both the loss and the
    smoothed loss exceed `surge` times the first loss: the last decision then earns −1 and the
    learning rate is halved, at most once in `window` steps (`surge=0`: never). The learning rate
    stays within its base times [`min_scale`, `max_scale`].
    """

    interval: int = 10
    alpha: float = 0.1
    gamma: float = 0.5
    epsilon: float = 0.15
    epsilon_decay: float = 0.999
    epsilon_floor: float = 0.05
    indifference: float = 0.25
    undo_margin: float = 0.9
    memory: int = 1000
    surge: float = 2.0
    min_scale: float = 0.1
    max_scale: float = 10.0
    min_momentum: float = 0.5
    max_momentum: float = 0.995

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(self, "interval", "memory")
        require_fraction(self, "gamma", "min_momentum", "max_momentum")
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
