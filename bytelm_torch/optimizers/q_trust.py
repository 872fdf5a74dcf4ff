"""The trust ratio that the Q-learning agent observes: the actual over the predicted fall of the loss.

Predicted is the raw gradient times the applied update, with momentum, clipping and decay; actual is
what the loss of the same rows, with the same dropout, does. Named after the ratio by which
trust-region methods judge a step (Conn, Gould & Toint 2000). A reading is noisy, so that several
are pooled: the sum of the actual falls over the sum of the predicted ones.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.config.q_learning import QLearningConfig
from bytelm.q_table import HELD, RISING, STEADY, TINY, TRUST_LIMITS, TRUST_START

Scalar = Float[Tensor, ""]


class TrustState(NamedTuple):
    """The pooled falls of the loss, and where the schedule stands."""

    actual: Scalar
    predicted: Scalar
    phase: Int[Tensor, ""]
    peak: Scalar
    """The highest base learning rate so far."""


def init_trust(
    config: QLearningConfig, dtype: torch.dtype, device: torch.device
) -> TrustState | None:
    """The state before the first step; None for another signal."""
    if config.signal != "trust":
        return None
    zeros = torch.zeros((3,), dtype=dtype, device=device)
    phase = torch.zeros((), dtype=torch.int64, device=device)
    return TrustState(zeros[0].clone(), zeros[1].clone(), phase, zeros[2].clone())


def trust_ratio(trust: TrustState) -> Scalar:
    """Actual over predicted fall of the loss; 0 where steps lead up the gradient."""
    ratio = (trust.actual / trust.predicted.clamp(min=TINY)).clamp(*TRUST_LIMITS)
    read = (trust.actual != 0) | (trust.predicted != 0)
    return torch.where(read, torch.where(trust.predicted > 0, ratio, 0.0), TRUST_START)


def reads_trust(config: QLearningConfig, count: int) -> bool:
    """Whether a reading is due at a step after `count` others: the last before a decision."""
    return config.signal == "trust" and (count + 1) % config.interval == 0


def pooled(
    trust: TrustState,
    actual: Scalar,
    predicted: Scalar,
    known: Bool[Tensor, ""],
    config: QLearningConfig,
) -> TrustState:
    """The state after a reading, if that is `known` and finite."""
    low, high = (limit * predicted.abs() for limit in TRUST_LIMITS)
    actual = torch.where(actual.isfinite(), torch.clamp(actual, low, high), low)
    known, kept = known & predicted.isfinite(), 1 - 1 / config.readings
    return trust._replace(
        actual=torch.where(known, kept * trust.actual + actual, trust.actual),
        predicted=torch.where(known, kept * trust.predicted + predicted, trust.predicted),
    )


def in_phase(trust: TrustState, base: float | Tensor, config: QLearningConfig) -> TrustState:
    """The state after a step at this learning rate of the schedule."""
    base = torch.zeros_like(trust.peak) + base
    phase = torch.where(base < config.hold_below * trust.peak, HELD, STEADY)
    phase = torch.where(base > trust.peak, RISING, phase)
    return trust._replace(phase=phase, peak=torch.maximum(base, trust.peak))


def evaluate(
    closure: Callable[[], Any],
    weights: Iterable[nn.Parameter],
    device: torch.device,
    config: QLearningConfig,
) -> tuple[Any, Callable[[], Any] | None]:
    """What `closure` returns, and a function that calls it again with the same random numbers.

    The second call leaves gradients and random states as it found them. None where no trust ratio
    is read.
    """
    if config.signal != "trust":
        with torch.enable_grad():
            return closure(), None
    cuda = [device] if device.type == "cuda" else []
    before = torch.get_rng_state(), [torch.cuda.get_rng_state(each) for each in cuda]
    with torch.enable_grad():
        first = closure()

    def again() -> Any:
        held = [(weight, weight.grad) for weight in weights]
        for weight, _ in held:
            weight.grad = None
        with torch.random.fork_rng(cuda), torch.enable_grad():
            torch.set_rng_state(before[0])
            for each, state in zip(cuda, before[1], strict=True):
                torch.cuda.set_rng_state(state, each)
            value = closure()
        for weight, gradient in held:
            weight.grad = gradient
        return value

    return first, again


def require_value(value_fn: Callable[[], Any] | None) -> Callable[[], Any]:
    """`value_fn`; raises `ValueError` if there is none."""
    if value_fn is None:
        raise ValueError(
            "value_fn=None: signal=trust needs the loss after the step; step(closure), or "
            "step(loss=loss, value_fn=loss_of)"
        )
    return value_fn
