"""Linear layers with a low-rank adapter (LoRA, Hu et al. 2021; `bytelm/lora.py`).

R is the rank of an adapter.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.leaves import torch_name
from bytelm.lora import LoRA, adapter_leaves
from bytelm_torch.layers.dropout import dropout


class LoRALinear(nn.Linear):
    """A linear layer and its adapter: x W + b + scale · dropout(x) A B."""

    def __init__(self, base: nn.Linear, lora: LoRA):
        inputs, outputs, where = base.in_features, base.out_features, base.weight.device
        super().__init__(inputs, outputs, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        place = {"device": where, "dtype": base.weight.dtype}
        # Drawn as peft draws it, which is how torch draws every linear layer.
        self.lora_A = nn.Linear(inputs, lora.rank, bias=False, **place)
        self.lora_B = nn.Linear(lora.rank, outputs, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.scale, self.rate = lora.scale, lora.dropout

    def forward(self, input: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch _"]:
        seen = dropout(input, self.rate, self.training)
        return super().forward(input) + self.scale * self.lora_B(self.lora_A(seen))


def add_adapters(model: nn.Module, lora: LoRA) -> None:
    """Replaces the layers that `lora` names; their weights stay, A is drawn and B is 0."""
    for name in lora.layers:
        parent, _, last = name.rpartition(".")
        layer: Any = model.get_submodule(name)
        setattr(model.get_submodule(parent), last, LoRALinear(layer, lora))


def merge(state: Mapping[str, Tensor], lora: LoRA) -> dict[str, Tensor]:
    """The state dict of the plain model that computes the same: W + scale · B A, no adapters."""
    leaves = {torch_name(name) for name in lora.leaves}
    merged = {name: value for name, value in state.items() if name not in leaves}
    for layer in lora.layers:
        first, second = (state[torch_name(name)] for name in adapter_leaves(layer))
        kernel = merged[f"{layer}.weight"]
        with torch.no_grad():
            merged[f"{layer}.weight"] = kernel + (lora.scale * (second @ first)).to(kernel.dtype)
    return merged
