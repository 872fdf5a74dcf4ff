"""Clipping, groups of parameters, and a builder for each optimizer.

The same formulas as in `bytelm_jax/optimizers/build.py`, which says why they are our own.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.config import (
    AdamWConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    QLearningAdamWConfig,
    QLearningSGDConfig,
    SGDConfig,
)
from bytelm.config.base import require
from bytelm.leaves import decays, is_hidden_matrix
from bytelm.trainable import EVERYTHING, Trainable
from bytelm_torch.models import parameter_paths
from bytelm_torch.optimizers.lion import Lion
from bytelm_torch.optimizers.muon import Muon
from bytelm_torch.optimizers.q_learning import EnhancedSGD
from bytelm_torch.optimizers.q_wrapper import q_learning


def global_norm(tensors: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Euclidean norm over all tensors, in at least float32."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return nn.utils.get_total_norm(wide)  # a few kernels for all of them


def clip_by_global_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor | None = None
) -> None:
    """grad · min(1, max_norm / ‖grad‖) in place; `max_norm=0` leaves it unchanged.

    `norm` is that of all gradients, where it is known.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if max_norm == 0 or not gradients:
        return
    norm = global_norm(gradients) if norm is None else norm
    scale = (max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every group that learning rate, times the scale that `build_optimizer` gave it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_scale", 1.0)


Groups = list[dict[str, Any]]
"""Groups of parameters, as torch's optimizers take them."""


class Leaves(NamedTuple):
    """The parameters that an optimizer moves."""

    parameters: dict[str, nn.Parameter]
    """By their names in JAX."""
    scales: Mapping[str, float]
    """Name → what multiplies the parameter's learning rate, where that is not 1."""

    def groups(self, config: OptimizerConfig) -> Groups:
        """Two groups for each rate: parameters that decay, and norms and biases."""
        return [
            {"params": [p for name, p in parameters.items() if decays(name) == decaying]}
            | {"weight_decay": config.weight_decay if decaying else 0.0}
            | rate
            for rate, parameters in self.by_rate(config)
            for decaying in (True, False)
        ]

    def by_rate(
        self, config: OptimizerConfig
    ) -> list[tuple[dict[str, float], dict[str, nn.Parameter]]]:
        """What a group says about its rate, and the parameters that have it.

        Those of the usual rate come first, even if there are none: the rate of the first group is
        the one that an agent reports.
        """
        rates = {name: self.scales.get(name, 1.0) for name in self.parameters}
        found: list[tuple[dict[str, float], dict[str, nn.Parameter]]] = []
        for rate in (1.0, *sorted({*rates.values()} - {1.0})):
            parameters = {name: p for name, p in self.parameters.items() if rates[name] == rate}
            about = {"rate_scale": rate, "lr": config.learning_rate * rate}
            found.append(({} if rate == 1.0 else about, parameters))
        return found

    def only(self, names: Collection[str]) -> "Leaves":
        """Those called as `names` says."""
        return self._replace(parameters={k: p for k, p in self.parameters.items() if k in names})


Build = Callable[[Any, Leaves, int], torch.optim.Optimizer]
"""`(config, leaves, seed) -> optimizer`."""


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, seed: int = 0, parts: Trainable = EVERYTHING
) -> torch.optim.Optimizer:
    """The optimizer that `config` names; the caller sets the rate of the schedule by `set_rate`.

    Optimizers with an agent clip by themselves and need `step(loss=...)`; `seed` is that of the
    agent's choices. For the others the caller clips. `q_learning_sgd` raises `ValueError` for
    parameters without the names that `build_model` and `from_pretrained` give them. `parts` says
    which parameters no longer require a gradient and which move at another rate; those that
    require none, such as a BLT's entropy model, are excluded.
    """
    paths = parameter_paths(model)
    for name, parameter in model.named_parameters():
        if paths[name] in parts.frozen:
            parameter.requires_grad_(False)
    named = {paths[name]: p for name, p in model.named_parameters() if p.requires_grad}
    return BUILDERS[config.name](config, Leaves(named, parts.scales), seed)


def _adamw(config: AdamWConfig, leaves: Leaves, seed: int) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019."""
    del seed
    return _fused_adamw(config, leaves)


def _fused_adamw(config: AdamWConfig | QLearningAdamWConfig, leaves: Leaves) -> torch.optim.AdamW:
    """torch's AdamW, in one kernel where torch has it for the parameters' device."""

    def build(fused: bool) -> torch.optim.AdamW:
        betas = config.beta1, config.beta2
        groups = leaves.groups(config)  # which torch fills with what it is told here
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=fused
        )

    try:
        return build(True)
    except RuntimeError:  # says that fused=True does not support the device
        return build(False)


def _sgd(config: SGDConfig, leaves: Leaves, seed: int) -> torch.optim.Optimizer:
    """Heavy-ball momentum with the decay added to the gradient."""
    del seed
    groups = leaves.groups(config)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


def _q_learning_sgd(config: QLearningSGDConfig, leaves: Leaves, seed: int) -> torch.optim.Optimizer:
    unnamed = [name for name, p in leaves.parameters.items() if not hasattr(p, "bytelm_path")]
    require(not unnamed, f"model: {unnamed[:1]} has no bytelm_path; call name_parameters(model)")
    return EnhancedSGD(
        [{"params": list(some.values())} | rate for rate, some in leaves.by_rate(config)],
        config.learning_rate,
        config.momentum,
        config.weight_decay,
        config.max_grad_norm,
        config.entropy_threshold,
        config.noise_scale,
        config.centralize,
        config.controller,
        seed,
    )


def _q_learning_adamw(
    config: QLearningAdamWConfig, leaves: Leaves, seed: int
) -> torch.optim.Optimizer:
    inner = _fused_adamw(config, leaves)
    return q_learning(inner, config.controller, seed, config.max_grad_norm)


def _lion(config: LionConfig, leaves: Leaves, seed: int) -> torch.optim.Optimizer:
    """Chen et al. 2023."""
    del seed
    return Lion(leaves.groups(config), config.learning_rate, (config.beta1, config.beta2))


def _muon(config: MuonConfig, leaves: Leaves, seed: int) -> torch.optim.Optimizer:
    """Muon for the matrices of hidden layers, AdamW at its own rate for all other leaves."""
    del seed
    hidden = {name for name in leaves.parameters if is_hidden_matrix(name)}
    rest = leaves.only(leaves.parameters.keys() - hidden)
    ratio = config.adam_rate / config.learning_rate
    groups = [
        *(
            {"params": list(some.values())} | rate
            for rate, some in leaves.only(hidden).by_rate(config)
        ),
        *(group | {"use_muon": False, "lr_scale": ratio} for group in rest.groups(config)),
    ]
    return Muon(
        groups,
        config.learning_rate,
        config.beta,
        config.weight_decay,
        config.ns_steps,
        config.consistent_rms,
        (config.adam_beta1, config.adam_beta2),
        config.epsilon,
    )


BUILDERS: dict[str, Build] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "q_learning_sgd": _q_learning_sgd,
    "q_learning_adamw": _q_learning_adamw,
    "lion": _lion,
    "muon": _muon,
}
"""Name → builder of every optimizer in `OPTIMIZER_CONFIGS`."""
