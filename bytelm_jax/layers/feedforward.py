"""Position-wise feed-forward layers."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.layers.initializers import fan_in_normal, normal
from bytelm_jax.layers.norm import LayerNorm, RMSNorm


class FeedForward(nnx.Module):
    """LayerNorm → Linear(D, 4D) → GELU (erf) → Linear(4D, D), both linears with bias."""

    def __init__(self, dim: int, init_std: float, *, rngs: nnx.Rngs):
        init = normal(init_std)
        self.norm = LayerNorm(dim)
        self.up = nnx.Linear(dim, 4 * dim, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        # erf, not tanh: flax's and jax's default is the tanh form, torch's is not.
        return self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=False))


class GatedFeedForward(nnx.Module):
    """RMSNorm → down(SiLU(gate(x)) · up(x)), width F inside, no bias (Shazeer 2020, SwiGLU)."""

    def __init__(self, dim: int, hidden_dim: int, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            init = fan_in_normal(inputs)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)

        self.norm = RMSNorm(dim)
        self.gate = linear(dim, hidden_dim)
        self.up = linear(dim, hidden_dim)
        self.down = linear(hidden_dim, dim)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        x = self.norm(x)
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
