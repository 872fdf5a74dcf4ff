"""The trust ratio, which the Q-learning agent observes: actual over predicted fall of the loss.

Predicted is the raw gradient times the applied update, with momentum, clipping and decay; actual is
what the loss of the same rows, with the same dropout, does. Named after the ratio by which
trust-region methods judge a step (Conn, Gould & Toint 2000). A reading is noisy, so that several
are pooled, as a running mean of ratios within `TRUST_LIMITS`: falls of the loss shrink by orders
of magnitude while a model trains, so that a ratio of sums would be that of long ago.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bytelm.config.q_learning import QLearningConfig
from bytelm.q_table import HELD, RISING, STEADY, TINY, TRUST_LIMITS, TRUST_START

Scalar = Float[Tensor, ""]


class TrustState(NamedTuple):
    """The running mean of the readings, and where the schedule stands."""

    ratio: Scalar
    phase: int
    peak: float
    """The highest base learning rate so far."""


def init_trust(
    config: QLearningConfig, dtype: torch.dtype, device: torch.device
) -> TrustState | None:
    """The state before the first step; None for another signal."""
    if config.signal != "trust":
        return None
    ratio = torch.full((), TRUST_START, dtype=dtype, device=device)
    return TrustState(ratio, RISING, 0.0)


def reads_trust(trust: TrustState | None, count: int, config: QLearningConfig) -> bool:
    """Whether a reading is due at a step after `count` others: the last before a decision.

    Only near the schedule's peak: elsewhere the agent changes nothing, and the loss would be
    computed for nothing.
    """
    steady = trust is not None and trust.phase == STEADY
    return steady and (count + 1) % config.interval == 0


def pooled(
    trust: TrustState,
    actual: Scalar,
    predicted: Scalar,
    known: Bool[Tensor, ""],
    config: QLearningConfig,
) -> TrustState:
    """With one more reading: 0 where the step leads up the gradient, as momentum may."""
    low, high = TRUST_LIMITS
    reading = (actual / predicted.clamp(min=TINY)).clamp(low, high)
    reading = torch.where(actual.isfinite(), reading, low)
    reading = torch.where(predicted > 0, reading, 0.0)
    ratio = trust.ratio + (reading - trust.ratio) / config.readings
    return trust._replace(ratio=torch.where(known & predicted.isfinite(), ratio, trust.ratio))


def in_phase(trust: TrustState, base: float | Tensor, config: QLearningConfig) -> TrustState:
    """The state after a step at this learning rate of the schedule."""
    base = float(base)
    phase = HELD if base < config.hold_below * trust.peak else STEADY
    phase = RISING if base > trust.peak else phase
    return trust._replace(phase=phase, peak=max(base, trust.peak))


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
