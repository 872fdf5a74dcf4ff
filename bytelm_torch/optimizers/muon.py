"""Muon for matrices and AdamW for everything else, with optax's formulas.

Jordan et al. 2024; the scale of an update is that of Liu et al. 2025. `torch.optim.Muon` is a
different optimizer: it iterates in bfloat16 and omits the bias correction of Nesterov's momentum.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bytelm.config.base import require
from bytelm_torch.optimizers.groups import all_or_none

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of X, (X Xᵀ) X and (X Xᵀ)² X."""


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `use_muon=True`, the default, and AdamW for the others.

    Muon's step is −lr · (s · orthogonalize(m̂) + `weight_decay` · p) where m̂ is the bias-corrected
    Nesterov average of gradients and s = `consistent_rms` · √max(in, out), so that an update has
    about the root mean square of AdamW's, and AdamW's learning rate and weight decay fit. A weight
    with more than two axes is a stack of matrices, its last two axes being those of each.

    Both kinds of groups multiply `lr` by their `lr_scale`: a scheduler that sets every group's `lr`
    keeps a separate rate for AdamW in proportion. `adam_betas` are AdamW's; `epsilon` is added to
    the norm of a matrix in Muon and to the root of the second moment in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        beta: float = 0.95,
        weight_decay: float = 0.1,
        ns_steps: int = 5,
        consistent_rms: float = 0.2,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "epsilon": epsilon,
            "beta": beta,
            "ns_steps": ns_steps,
            "consistent_rms": consistent_rms,
            "adam_betas": adam_betas,
            "use_muon": True,
            "lr_scale": 1.0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's numbers are checked, and that Muon's weights are matrices."""
        with all_or_none(self.param_groups):
            super().add_param_group(param_group)
            _check(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            direction = _muon_direction if group["use_muon"] else _adam_direction
            rate, decay = group["lr"] * group["lr_scale"], group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is not None:
                    step = direction(weight.grad, self.state[weight], group)
                    weight.sub_(rate * (step + decay * weight))
        return loss


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "epsilon", "consistent_rms"):
        require(group[name] >= 0, f"{name}={group[name]}: must be at least 0")
    for name, value in {"beta": group["beta"], "adam_betas": max(group["adam_betas"])}.items():
        require(0 <= value < 1, f"{name}={value}: must be in [0, 1)")
    for weight in group["params"] if group["use_muon"] else []:
        require(
            weight.ndim >= 2,
            f"params: a weight of shape {tuple(weight.shape)} is not a matrix; put it in a group "
            "with use_muon=False",
        )


def orthogonalize(
    x: Float[Tensor, "*E M N"], steps: int = 5, epsilon: float = 1e-8
) -> Float[Tensor, "*E M N"]:
    """Newton–Schulz: the matrix with the singular vectors of `x` and singular values near 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + epsilon)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _muon_direction(gradient: Tensor, memory: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if not memory:
        memory |= {"step": 0, "momentum_buffer": torch.zeros_like(gradient)}
    memory["step"] += 1
    beta, count, average = group["beta"], memory["step"], memory["momentum_buffer"]
    average.copy_((1 - beta) * gradient + beta * average)
    ahead = beta * (average / (1 - beta ** (count + 1)))
    ahead = ahead + (1 - beta) * (gradient / (1 - beta**count))
    scale = group["consistent_rms"] * max(gradient.shape[-2:]) ** 0.5
    return scale * orthogonalize(ahead, group["ns_steps"], group["epsilon"])


def _adam_direction(gradient: Tensor, memory: dict[str, Any], group: dict[str, Any]) -> Tensor:
    if not memory:
        memory["step"] = 0
        memory |= {name: torch.zeros_like(gradient) for name in ("exp_avg", "exp_avg_sq")}
    memory["step"] += 1
    (beta1, beta2), count = group["adam_betas"], memory["step"]
    first, second = memory["exp_avg"], memory["exp_avg_sq"]
    first.copy_((1 - beta1) * gradient + beta1 * first)
    second.copy_((1 - beta2) * gradient.square() + beta2 * second)
    root = (second / (1 - beta2**count)).sqrt()
    return first / (1 - beta1**count) / (root + group["epsilon"])
