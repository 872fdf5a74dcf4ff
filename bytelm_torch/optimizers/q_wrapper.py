"""Any optimizer of torch under the Q-learning agent that steers `EnhancedSGD`."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from bytelm.config.base import require, require_amount, require_number
from bytelm.config.q_learning import QLearningConfig
from bytelm_torch.optimizers.groups import all_or_none, check_group
from bytelm_torch.optimizers.q_agent import (
    Loss,
    init_agent,
    load_agent,
    mean_loss,
    require_agent,
    save_agent,
    step_agent,
    wide,
)
from bytelm_torch.optimizers.q_trust import (
    evaluate,
    in_phase,
    pooled,
    reads_trust,
    require_value,
)

_DEFAULT_CONTROLLER = QLearningConfig()


class QLearning(torch.optim.Optimizer):
    """Any optimizer under the agent of `EnhancedSGD`; `q_learning(inner)` makes one.

    It holds `inner` and shares its groups and state, so that a scheduler of torch may set their
    base `lr`. The agent sees the gradient norm; then the gradients are clipped to `max_grad_norm`
    (0: not) and `inner` takes its step at the agent's rate. A step whose loss or gradient norm is
    not finite changes neither parameters nor the state of `inner`. Since other optimizers take
    their rate as a Python number, a step waits for the device once; `EnhancedSGD` never does.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        controller: QLearningConfig = _DEFAULT_CONTROLLER,
        seed: int = 0,
        max_grad_norm: float = 0.0,
    ):
        require_number("seed", seed)
        require_amount("max_grad_norm", max_grad_norm)
        for group in inner.param_groups:
            check_group(group)
        self.inner = inner
        self._controller, self._max_grad_norm = controller, max_grad_norm
        group, low, high = inner.param_groups[0], controller.min_momentum, controller.max_momentum
        momentum = float(_momentum(group) or 0.0)
        require(
            _momentum(group) is None or low <= momentum <= high,
            f"momentum={momentum}: must be in [{low}, {high}]",
        )
        # No defaults: those of `inner` hold for new groups, and a scheduler that finds `betas` here
        # would cycle what the agent sets.
        super().__init__(inner.param_groups, {})
        self._share_state()
        weights = [weight for group in self.param_groups for weight in group["params"]]
        dtype = functools.reduce(torch.promote_types, (w.dtype for w in weights), torch.float32)
        place = weights[0].device
        self.agent = init_agent(controller, momentum, seed, dtype, place)

    def _share_state(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to `inner`, whose defaults hold for it; the agent steers it from now on."""
        if self.param_groups is not self.inner.param_groups:
            return  # torch's constructor passes the groups that `inner` has already
        with all_or_none(self.param_groups):
            self.inner.add_param_group(param_group)
            check_group(self.param_groups[-1])

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Loss | None = None,
        value_fn: Callable[[], Any] | None = None,
    ) -> Any:
        """One step, as `EnhancedSGD.step`."""
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if closure is not None:
            place = self.agent.position.device
            loss, again = evaluate(closure, weights, place, self._controller)
            value_fn = again if value_fn is None else value_fn
        value = mean_loss(loss, self.agent.position)
        if self._controller.signal == "trust":
            require_value(value_fn)
        moving = [weight for weight in weights if weight.grad is not None]
        gradients = [weight.grad for weight in moving if weight.grad is not None]
        if not gradients:
            return loss
        squares = [wide(g).square().sum().to(value.device, value.dtype) for g in gradients]
        norm = torch.stack(squares).sum().sqrt()
        steered = _momentum(self.param_groups[0]) is not None
        agent, finite = step_agent(self.agent, value, norm, self._controller, steered)
        scale, mu = torch.exp(agent.position[0]), -torch.expm1(-agent.position[1])
        base = self.param_groups[0]["lr"]
        self.agent = agent._replace(learning_rate=base * scale)
        clip = torch.ones_like(norm)
        if self._max_grad_norm:
            clip = self._max_grad_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            clip = clip.clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(clip.to(gradient.device, gradient.dtype))
        known = torch.stack([finite.to(scale.dtype), scale, mu]).tolist()
        reads = bool(known[0]) and reads_trust(agent.trust, agent.count - 1, self._controller)
        before = [weight.clone() for weight in moving if reads]
        if known[0]:
            self._step_inner(known[1], known[2] if steered else None)
        if agent.trust is not None:
            trust = agent.trust
            if reads:
                moved = [w - old for w, old in zip(moving, before, strict=True)]
                products = [
                    (g.to(value.dtype) * u.to(value.dtype)).sum().to(value.device)
                    for g, u in zip(gradients, moved, strict=True)
                ]
                predicted = -torch.stack(products).sum() / clip
                actual = value - mean_loss(require_value(value_fn)(), value)
                trust = pooled(trust, actual, predicted, finite, self._controller)
            trust = in_phase(trust, base, self._controller)
            self.agent = self.agent._replace(trust=trust)
        return loss

    def _step_inner(self, scale: float, momentum: float | None) -> None:
        """The step of `inner` at the agent's rate and momentum; the groups get theirs back."""
        before = [dict(group) for group in self.param_groups]
        for group in self.param_groups:
            factor = scale
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif momentum is not None and group.get("momentum"):
                factor = scale * (1 - momentum) / (1 - group["momentum"])
                group["momentum"] = momentum
            group["lr"] = group["lr"] * factor
        try:
            self.inner.step()
        finally:
            for group, old in zip(self.param_groups, before, strict=True):
                group.update(old)

    def state_dict(self) -> dict[str, Any]:
        """The state of `inner`, and the agent beside it."""
        return {**self.inner.state_dict(), "q_learning": save_agent(self.agent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the optimizer that gave `state_dict` stood; settings stay one's own."""
        require_agent(state_dict, "QLearning")
        kept = {name: value for name, value in state_dict.items() if name != "q_learning"}
        self.inner.load_state_dict(kept)
        self._share_state()
        self.agent = load_agent(state_dict["q_learning"], self.agent.position.device)

    def __getstate__(self) -> dict[str, Any]:
        names = ("defaults", "inner", "agent", "_controller", "_max_grad_norm")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_state()


def q_learning(
    inner: torch.optim.Optimizer,
    controller: QLearningConfig = _DEFAULT_CONTROLLER,
    seed: int = 0,
    max_grad_norm: float = 0.0,
) -> QLearning:
    """`inner` under the agent that steers `EnhancedSGD`: its rate, and its `betas[0]` or `momentum`
    where it has one that is not 0. `step` needs the global mean loss.

    >>> import torch
    >>> from bytelm_torch import q_learning_metrics
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = q_learning(torch.optim.AdamW([weight], lr=0.1))
    >>> loss = weight.square().sum()
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss)
    >>> round(float(q_learning_metrics(optimizer)["learning_rate"]), 3)
    0.1
    """
    return QLearning(inner, controller, seed, max_grad_norm)


def _momentum(group: dict[str, Any]) -> float | None:
    """What the agent may steer beside the rate."""
    return group["betas"][0] if "betas" in group else group.get("momentum") or None
