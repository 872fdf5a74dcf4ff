"""Learning-rate schedule, clipping, decay mask, and the optimizer that a config names.

The same formulas as in `bytelm_jax/optimizers/build.py`, which says why they are our own.
"""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.config import MODEL_CONFIGS, OptimizerConfig
from bytelm.config.base import require
from bytelm_torch.models import is_norm
from bytelm_torch.optimizers.q_learning import EnhancedSGD, q_learning


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Step number, from 0, → learning rate: linear warm-up, then cosine over the rest of `steps`.

    The first step has learning_rate / warmup_steps and the last step of warm-up the full rate;
    from step `steps` on the rate stays at learning_rate · final_fraction.
    """
    warmup, floor = config.warmup_steps, config.final_fraction
    decay_steps = max(steps - warmup, 1)

    def schedule(count: int) -> float:
        if count < warmup:
            return config.learning_rate * ((count + 1) / warmup)
        done = min((count - warmup) / decay_steps, 1.0)
        return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    return schedule


def global_norm(tensors: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Euclidean norm over all tensors, in at least float32."""
    wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return torch.sqrt(torch.stack([x.square().sum() for x in wide]).sum())


def clip_by_global_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> None:
    """grad · min(1, max_norm / ‖grad‖) in place; `max_norm=0` leaves it alone."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if max_norm == 0 or not gradients:
        return
    norm = global_norm(gradients)
    scale = (max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.dtype))


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter called `name`: not to norms and biases.

    Nor to the gains of splines, which start at 1, and the γ and β of guided attention.
    """
    return not is_norm(name) and not name.endswith(("bias", "gain", "gamma", "beta"))


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer that `config` names; the caller sets each group's `lr` from the schedule.

    Those of Q-learning clip by themselves and want `step(loss=...)`; `seed` is that of the agent's
    choices. For the others the caller clips. `q_learning_sgd` raises `ValueError` for parameters
    without the names that `build_model` and `from_pretrained` give them. What the model's
    configuration freezes is left out.
    """
    config_of = getattr(model, "config", None)
    frozen = config_of.frozen_prefixes if isinstance(config_of, MODEL_CONFIGS) else ()
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith(frozen)]
    groups = [
        {"params": [p for n, p in named if decays(n)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
    ]
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.epsilon)
        case "q_learning_adamw":
            inner = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.epsilon)
            return q_learning(inner, config.controller, seed, config.max_grad_norm)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=config.momentum)
        case "q_learning_sgd":
            unnamed = [n for n, p in named if not hasattr(p, "bytelm_path")]
            require(
                not unnamed, f"model: {unnamed[:1]} has no bytelm_path; call name_parameters(model)"
            )
            return EnhancedSGD(
                [p for _, p in named],
                rate,
                config.momentum,
                config.weight_decay,
                config.max_grad_norm,
                config.entropy_threshold,
                config.noise_scale,
                config.centralize,
                config.controller,
                seed,
            )
