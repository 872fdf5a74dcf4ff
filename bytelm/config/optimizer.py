"""The configurations of the optimizers: one class per optimizer, selected by `name`.

A new optimizer is a class here with a line in `OPTIMIZER_CONFIGS`, and a builder in
`optimizers/build.py` of each framework.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from bytelm.config.base import (
    require,
    require_fraction,
    require_non_negative,
    require_numbers,
    require_positive,
)
from bytelm.config.q_learning import QLearningConfig

__all__ = [
    "AdamWConfig",
    "LionConfig",
    "MuonConfig",
    "OptimizerConfig",
    "QLearningAdamWConfig",
    "QLearningSGDConfig",
    "SGDConfig",
]
"""What `bytelm.config`, `bytelm`, `bytelm_jax` and `bytelm_torch` offer of this module by `*`."""


_LARGEST_RATE = 1e30
"""Far beyond use; more would overflow float32 in the optimizers' own arithmetic."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The fields that all optimizers share; each class adds its own.

    The learning rate rises linearly over the warm-up and then follows `schedule`. Under "cosine"
    and "linear" it falls over the rest of the run, under "constant" it stays the same, and under
    the schedule "wsd" (warm-up, stable, decay) it stays the same until it falls linearly over the
    last `decay_steps`. A run under "wsd" can continue with more steps and other `decay_steps`.
    Weight decay is decoupled, unless the class says otherwise, and does not apply to norms and
    biases.
    """

    name: ClassVar[str]
    """Selects the class in `config.json` and on the command line."""
    has_agent: ClassVar[bool] = False
    """Whether a Q-learning agent steers this optimizer and reports its actions at each step."""
    adamw_rate: ClassVar[float] = 1.0
    """AdamW's learning rate divided by this optimizer's; the weight decay scales inversely.

    Used to convert a recipe tuned for one optimizer to another one that has not been tuned.
    """

    learning_rate: float = 1e-3
    """Learning rate at the end of the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the learning rate continues after the warm-up."""
    decay_steps: int = 0
    """Steps at the end of the run over which "wsd" falls; 0: it does not fall."""
    final_fraction: float = 0.1
    """Learning rate at the end of the run, as a fraction of `learning_rate`."""
    weight_decay: float = 0.1
    """Fraction of a weight that a step removes, before multiplication by the learning rate."""
    max_grad_norm: float = 1.0
    """Global norm to which the gradient is clipped; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if type(self) is OptimizerConfig:
            raise TypeError("OptimizerConfig: use one of its subclasses, such as AdamWConfig")
        require_numbers(self)
        rate = self.learning_rate
        require(rate > 0, f"learning_rate={rate}: must be above 0")
        require(rate <= _LARGEST_RATE, f"learning_rate={rate}: must be at most {_LARGEST_RATE:g}")
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}: must be at least 0")
        require(
            0 <= self.final_fraction <= 1,
            f"final_fraction={self.final_fraction}: must be between 0 and 1",
        )
        require_non_negative(self, "weight_decay", "max_grad_norm", "decay_steps")
        require(
            not self.decay_steps or self.schedule == "wsd",
            f"decay_steps={self.decay_steps}: has no effect on schedule={self.schedule}; leave it "
            "out or choose wsd",
        )
        usual = type(self).final_fraction
        require(
            self.schedule != "constant" or self.final_fraction == usual,
            f"final_fraction={self.final_fraction}: has no effect on schedule=constant; leave it "
            "out or choose another",
        )

    def decay_start(self, steps: int) -> int | None:
        """The step of a run of `steps` at which the learning rate begins to fall; None: never."""
        if self.schedule == "constant" or (self.schedule == "wsd" and not self.decay_steps):
            return None
        return max(self.warmup_steps, steps - self.decay_steps if self.schedule == "wsd" else 0)

    def _require_shrinking(self, most: float = 2.0) -> None:
        require_shrinking(self.learning_rate, self.weight_decay, most)


def require_shrinking(rate: float, decay: float, most: float = 2.0) -> None:
    """Raises `ValueError` if weight decay alone would make a weight grow at each step."""
    require(
        rate * decay <= most,
        f"weight_decay={decay}: times learning_rate={rate} it must be at most {most:g}, or "
        "weights grow without bound; lower one of them",
    )


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov & Hutter 2019)."""

    name: ClassVar[str] = "adamw"

    beta1: float = 0.9
    """Decay of the average of gradients."""
    beta2: float = 0.95
    """Decay of the average of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the average of squared gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self, "beta1", "beta2")
        require_non_negative(self, "epsilon")
        self._require_shrinking()


@dataclass(frozen=True, kw_only=True)
class SGDConfig(OptimizerConfig):
    """SGD with heavy-ball momentum; the weight decay is added to the gradient.

    Learning rate and weight decay are AdamW's times and divided by 100, which was measured on small
    models (`scripts/bench/bench_rates.py`).
    """

    name: ClassVar[str] = "sgd"
    adamw_rate: ClassVar[float] = 0.01

    learning_rate: float = 0.1
    """Learning rate at the end of the warm-up."""
    weight_decay: float = 1e-3
    """Fraction of a weight that is added to its gradient."""
    momentum: float = 0.9
    """Fraction of the previous velocity that is kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self, "momentum")
        self._require_shrinking(2 * (1 + self.momentum))


@dataclass(frozen=True, kw_only=True)
class QLearningSGDConfig(OptimizerConfig):
    """SGD whose learning rate and momentum the Q-learning agent of `controller` steers.

    Learning rate and weight decay follow from AdamW's as those of plain SGD.
    """

    name: ClassVar[str] = "q_learning_sgd"
    has_agent: ClassVar[bool] = True
    adamw_rate: ClassVar[float] = SGDConfig.adamw_rate

    learning_rate: float = SGDConfig.learning_rate
    """Learning rate at the end of the warm-up, before the agent adjusts it."""
    weight_decay: float = SGDConfig.weight_decay
    """Fraction of a weight that a step removes, before multiplication by the learning rate."""
    momentum: float = 0.9
    """Decay of the average of gradients, before the agent adjusts it."""
    entropy_threshold: float = 0.0
    """Steps shrink when the gradient's entropy over the leaves is lower, in [0, 1]; 0: never."""
    noise_scale: float = 0.0
    """Deviation of the gradient noise relative to the gradient's root mean square; 0: no noise."""
    centralize: bool = True
    """Whether the mean over its inputs is subtracted from the gradient of each kernel."""
    controller: QLearningConfig = field(default_factory=QLearningConfig)
    """Configuration of the Q-learning agent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self, "momentum")
        require_non_negative(self, "entropy_threshold", "noise_scale")
        self._require_shrinking()
        _require_reach(self.controller, "momentum", self.momentum)


@dataclass(frozen=True, kw_only=True)
class QLearningAdamWConfig(OptimizerConfig):
    """AdamW whose learning rate and `beta1` the Q-learning agent of `controller` steers."""

    name: ClassVar[str] = "q_learning_adamw"
    has_agent: ClassVar[bool] = True

    beta1: float = 0.9
    """Decay of the average of gradients, before the agent adjusts it."""
    beta2: float = 0.95
    """Decay of the average of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the average of squared gradients."""
    controller: QLearningConfig = field(default_factory=QLearningConfig)
    """Configuration of the Q-learning agent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self, "beta1", "beta2")
        require_non_negative(self, "epsilon")
        self._require_shrinking()
        _require_reach(self.controller, "beta1", self.beta1)


@dataclass(frozen=True, kw_only=True)
class LionConfig(OptimizerConfig):
    """Lion, the sign of an average of gradients (Chen et al. 2023).

    Learning rate and weight decay are AdamW's divided and multiplied by 10, the upper end of the
    paper's range of 3 to 10.
    """

    name: ClassVar[str] = "lion"
    adamw_rate: ClassVar[float] = 10.0

    learning_rate: float = 1e-4
    """Learning rate at the end of the warm-up; every weight moves by this much at each step."""
    weight_decay: float = 1.0
    """Fraction of a weight that a step removes, before multiplication by the learning rate."""
    beta1: float = 0.9
    """Weight of the average in the sum whose sign is taken; the current gradient has the rest."""
    beta2: float = 0.99
    """Decay of the average of gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self, "beta1", "beta2")
        self._require_shrinking()


@dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024) for kernels, each expert's separately; AdamW for everything else.

    Everything else is embeddings, n-gram tables, the output head, norms and biases. Muon's updates
    are scaled to the root mean square of AdamW's (Liu et al. 2025), so that AdamW's learning rate
    and weight decay fit.
    """

    name: ClassVar[str] = "muon"

    beta: float = 0.95
    """Decay of the average of gradients under Muon."""
    ns_steps: int = 5
    """Iterations of Newton-Schulz that orthogonalise that average."""
    consistent_rms: float = 0.2
    """Root mean square of a Muon update, before multiplication by the learning rate."""
    adam_learning_rate: float | None = None
    """Learning rate of AdamW, under the same schedule; None: `learning_rate`."""
    adam_beta1: float = 0.9
    """Decay of the average of gradients under AdamW."""
    adam_beta2: float = 0.95
    """Decay of the average of squared gradients under AdamW."""
    epsilon: float = 1e-8
    """Added to a matrix's norm under Muon, and to the root of the second moment under AdamW."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self, "beta", "adam_beta1", "adam_beta2")
        require_positive(self, "ns_steps")
        require_non_negative(self, "epsilon", "consistent_rms")
        require(self.adam_rate > 0, f"adam_learning_rate={self.adam_rate}: must be above 0")
        self._require_shrinking()
        require(
            self.adam_rate * self.weight_decay <= 2,
            f"weight_decay={self.weight_decay}: times adam_learning_rate={self.adam_rate} it must "
            "be at most 2, or weights grow without bound; lower one of them",
        )

    @property
    def adam_rate(self) -> float:
        """The learning rate of AdamW."""
        return self.learning_rate if self.adam_learning_rate is None else self.adam_learning_rate


OPTIMIZER_CONFIGS: dict[str, type[OptimizerConfig]] = {
    kind.name: kind
    for kind in (
        AdamWConfig,
        SGDConfig,
        QLearningSGDConfig,
        QLearningAdamWConfig,
        LionConfig,
        MuonConfig,
    )
}
"""Name → class of every optimizer."""

DEFAULT_OPTIMIZER = AdamWConfig.name
"""The optimizer of a configuration file that names none."""

_FLAT_FORM: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "momentum": 0.9,
    "entropy_threshold": 0.0,
    "noise_scale": 0.0,
    "centralize": True,
    "controller": {f.name: f.default for f in fields(QLearningConfig)},
}
"""Older files hold these fields for every optimizer; at these values they have no effect."""

_FLAT_OPTIMIZERS = ("adamw", "sgd", "q_learning_sgd", "q_learning_adamw")
"""The optimizers of which there are such files."""


def optimizer_class(name: Any, where: str = "optimizer") -> type[OptimizerConfig]:
    """The configuration class of the optimizer called `name`; raises `ValueError` if it is unknown.

    `where` is the configuration that names it, for the message.
    """
    require(
        isinstance(name, str) and name in OPTIMIZER_CONFIGS,
        f"{where}.name={name!r}: choose one of {', '.join(OPTIMIZER_CONFIGS)}",
    )
    return OPTIMIZER_CONFIGS[name]


def optimizers_with(field_name: str) -> list[str]:
    """Names of the optimizers that have the field; `interval` also finds `controller.interval`."""

    def has(kind: type[OptimizerConfig]) -> bool:
        values = {f.name: getattr(kind(), f.name) for f in fields(kind)}
        inner = {f"{n}.{f.name}" for n, v in values.items() if is_dataclass(v) for f in fields(v)}
        return field_name in values or any(field_name in (n, n.partition(".")[2]) for n in inner)

    return [name for name, kind in OPTIMIZER_CONFIGS.items() if has(kind)]


def change_optimizer(
    config: OptimizerConfig, name: str, adamw_rate: float | None = None
) -> OptimizerConfig:
    """Converts `config` to the optimizer called `name`.

    Shared fields stay, except that learning rate and weight decay are scaled by `adamw_rate`, by
    default that of the class; other fields that were changed from their defaults stay too. Raises
    `ValueError` for an unknown name, and for a changed field that the new optimizer does not have.
    """
    kind = optimizer_class(name)
    if kind is type(config):
        return config
    usual = type(config)()
    shared = {field.name for field in fields(OptimizerConfig)}
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    changed = {k: v for k, v in values.items() if k in shared or v != getattr(usual, k)}
    for field_name, value in changed.items():
        _require_effect(kind, field_name, value, "optimizer")
    ratio = (adamw_rate or kind.adamw_rate) / type(config).adamw_rate
    if ratio != 1:  # rounded in decimal, so that a file shows 0.003 / 10 as 0.0003
        changed["learning_rate"] = float(f"{changed['learning_rate'] / ratio:.12g}")
        changed["weight_decay"] = float(f"{changed['weight_decay'] * ratio:.12g}")
    return kind(**changed)


def without_foreign_fields(
    kind: type[OptimizerConfig], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Drops the fields of other optimizers, which older files hold for every optimizer.

    A dropped field that differs from its old default raises `ValueError`.
    """
    names, accepted = {f.name for f in fields(kind)}, dict[str, Any]()
    for name, value in values.items():
        if name in names or name not in _FLAT_FORM or kind.name not in _FLAT_OPTIMIZERS:
            _require_effect(kind, name, value, where)
            accepted[name] = value
            continue
        usual = _FLAT_FORM[name]
        if isinstance(usual, dict) and isinstance(value, dict):
            for leaf, leaf_value in value.items():
                if leaf not in usual or leaf_value != usual[leaf]:
                    _require_effect(kind, f"{name}.{leaf}", leaf_value, where)
        elif value != usual:
            _require_effect(kind, name, value, where)
    return accepted


def _require_effect(kind: type[OptimizerConfig], name: str, value: Any, where: str) -> None:
    """Raises `ValueError` if other optimizers have the field and `kind` does not."""
    takers = optimizers_with(name)
    require(
        not takers or kind.name in takers,
        f"{where}.{name}={value}: has no effect on {kind.name}; leave it out or choose "
        f"optimizer.name {' or '.join(takers)}",
    )


def _require_reach(controller: QLearningConfig, name: str, value: float) -> None:
    """Raises `ValueError` unless the initial momentum lies within the agent's limits."""
    low, high = controller.min_momentum, controller.max_momentum
    require(
        low <= value <= high,
        f"{name}={value}: must lie within the controller's min_momentum={low} and "
        f"max_momentum={high}",
    )
