"""Position-wise feed-forward layers."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from bytelm.config.block import PAPER, BlockConfig
from bytelm_jax.kernels.gelu import gelu
from bytelm_jax.kernels.low_precision import linear_of_rows, normalized_linears
from bytelm_jax.layers.initializers import fan_in_normal, normal
from bytelm_jax.layers.norm import LayerNorm, RMSNorm


class FeedForward(nnx.Module):
    """LayerNorm → Linear(D, 4D) → GELU (erf) → Linear(4D, D), both linear layers with bias."""

    def __init__(self, dim: int, init_std: float, *, rngs: nnx.Rngs):
        init = normal(init_std)
        self.norm = LayerNorm(dim)
        self.up = nnx.Linear(dim, 4 * dim, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        (hidden,) = normalized_linears(self.norm, x, self.up)
        return linear_of_rows(self.down, gelu(hidden))


class GatedFeedForward(nnx.Module):
    """RMSNorm → down(SiLU(gate(x)) · up(x)), hidden width F, no bias (Shazeer 2020, SwiGLU).

    `block` may put the norm at the end.
    """

    def __init__(self, dim: int, hidden_dim: int, block: BlockConfig = PAPER, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            init = fan_in_normal(inputs)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)

        self.norm, self.normed = RMSNorm(dim, block.norm_eps), block.norm
        self.gate = linear(dim, hidden_dim)
        self.up = linear(dim, hidden_dim)
        self.down = linear(hidden_dim, dim)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        if self.normed == "after":
            gate, up = (linear_of_rows(linear, x) for linear in (self.gate, self.up))
            return self.norm(self.down(jax.nn.silu(gate) * up))
        gate, up = normalized_linears(self.norm, x, self.gate, self.up)
        return self.down(jax.nn.silu(gate) * up)
