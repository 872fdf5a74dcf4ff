"""The output layer. Logits are not rounded to 16 bits.

In bfloat16 the two largest would coincide at about one byte in a hundred.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LogitsLinear(nn.Linear):
    """A linear layer with results in at least float32, also under autocast and with 16-bit weights.

    In these cases its products are float32, since torch has no 16-bit products with unrounded
    results on every device.
    """

    def forward(self, input: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch V"]:
        if input.dtype.itemsize > 2 and not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)
