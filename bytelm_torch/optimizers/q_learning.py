"""SGD whose learning rate and momentum a Q-learning agent adjusts while it trains.

Gradient centring: Yong et al. 2020. Annealed gradient noise: Neelakantan et al. 2015. Decoupled
weight decay: Loshchilov & Hutter 2019. The agent (`q_agent.py`), its table and its random key live
in the optimizer and in its state dict. `bytelm_jax/optimizers/q_learning.py` walks the same
trajectory.
"""

import dataclasses
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.config.base import require, require_amount, require_number
from bytelm.config.q_learning import QLearningConfig
from bytelm_torch.optimizers.groups import check_group
from bytelm_torch.optimizers.q_agent import (
    LEARNING_RATE_ACTIONS,
    MOMENTUM_ACTIONS,
    QLearningState,
    Scalar,
    init_agent,
    step_agent,
)
from bytelm_torch.optimizers.threefry import fold_in, normals

_DEFAULT_CONTROLLER = QLearningConfig()


class _Settings(NamedTuple):
    """Arguments of `EnhancedSGD` that hold for all groups of parameters."""

    momentum: float
    max_grad_norm: float
    entropy_threshold: float
    noise_scale: float
    centralize: bool
    controller: QLearningConfig
    seed: int


class _Leaf(NamedTuple):
    """A parameter with a gradient, and what its group and its layout say of it."""

    weight: nn.Parameter
    gradient: Tensor
    learning_rate: float
    weight_decay: float
    path: str
    mean_axes: tuple[int, ...]


# ---- the optimizer --------------------------------------------------------------------------


class EnhancedSGD(torch.optim.Optimizer):
    """SGD with momentum under a Q-learning agent; `step` needs the global mean loss.

    The gradient of each kernel is centred; all are clipped to global norm `max_grad_norm` (0: not)
    and scaled by max(h / `entropy_threshold`, 1/2) where h in [0, 1], the entropy of the squared
    gradient norms over the parameters, lies below the threshold (0: not); normal noise of deviation
    `noise_scale` · rms(g) / (1 + t)^0.55 is added (0: none); m ← μ m + (1 − μ) g; and the step is
    −lr · (m / (1 − `momentum`) + `weight_decay` · p), norms and biases undecayed. So the learning
    rate means what it means in plain SGD at the initial momentum, and a change of μ leaves the
    length of a step alone. A step whose loss or gradient norm is not finite changes no parameter.

    `params` may be parameters, named parameters or groups; `lr` and `weight_decay` may differ by
    group, and a scheduler of torch sets the base `lr` that the agent scales. A parameter's
    attribute `bytelm_path`, its dotted name in the JAX twin, tells its layout by its last part:
    `kernel` [..., out, in], `kernels` [E, in, out], `embedding`, `scale`, `bias`. Without it, a
    `weight` of two axes or more, or such a parameter without a name, is a kernel [out, ...].
    Parameters without a gradient are left out. `patch_size` is accepted and has no effect.
    Every replica must be given the same loss and gradient.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = EnhancedSGD(model.named_parameters(), lr=0.1, weight_decay=0.0)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     loss = model(torch.eye(3)).square().sum()
    ...     loss.backward()
    ...     _ = optimizer.step(loss=loss)
    >>> bool(loss < 1e-3), int(q_learning_metrics(optimizer)["skipped_steps"])
    (True, 0)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.005,
        max_grad_norm: float = 1.0,
        entropy_threshold: float = 0.0,
        noise_scale: float = 0.0,
        centralize: bool = True,
        controller: QLearningConfig = _DEFAULT_CONTROLLER,
        seed: int = 0,
        patch_size: int | None = None,
    ):
        self._settings = _Settings(
            momentum=momentum,
            max_grad_norm=max_grad_norm,
            entropy_threshold=entropy_threshold,
            noise_scale=noise_scale,
            centralize=centralize,
            controller=controller,
            seed=seed,
        )
        self._agent: QLearningState | None = None
        _check(self._settings)
        if patch_size is not None:
            _warn_of_patch_size()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            check_group(group)

    @property
    def agent(self) -> QLearningState:
        """The agent as the last step left it; before the first step, a fresh one."""
        if self._agent is None:
            weights = [weight for group in self.param_groups for weight in group["params"]]
            dtype = torch.float32
            for weight in weights:
                dtype = torch.promote_types(dtype, weight.dtype)
            settings = self._settings
            self._agent = init_agent(
                settings.controller, settings.momentum, settings.seed, dtype, weights[0].device
            )
        return self._agent

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """One step; the loss is what `closure` returns, or `loss`. Returns it."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        value = _scalar(_needed(loss), self.agent.position)
        leaves = self._leaves()
        if leaves:
            self._move(leaves, value)
        return loss

    def _leaves(self) -> list[_Leaf]:
        leaves, index = [], 0
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            for weight, name in zip(group["params"], names, strict=True):
                path, mean_axes, decays = _layout(weight, str(index) if name is None else name)
                index += 1
                if weight.grad is not None:
                    decay = group["weight_decay"] if decays else 0.0
                    leaves.append(_Leaf(weight, weight.grad, group["lr"], decay, path, mean_axes))
        return leaves

    def _move(self, leaves: list[_Leaf], loss: Scalar) -> None:
        settings, old = self._settings, self.agent
        gradients = [_wide(leaf.gradient) for leaf in leaves]
        if settings.centralize:
            gradients = [_centred(g, leaf) for g, leaf in zip(gradients, leaves, strict=True)]
        squares = torch.stack([g.square().sum().to(loss.device, loss.dtype) for g in gradients])
        norm = squares.sum().sqrt()
        agent, finite = step_agent(old, loss, norm, settings.controller, steers_momentum=True)
        rate = torch.exp(agent.position[0])
        self._agent = agent._replace(learning_rate=leaves[0].learning_rate * rate)

        scale = _clip_scale(norm, settings) * _entropy_scale(squares, settings)
        gradients = [g * scale.to(g.device, g.dtype) for g in gradients]
        if settings.noise_scale:
            gradients = _noisy(gradients, leaves, norm * scale, old, settings)
        for gradient, leaf in zip(gradients, leaves, strict=True):
            memory = self.state[leaf.weight]
            if not memory:
                memory["momentum_buffer"] = torch.zeros_like(gradient)
            average = memory["momentum_buffer"]
            _average(gradient, average, agent, finite)
            _descend(average, leaf, rate, finite, settings)

    def state_dict(self) -> dict[str, Any]:
        """Everything: momenta and groups as torch holds them, agent and settings beside them."""
        settings = self._settings._asdict()
        settings["controller"] = dataclasses.asdict(self._settings.controller)
        told = {"settings": settings, "agent": _saved(self.agent)}
        return {**super().state_dict(), "q_learning": told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the optimizer that gave `state_dict` stood, settings included."""
        _require_agent(state_dict, "EnhancedSGD")
        saved = state_dict["q_learning"]
        kept = {name: value for name, value in state_dict.items() if name != "q_learning"}
        super().load_state_dict(kept)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, memory in kept["state"].items():  # torch would cast it to the weight's dtype
            average = memory["momentum_buffer"].to(weights[index].device, copy=True)
            self.state[weights[index]]["momentum_buffer"] = average
        controller = QLearningConfig(**saved["settings"]["controller"])
        self._settings = _Settings(**{**saved["settings"], "controller": controller})
        self._agent = _loaded(saved["agent"], self.agent.position.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings, "_agent": self._agent}


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
        self._initial_momentum = float(_momentum(group) or 0.0)
        require(
            _momentum(group) is None or low <= self._initial_momentum <= high,
            f"momentum={self._initial_momentum}: must be in [{low}, {high}]",
        )
        super().__init__(inner.param_groups, {})
        self.param_groups, self.state = inner.param_groups, inner.state
        weights = [weight for group in self.param_groups for weight in group["params"]]
        dtype = functools.reduce(torch.promote_types, (w.dtype for w in weights), torch.float32)
        place = weights[0].device
        self.agent = init_agent(controller, self._initial_momentum, seed, dtype, place)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """One step; the loss is what `closure` returns, or `loss`. Returns it."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        value = _scalar(_needed(loss), self.agent.position)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if not gradients:
            return loss
        squares = [_wide(g).square().sum().to(value.device, value.dtype) for g in gradients]
        norm = torch.stack(squares).sum().sqrt()
        steered = _momentum(self.param_groups[0]) is not None
        agent, finite = step_agent(self.agent, value, norm, self._controller, steered)
        scale, mu = torch.exp(agent.position[0]), -torch.expm1(-agent.position[1])
        base = self.param_groups[0]["lr"]
        self.agent = agent._replace(learning_rate=base * scale)
        if self._max_grad_norm:
            clip = self._max_grad_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            for gradient in gradients:
                gradient.mul_(clip.clamp(max=1.0).to(gradient.device, gradient.dtype))
        known = torch.stack([finite.to(scale.dtype), scale, mu]).tolist()
        if known[0]:
            self._step_inner(known[1], known[2] if steered else None)
        return loss

    def _step_inner(self, scale: float, momentum: float | None) -> None:
        """The step of `inner` at the agent's rate and momentum; the groups get theirs back."""
        before = [dict(group) for group in self.param_groups]
        for group in self.param_groups:
            factor = scale
            if momentum is not None and "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            elif momentum is not None:
                group["momentum"] = momentum
                factor = scale * (1 - momentum) / (1 - self._initial_momentum)
            group["lr"] = group["lr"] * factor
        try:
            self.inner.step()
        finally:
            for group, old in zip(self.param_groups, before, strict=True):
                group.update(old)

    def state_dict(self) -> dict[str, Any]:
        """The state of `inner`, and the agent beside it."""
        return {**self.inner.state_dict(), "q_learning": _saved(self.agent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the optimizer that gave `state_dict` stood; settings stay one's own."""
        _require_agent(state_dict, "QLearning")
        kept = {name: value for name, value in state_dict.items() if name != "q_learning"}
        self.inner.load_state_dict(kept)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.agent = _loaded(state_dict["q_learning"], self.agent.position.device)


def q_learning(
    inner: torch.optim.Optimizer,
    controller: QLearningConfig = _DEFAULT_CONTROLLER,
    seed: int = 0,
    max_grad_norm: float = 0.0,
) -> QLearning:
    """`inner` under the agent that steers `EnhancedSGD`: its rate, and its `betas[0]` or `momentum`
    where it has one that is not 0. `step` needs the global mean loss.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = q_learning(torch.optim.AdamW([weight], lr=0.1))
    >>> loss = weight.square().sum()
    >>> loss.backward()
    >>> _ = optimizer.step(loss=loss)
    >>> round(float(q_learning_metrics(optimizer)["learning_rate"]), 3)
    0.1
    """
    return QLearning(inner, controller, seed, max_grad_norm)


def q_learning_metrics(optimizer: EnhancedSGD | QLearning) -> dict[str, Tensor]:
    """What the agent of an optimizer did last, as scalar tensors on its device.

    `learning_rate` (of the first group) and `momentum` as the last step used them,
    `learning_rate_scale` over the base, `epsilon`, `reward` (−1 at a skipped step and at a surge),
    the factors that the last decision chose (`learning_rate_action`, and `momentum_action` of
    1 / (1 − momentum)), `smoothed_loss`, `trend` (the fall of the loss over its deviation),
    `stability` (deviation over mean of the gradient norm), and the counts `decisions`,
    `skipped_steps` and `surges`.
    """
    agent = optimizer.agent
    factors = [
        torch.exp(agent.position.new_tensor(actions)[agent.actions[i]])
        for i, actions in enumerate((LEARNING_RATE_ACTIONS, MOMENTUM_ACTIONS))
    ]
    return {
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


# ---- one step of SGD ------------------------------------------------------------------------


def _layout(weight: nn.Parameter, name: str) -> tuple[str, tuple[int, ...], bool]:
    """A parameter's name in the JAX twin, the axes that centring averages over, and whether it
    decays."""
    axes, path = weight.ndim, getattr(weight, "bytelm_path", None)
    stem, dot, leaf = (path or name).rpartition(".")
    if path is None and leaf == "weight":
        leaf = "kernel" if axes > 1 else "scale"
        return stem + dot + leaf, tuple(range(1, axes)), axes > 1
    name = stem + dot + leaf
    if leaf.isdecimal() and axes > 1:
        return name, tuple(range(1, axes)), True
    if leaf in ("kernel", "kernels") and axes > 1:
        return name, (axes - 1 if leaf == "kernel" else axes - 2,), True
    return name, (), leaf == "embedding" or (axes > 1 and leaf not in ("scale", "bias"))


def _check(settings: _Settings) -> None:
    """Raises `ValueError` for the first number that cannot work."""
    require_number("seed", settings.seed)
    for name in ("max_grad_norm", "entropy_threshold", "noise_scale"):
        require_amount(name, getattr(settings, name))
    low, high = settings.controller.min_momentum, settings.controller.max_momentum
    momentum = settings.momentum
    require(low <= momentum <= high, f"momentum={momentum}: must be in [{low}, {high}]")


@functools.cache
def _warn_of_patch_size() -> None:
    """Warns once a process."""
    warnings.warn("patch_size has no effect on an optimizer; leave it out", stacklevel=3)


def _centred(gradient: Float[Tensor, "..."], leaf: _Leaf) -> Float[Tensor, "..."]:
    if not leaf.mean_axes:
        return gradient
    return gradient - gradient.mean(leaf.mean_axes, keepdim=True)


def _clip_scale(norm: Scalar, settings: _Settings) -> Scalar:
    if settings.max_grad_norm == 0:
        return torch.ones_like(norm)
    return (settings.max_grad_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)


def _entropy_scale(squares: Float[Tensor, " leaves"], settings: _Settings) -> Scalar:
    """Gradients concentrated in few leaves take smaller steps, down to half."""
    if settings.entropy_threshold == 0 or len(squares) < 2:
        return torch.ones_like(squares[0])
    shares = squares / squares.sum().clamp(min=torch.finfo(squares.dtype).tiny)
    logs = torch.log(torch.where(shares > 0, shares, 1.0))
    entropy = -(shares * logs).sum() / math.log(len(squares))
    return (entropy / settings.entropy_threshold).clamp(0.5, 1.0)


def _noisy(
    gradients: list[Tensor],
    leaves: list[_Leaf],
    norm: Scalar,
    agent: QLearningState,
    settings: _Settings,
) -> list[Tensor]:
    """Adds to each gradient noise that depends on its path and on the step."""
    size = sum(g.numel() for g in gradients)
    annealed = (1.0 + agent.count) ** 0.55
    deviation = settings.noise_scale * (norm / math.sqrt(size)) / annealed
    key = fold_in(agent.key, agent.count)
    noisy = []
    for gradient, leaf in zip(gradients, leaves, strict=True):
        leaf_key = fold_in(key, zlib.crc32(leaf.path.encode()))
        noise = normals(leaf_key, gradient.shape, gradient.dtype, gradient.device)
        noisy.append(gradient + deviation.to(gradient.device, gradient.dtype) * noise)
    return noisy


def _average(gradient: Tensor, average: Tensor, agent: QLearningState, finite: Tensor) -> None:
    memory = torch.exp(-agent.position[1]).to(average.device, average.dtype)  # 1 − μ
    new = (1 - memory) * average + memory * gradient
    average.copy_(torch.where(finite.to(average.device), new, average))


def _descend(
    average: Tensor, leaf: _Leaf, rate: Scalar, finite: Tensor, settings: _Settings
) -> None:
    step = average / (1 - settings.momentum)
    if leaf.weight_decay:
        step = step + leaf.weight_decay * leaf.weight.to(average.dtype)
    rate = (leaf.learning_rate * rate).to(average.device, average.dtype)
    step = torch.where(finite.to(average.device), -rate * step, 0.0)
    leaf.weight.add_(step.to(leaf.weight.dtype))


# ---- small pieces ---------------------------------------------------------------------------


def _momentum(group: dict[str, Any]) -> float | None:
    """What the agent may steer beside the rate."""
    return group["betas"][0] if "betas" in group else group.get("momentum") or None


def _saved(agent: QLearningState) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in agent._asdict().items()
    }


def _loaded(saved: dict[str, Any], device: torch.device) -> QLearningState:
    agent = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in saved.items()
    }
    return QLearningState(**{**agent, "key": tuple(agent["key"])})


def _require_agent(state_dict: dict[str, Any], kind: str) -> None:
    require(
        "q_learning" in state_dict,
        f"state_dict: has no q_learning; pass what {kind}.state_dict() returned",
    )


def _needed(loss: Tensor | float | None) -> Tensor | float:
    if loss is None:
        raise ValueError("loss=None: the agent needs the mean loss; step(loss=...) or a closure")
    return loss


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _scalar(loss: Tensor | float, like: Tensor) -> Scalar:
    if not isinstance(loss, Tensor):
        return torch.full((), loss, dtype=like.dtype, device=like.device)
    require(loss.ndim == 0, f"loss: has shape {tuple(loss.shape)}; pass the mean loss")
    return loss.detach().to(like.device, like.dtype)
