"""The configurations of the optimizers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from bytelm.config.base import (
    require,
    require_finite,
    require_fraction,
)
from bytelm.config.q_learning import QLearningConfig

_ONLY_FOR = {
    "beta1": ("adamw", "q_learning_adamw"),
    "beta2": ("adamw", "q_learning_adamw"),
    "epsilon": ("adamw", "q_learning_adamw"),
    "momentum": ("sgd", "q_learning_sgd"),
    "entropy_threshold": ("q_learning_sgd",),
    "noise_scale": ("q_learning_sgd",),
    "centralize": ("q_learning_sgd",),
    "controller": ("q_learning_sgd", "q_learning_adamw"),
}
"""Fields of `OptimizerConfig` that mean nothing to the optimizers not named here."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer: linear warm-up, then cosine decay to `learning_rate * final_fraction`.

    `q_learning_sgd` and `q_learning_adamw` put that rate, and `momentum` or `beta1`, under the
    agent of `controller`. A field of another optimizer than `name` must keep its default: `beta1`,
    `beta2`, `epsilon` belong to the two of AdamW, `momentum` to the two of SGD, and
    `entropy_threshold`, `noise_scale`, `centralize` to `q_learning_sgd`. `max_grad_norm=0` turns
    clipping off. Weight decay leaves norms and biases alone; `sgd` adds it to the gradient, for
    the others it is decoupled.
    """

    name: Literal["adamw", "sgd", "q_learning_sgd", "q_learning_adamw"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.9
    max_grad_norm: float = 1.0
    entropy_threshold: float = 0.0
    noise_scale: float = 0.0
    centralize: bool = True
    controller: QLearningConfig = field(default_factory=QLearningConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate}: must be above 0")
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}: must be at least 0")
        require(
            0 <= self.final_fraction <= 1,
            f"final_fraction={self.final_fraction}: must be between 0 and 1",
        )
        require_fraction(self, "beta1", "beta2", "momentum")
        numbers = "weight_decay", "epsilon", "max_grad_norm", "entropy_threshold", "noise_scale"
        for name in numbers:
            value = getattr(self, name)
            require(value >= 0, f"{name}={value}: must be at least 0")
        self._check_decay()
        self._check_that_every_field_counts()
        if self.name.startswith("q_learning"):
            name = "momentum" if self.name == "q_learning_sgd" else "beta1"
            value, low = getattr(self, name), self.controller.min_momentum
            require(
                low <= value <= self.controller.max_momentum,
                f"{name}={value}: must lie within the controller's min_momentum={low} and "
                f"max_momentum={self.controller.max_momentum}",
            )

    def _check_decay(self) -> None:
        """Past these bounds a weight that nothing else moves grows from step to step."""
        most = 2 * (1 + self.momentum) if self.name == "sgd" else 2.0
        rate, decay = self.learning_rate, self.weight_decay
        require(
            rate * decay <= most,
            f"weight_decay={decay}: times learning_rate={rate} it must be at most {most:g}, or "
            "weights grow without bound; lower one of them",
        )

    def _check_that_every_field_counts(self) -> None:
        for name, takers in _ONLY_FOR.items():
            given, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            changed = [(name, given, default)] if given != default else []
            if name == "controller":
                own = [
                    (f.name, getattr(given, f.name), f.default) for f in dataclasses.fields(given)
                ]
                changed = [(f"{name}.{key}", *pair) for key, *pair in own if pair[0] != pair[1]]
            for where, value, usual in changed:
                require(
                    self.name in takers,
                    f"{where}={value}: has no effect on {self.name}; leave it at {usual} or "
                    f"choose optimizer.name {' or '.join(takers)}",
                )
