"""Lion: the sign of an average of gradients (Chen et al. 2023), as `optax.scale_by_lion` has it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from bytelm.config.base import require
from bytelm_torch.optimizers.groups import all_or_none


class Lion(torch.optim.Optimizer):
    """The step is −lr · (sign(β₁ m + (1 − β₁) g) + `weight_decay` · p); then m ← β₂ m + (1 − β₂) g.

    Every element moves by the learning rate, so it should be about a tenth of AdamW's, and the
    weight decay ten times AdamW's.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0, 0.0]))
    >>> optimizer = Lion([weight], lr=0.25, weight_decay=0.0)
    >>> weight.square().sum().backward()
    >>> optimizer.step()
    >>> weight.tolist()
    [0.75, -0.75, 0.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group's numbers are checked."""
        with all_or_none(self.param_groups):
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            for name in ("lr", "weight_decay"):
                require(group[name] >= 0, f"{name}={group[name]}: must be at least 0")
            betas = group["betas"]
            require(all(0 <= beta < 1 for beta in betas), f"betas={betas}: must be in [0, 1)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                memory = self.state[weight]
                if not memory:
                    memory["exp_avg"] = torch.zeros_like(weight)
                average, gradient = memory["exp_avg"], weight.grad
                direction = torch.sign((1 - beta1) * gradient + beta1 * average)
                average.copy_((1 - beta2) * gradient + beta2 * average)
                weight.sub_(group["lr"] * (direction + group["weight_decay"] * weight))
        return loss
