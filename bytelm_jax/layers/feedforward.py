"""Position-wise feed-forward layers."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.layers.norm import LayerNorm


class FeedForward(nnx.Module):
    """LayerNorm → Linear(D, 4D) → GELU (erf) → Linear(4D, D), both linears with bias."""

    def __init__(self, dim: int, init_std: float, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(init_std)
        self.norm = LayerNorm(dim)
        self.up = nnx.Linear(dim, 4 * dim, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(4 * dim, dim, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        # erf, not tanh: flax's and jax's default is the tanh form, torch's is not.
        return self.down(jax.nn.gelu(self.up(self.norm(x)), approximate=False))
