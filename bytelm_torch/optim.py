"""Learning-rate schedule, clipping, decay mask, and the optimizer that a config names.

The same formulas as in `bytelm_jax/optim.py`, which says why they are our own.
"""

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm_torch.config import MODEL_CONFIGS, OptimizerConfig
from bytelm_torch.models import is_norm


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
    """Whether weight decay applies to the parameter called `name`: not to norms and biases."""
    return not is_norm(name) and not name.endswith("bias")


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config` names; the caller sets each group's `lr` from the schedule.

    What the model's configuration freezes is in no group.
    """
    config_of = getattr(model, "config", None)
    frozen = config_of.frozen_prefixes if isinstance(config_of, MODEL_CONFIGS) else ()
    named = [(n, p) for n, p in model.named_parameters() if not n.startswith(frozen)]
    groups = [
        {"params": [p for n, p in named if decays(n)], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if not decays(n)], "weight_decay": 0.0},
    ]
    match config.name:
        case "adamw":
            betas = (config.beta1, config.beta2)
            return torch.optim.AdamW(
                groups, lr=config.learning_rate, betas=betas, eps=config.epsilon
            )
        case "sgd":
            return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
