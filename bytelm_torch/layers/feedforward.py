"""Position-wise feed-forward layers."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bytelm.config.block import PAPER, BlockConfig
from bytelm_torch.layers.initializers import fan_in_normal
from bytelm_torch.layers.norm import LayerNorm, RMSNorm


class FeedForward(nn.Module):
    """LayerNorm → Linear(D, 4D) → GELU (erf) → Linear(4D, D), both linear layers with bias."""

    def __init__(self, dim: int, init_std: float):
        super().__init__()
        self.norm = LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=init_std)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down(F.gelu(self.up(self.norm(x))))


class GatedFeedForward(nn.Module):
    """RMSNorm → down(SiLU(gate(x)) · up(x)), hidden width F, no bias (Shazeer 2020, SwiGLU).

    `block` may put the norm at the end.
    """

    def __init__(self, dim: int, hidden_dim: int, block: BlockConfig = PAPER):
        super().__init__()
        self.norm, self.normed = RMSNorm(dim, block.norm_eps), block.norm
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.down = nn.Linear(hidden_dim, dim, bias=False)
        for linear in (self.gate, self.up, self.down):
            fan_in_normal(linear.in_features)(linear.weight)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        if self.normed == "after":
            return self.norm(self.down(F.silu(self.gate(x)) * self.up(x)))
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))
