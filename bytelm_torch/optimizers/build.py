"""Clipping, groups of parameters, and a builder for each optimizer.

The same formulas as in `bytelm_jax/optimizers/build.py`, which says why they are our own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.config import (
    MODEL_CONFIGS,
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
from bytelm_torch.models import parameter_paths
from bytelm_torch.optimizers.lion import Lion
from bytelm_torch.optimizers.muon import Muon
from bytelm_torch.optimizers.q_learning import EnhancedSGD
from bytelm_torch.optimizers.q_wrapper import q_learning


def global_norm(tensors: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Euclidean norm over all tensors, in at least float32."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return torch.sqrt(torch.stack([x.square().sum() for x in wide]).sum())


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """grad · min(1, max_norm / ‖grad‖) in place; `max_norm=0` leaves it unchanged."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if max_norm == 0 or not gradients:
        return
    norm = global_norm(gradients)
    scale = (max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))


Groups = list[dict[str, Any]]
"""Groups of parameters, as torch's optimizers take them."""
Build = Callable[[Any, nn.Module, int], torch.optim.Optimizer]
"""`(config, model, seed) -> optimizer`."""


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer that `config` names; the caller sets each group's `lr` from the schedule.

    Optimizers with an agent clip by themselves and need `step(loss=...)`; `seed` is that of the
    agent's choices. For the others the caller clips. `q_learning_sgd` raises `ValueError` for
    parameters without the names that `build_model` and `from_pretrained` give them. Parameters that
    the model's configuration freezes are excluded.
    """
    return BUILDERS[config.name](config, model, seed)


def _adamw(config: AdamWConfig, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019."""
    del seed
    betas = config.beta1, config.beta2
    groups = _groups(_trained(model), config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon)


def _sgd(config: SGDConfig, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Heavy-ball momentum with the decay added to the gradient."""
    del seed
    groups = _groups(_trained(model), config.weight_decay)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


def _q_learning_sgd(
    config: QLearningSGDConfig, model: nn.Module, seed: int
) -> torch.optim.Optimizer:
    parameters = _trained(model)
    unnamed = [name for name, p in parameters.items() if not hasattr(p, "bytelm_path")]
    require(not unnamed, f"model: {unnamed[:1]} has no bytelm_path; call name_parameters(model)")
    return EnhancedSGD(
        list(parameters.values()),
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
    config: QLearningAdamWConfig, model: nn.Module, seed: int
) -> torch.optim.Optimizer:
    betas = config.beta1, config.beta2
    groups = _groups(_trained(model), config.weight_decay)
    inner = torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon)
    return q_learning(inner, config.controller, seed, config.max_grad_norm)


def _lion(config: LionConfig, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Chen et al. 2023."""
    del seed
    groups = _groups(_trained(model), config.weight_decay)
    return Lion(groups, config.learning_rate, (config.beta1, config.beta2))


def _muon(config: MuonConfig, model: nn.Module, seed: int) -> torch.optim.Optimizer:
    """Muon for the matrices of hidden layers, AdamW at its own rate for all other leaves."""
    del seed
    parameters = _trained(model)
    rest = {name: p for name, p in parameters.items() if not is_hidden_matrix(name)}
    ratio = config.adam_rate / config.learning_rate
    groups = [
        {"params": [p for name, p in parameters.items() if name not in rest]},
        *(
            group | {"use_muon": False, "lr_scale": ratio}
            for group in _groups(rest, config.weight_decay)
        ),
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


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the model's configuration does not freeze, by their names in JAX."""
    config = getattr(model, "config", None)
    frozen = config.frozen_prefixes if isinstance(config, MODEL_CONFIGS) else ()
    paths = parameter_paths(model)
    named = {paths[name]: parameter for name, parameter in model.named_parameters()}
    return {path: p for path, p in named.items() if not path.startswith(frozen)}


def _groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> Groups:
    """Two groups: parameters that decay, and norms and biases."""
    return [
        {"params": [p for name, p in parameters.items() if decays(name)]}
        | {"weight_decay": weight_decay},
        {"params": [p for name, p in parameters.items() if not decays(name)]}
        | {"weight_decay": 0.0},
    ]
