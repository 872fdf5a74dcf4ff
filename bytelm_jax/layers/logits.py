"""The output layer. Logits are not rounded to 16 bits.

In bfloat16 the two largest would coincide at about one byte in a hundred.
"""

from flax import nnx
from jaxtyping import Array, Float

from bytelm_jax.kernels.decode_layer import decode_logits
from bytelm_jax.kernels.decode_weights import Product, product_of
from bytelm_jax.kernels.low_precision import unrounded_linear


class LogitsLinear(nnx.Linear):
    """A linear layer with results in at least float32; for 16-bit inputs its products are, too."""

    def __call__(
        self, inputs: Float[Array, "*batch D"], out_sharding: None = None
    ) -> Float[Array, "*batch V"]:
        decoded = decode_logits(self, inputs)
        return unrounded_linear(self, inputs) if decoded is None else decoded

    def decode_weights(self) -> Product:
        """The weights as decoding by sums reads them."""
        return product_of(self)
