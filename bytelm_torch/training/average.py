"""An average of the weights over steps, which is evaluated and exported in their place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """a ← d a + (1 − d) w after each step, over the parameters that train; none if d is 0."""

    def __init__(self, model: nn.Module, decay: float):
        """Begins at the weights that `model` has."""
        self._decay = decay
        moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._parameters: dict[str, nn.Parameter] = moving if decay else {}
        self._other: dict[str, Tensor] = {}
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Begins again at the weights that the model has."""
        self._other = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after a step."""
        for name, p in self._parameters.items():
            self._other[name].mul_(self._decay).add_(p, alpha=1 - self._decay)

    @contextmanager
    def in_model(self) -> Iterator[dict[str, Tensor]]:
        """Within this context the model has the averages; gives the trained weights meanwhile."""
        self._swap()
        try:
            yield self._other
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, p in self._parameters.items():
            p.data, self._other[name] = self._other[name], p.data
