"""SGD whose learning rate and momentum a Q-learning agent adjusts while it trains.

Gradient centring: Yong et al. 2020. Annealed gradient noise: Neelakantan et al. 2015. Decoupled
weight decay: Loshchilov & Hutter 2019. The agent (`q_agent.py`), its table and its random key live
in the optimizer and in its state dict. `bytelm_jax/optimizers/q_learning.py` walks the same
trajectory. `q_wrapper.py` puts other optimizers under the agent.
"""

import dataclasses
import functools
import math
import warnings
import zlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.config.base import require, require_amount, require_number
from bytelm.config.q_learning import QLearningConfig
from bytelm_torch.optimizers.groups import all_or_none, check_group
from bytelm_torch.optimizers.q_agent import (
    Loss,
    QLearningState,
    Scalar,
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
    smoothing_factor: float | None = None

    @property
    def half_life(self) -> float:
        """Steps in which an old loss loses half its weight in the smoothed loss."""
        if self.smoothing_factor is None:
            return float(self.controller.window)
        return math.log(0.5) / math.log1p(-self.smoothing_factor)


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
    `smoothing_factor` is the weight of a new loss in the moving average that the agent watches, by
    default that of a half-life of `controller.window` steps.
    Every replica must be given the same loss and gradient.

    >>> import torch
    >>> from bytelm_torch import q_learning_metrics
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

    loss_is_optional: ClassVar[bool] = False
    """Whether a step without a loss is taken at the agent's last rate and momentum."""

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
        smoothing_factor: float | None = None,
    ):
        self._settings = _Settings(
            momentum=momentum,
            max_grad_norm=max_grad_norm,
            entropy_threshold=entropy_threshold,
            noise_scale=noise_scale,
            centralize=centralize,
            controller=controller,
            seed=seed,
            smoothing_factor=smoothing_factor,
        )
        self._agent: QLearningState | None = None
        self._unobserved = 0  # steps without a loss, each of which draws noise of its own
        _check(self._settings)
        if patch_size is not None:
            _warn_of_patch_size()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; momenta of new parameters start from 0."""
        with all_or_none(self.param_groups):
            super().add_param_group(param_group)
            check_group(self.param_groups[-1])

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
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: Loss | None = None,
        value_fn: Callable[[], Any] | None = None,
    ) -> Any:
        """One step; the loss is what `closure` returns, or `loss`. Returns it.

        A controller with `signal="trust"` asks for the loss once more after the last step before
        each decision: from `closure`, with the same random numbers, or from `value_fn`.
        """
        if closure is not None:
            weights = [weight for group in self.param_groups for weight in group["params"]]
            place, controller = self.agent.position.device, self._settings.controller
            loss, again = evaluate(closure, weights, place, controller)
            value_fn = again if value_fn is None else value_fn
        if self._settings.controller.signal == "trust" and loss is not None:
            require_value(value_fn)
        plain = loss is None and self.loss_is_optional
        value = None if plain else mean_loss(loss, self.agent.position)
        leaves = self._leaves()
        if leaves:
            self._move(leaves, value, value_fn)
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

    def _move(
        self, leaves: list[_Leaf], loss: Scalar | None, value_fn: Callable[[], Any] | None
    ) -> None:
        settings, old = self._settings, self.agent
        reads = loss is not None and reads_trust(old.trust, old.count, settings.controller)
        gradients = [wide(leaf.gradient) for leaf in leaves]
        if settings.centralize:
            gradients = [_centred(g, leaf) for g, leaf in zip(gradients, leaves, strict=True)]
        place, dtype = old.position.device, old.position.dtype
        squares = torch.stack([g.square().sum().to(place, dtype) for g in gradients])
        norm, step = squares.sum().sqrt(), old.count + self._unobserved
        if loss is None:
            agent, finite = old, torch.isfinite(norm)
            self._unobserved += 1
        else:
            agent, finite = step_agent(
                old, loss, norm, settings.controller, True, settings.half_life
            )
        rate = torch.exp(agent.position[0])
        self._agent = agent._replace(learning_rate=self.param_groups[0]["lr"] * rate)

        scale = _clip_scale(norm, settings) * _entropy_scale(squares, settings)
        gradients = [g * scale.to(g.device, g.dtype) for g in gradients]
        if settings.noise_scale:
            gradients = _noisy(gradients, leaves, norm * scale, old.key, step, settings)
        predicted = norm.new_zeros(())
        for gradient, leaf in zip(gradients, leaves, strict=True):
            memory = self.state[leaf.weight]
            if not memory:
                memory["momentum_buffer"] = torch.zeros_like(gradient)
            average = memory["momentum_buffer"]
            _average(gradient, average, agent, finite)
            applied = _descend(average, leaf, rate, finite, settings)
            if reads:
                predicted -= (leaf.gradient.to(dtype) * applied.to(dtype)).sum().to(place)
        if loss is not None and self._agent.trust is not None:
            trust = self._agent.trust
            if reads:
                actual = loss - mean_loss(require_value(value_fn)(), loss)
                trust = pooled(trust, actual, predicted, finite, settings.controller)
            trust = in_phase(trust, self.param_groups[0]["lr"], settings.controller)
            self._agent = self._agent._replace(trust=trust)

    def state_dict(self) -> dict[str, Any]:
        """Everything: momenta and groups as torch holds them, agent and settings beside them."""
        settings = self._settings._asdict()
        settings["controller"] = dataclasses.asdict(self._settings.controller)
        saved = {"settings": settings, "agent": save_agent(self.agent)}
        saved |= {"unobserved": self._unobserved}
        return {**super().state_dict(), "q_learning": saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the optimizer that gave `state_dict` stood, settings included."""
        require_agent(state_dict, "EnhancedSGD")
        saved = state_dict["q_learning"]
        kept = {name: value for name, value in state_dict.items() if name != "q_learning"}
        super().load_state_dict(kept)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, memory in kept["state"].items():  # torch would cast it to the weight's dtype
            average = memory["momentum_buffer"].to(weights[index].device, copy=True)
            self.state[weights[index]]["momentum_buffer"] = average
        controller = QLearningConfig(**saved["settings"]["controller"])
        self._settings = _Settings(**{**saved["settings"], "controller": controller})
        self._agent = load_agent(saved["agent"], self.agent.position.device)
        self._unobserved = saved.get("unobserved", 0)  # not yet in older files

    def __getstate__(self) -> dict[str, Any]:
        names = ("_settings", "_agent", "_unobserved")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}


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
    smoothing = settings.smoothing_factor
    why = f"smoothing_factor={smoothing}: must be above 0 and below 1"
    require(smoothing is None or 0 < smoothing < 1, why)


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
    agent_key: tuple[int, int],
    step: int,
    settings: _Settings,
) -> list[Tensor]:
    """Adds to each gradient noise that depends on its path and on the step."""
    size = sum(g.numel() for g in gradients)
    annealed = (1.0 + step) ** 0.55
    deviation = settings.noise_scale * (norm / math.sqrt(size)) / annealed
    key = fold_in(agent_key, step)
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
) -> Tensor:
    """Moves a parameter; what it moved by."""
    step = average / (1 - settings.momentum)
    if leaf.weight_decay:
        step = step + leaf.weight_decay * leaf.weight.to(average.dtype)
    rate = (leaf.learning_rate * rate).to(average.device, average.dtype)
    step = torch.where(finite.to(average.device), -rate * step, 0.0).to(leaf.weight.dtype)
    leaf.weight.add_(step)
    return step
