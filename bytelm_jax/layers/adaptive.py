"""Linear layers whose weights adapt to the input, and the mixing layers built from them.

y = (W + ΔW(a)) x + b with an adaptation vector a for each position. `full`: ΔW is a linear function
of a, as in lfm-torch 0.0.2. `low_rank` (default): ΔW = U diag(S a + s) V, like LoRA (Hu et al.
2021, arXiv 2106.09685) with a middle that depends on the input.

Axes: B batch, T positions, D width, A adaptation width, R rank, I inputs and O outputs of a linear.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.adaptation import adapted_product
from bytelm_jax.kernels.gelu import gelu
from bytelm_jax.kernels.running_mean import prefix_mean
from bytelm_jax.layers.caches import positions_from, read_at, take_at, write_at
from bytelm_jax.layers.initializers import normal
from bytelm_jax.layers.long_convolution import LongConvolution
from bytelm_jax.layers.norm import LayerNorm
from bytelm_jax.layers.resets import segmented_sums

Product = Callable[[Array, Array], Array]
"""`product(x [*, I], kernel [I, O]) -> [*, O]`; experts pass a grouped product."""


class AdaptiveWeights(NamedTuple):
    """The arrays of one adaptive linear; `down` and `up` are None in the full form.

    In the full form `adapt` is [A, O·I] and `adapt_bias` [O·I], in the low-rank form [A, R], [R].
    """

    base: Array
    bias: Array
    adapt: Array
    adapt_bias: Array
    down: Array | None
    up: Array | None


def adaptive_linear(
    weights: AdaptiveWeights,
    x: Float[Array, "B T I"],
    a: Float[Array, "B S A"],
    scale: Float[Array, "B S R"] | None = None,
) -> Float[Array, "B T O"]:
    """Applies the linear layer; S is T (one vector per position) or 1 (one per row).

    `scale` is S a + s of the low-rank form, where it is known already.
    """
    bias = weights.bias.reshape(1, 1, -1)
    if weights.down is not None and weights.up is not None:
        if scale is None:
            scale = a @ weights.adapt + weights.adapt_bias.reshape(1, 1, -1)
        kernels = (weights.base, weights.down, weights.up)
        return adapted_product(x, scale, *kernels, jnp.matmul) + bias
    if a.shape[1] == 1:
        change = (a @ weights.adapt + weights.adapt_bias.reshape(1, 1, -1)).reshape(
            a.shape[0], *weights.base.shape[::-1]
        )
        return jnp.einsum("bti,boi->bto", x, weights.base.T[None] + change) + bias
    return full_adaptation(weights, x, a, jnp.matmul) + bias


def full_adaptation(
    weights: AdaptiveWeights, x: Float[Array, "*n I"], a: Float[Array, "*n A"], product: Product
) -> Float[Array, "*n O"]:
    """W x + ΔW(a) x as a sum over the A matrices of ΔW: no position's own matrix is materialised.

    The sum is accumulated in at least float32. With a grouped `product` every array of `weights`
    has a leading axis of experts.
    """
    width, wide = a.shape[-1], jnp.promote_types(x.dtype, jnp.float32)
    *lead, inputs, outputs = weights.base.shape

    def kernel(flat: Array) -> Array:
        return flat.reshape(*lead, outputs, inputs).swapaxes(-1, -2)

    @jax.checkpoint  # otherwise the backward pass would keep A results
    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        share, matrix = part
        more = share[..., None] * product(x, kernel(matrix))
        return total + more.astype(wide), None

    first = product(x, weights.base + kernel(weights.adapt_bias)).astype(wide)
    matrices = jnp.moveaxis(weights.adapt, -2, 0)
    total, _ = jax.lax.scan(add, first, (jnp.moveaxis(a, -1, 0), matrices), length=width)
    return total.astype(x.dtype)


class AdaptiveLinear(nnx.Module):
    """An adaptive linear layer I → O; `rank=0` is the full form. Starts as a plain one: ΔW = 0."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        adapt_dim: int,
        rank: int,
        init_std: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.rank = rank
        noise, zeros = normal(init_std), nnx.initializers.zeros
        self.base = nnx.Linear(inputs, outputs, kernel_init=noise, rngs=rngs)
        if rank:
            ones = nnx.initializers.ones
            self.adapt = nnx.Linear(adapt_dim, rank, kernel_init=noise, bias_init=ones, rngs=rngs)
            self.down = nnx.Linear(inputs, rank, use_bias=False, kernel_init=noise, rngs=rngs)
            self.up = nnx.Linear(rank, outputs, use_bias=False, kernel_init=zeros, rngs=rngs)
        else:
            self.adapt = nnx.Linear(adapt_dim, outputs * inputs, kernel_init=zeros, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T I"],
        a: Float[Array, "B S A"],
        scale: Float[Array, "B S R"] | None = None,
    ) -> Float[Array, "B T O"]:
        return adaptive_linear(self._weights(), x, a, scale)

    def _weights(self) -> AdaptiveWeights:
        base, adapt = self.base, self.adapt
        assert base.bias is not None and adapt.bias is not None
        return AdaptiveWeights(
            base.kernel[...],
            base.bias[...],
            adapt.kernel[...],
            adapt.bias[...],
            self.down.kernel[...] if self.rank else None,
            self.up.kernel[...] if self.rank else None,
        )


def running_mean(
    x: Float[Array, "B T D"], segment_positions: Int[Array, "B T"] | None = None
) -> Float[Array, "B T D"]:
    """Mean over all positions up to each one, summed in at least float32.

    With `segment_positions`, the number of earlier positions in the same segment, the mean restarts
    at each segment.
    """
    if segment_positions is not None:
        sums = segmented_sums(x.astype(jnp.promote_types(x.dtype, jnp.float32)), segment_positions)
        return (sums / (segment_positions + 1).astype(sums.dtype)[..., None]).astype(x.dtype)
    return prefix_mean(x)


def extend_running_mean(
    x: Float[Array, "B T D"],
    sums: Float[Array, "B S D"],
    index: Int[Array, " B"],
    segment_positions: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
    """Cached version of `running_mean` for T positions of each row, from `index` on.

    Also gives the new `sums`. `segment_positions` as in `running_mean`. `sums[:, t]` holds the sum
    over the first t positions, restricted to the segment of the last of them, in at least float32;
    S is the capacity in positions plus 1. Since sums are stored by position, entries past `index`
    may hold anything.
    """
    before, wide = read_at(sums, index, 1), x.astype(sums.dtype)
    if segment_positions is None:
        segment_positions = positions_from(index, x.shape[1])
        more = before + jnp.cumsum(wide, axis=1)
    else:
        reaches = segment_positions > jnp.arange(x.shape[1])[None, :]
        more = segmented_sums(wide, segment_positions) + jnp.where(reaches[..., None], before, 0)
    sums = write_at(sums, more, index + 1)
    # Read back what was written: using `more` would let the compiler read `before` again after the
    # write, for which it would copy the whole buffer in every step.
    written = take_at(sums, 1 + positions_from(index, x.shape[1]))
    counts = (segment_positions + 1).astype(sums.dtype)[..., None]
    return (written / counts).astype(x.dtype), sums


class TokenMixing(nnx.Module):
    """Norm → long convolution → adaptive linear; `norm=False` and `kernel_length=0` omit parts."""

    def __init__(
        self,
        dim: int,
        kernel_length: int,
        chunk: int,
        adapt_dim: int,
        rank: int,
        norm: bool,
        init_std: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm = LayerNorm(dim) if norm else None
        self.convolution = (
            LongConvolution(dim, kernel_length, chunk, rngs=rngs) if kernel_length else None
        )
        self.linear = AdaptiveLinear(dim, dim, adapt_dim, rank, init_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        a: Float[Array, "B S A"],
        segment_positions: Int[Array, "B T"] | None = None,
        scale: Float[Array, "B S R"] | None = None,
    ) -> Float[Array, "B T D"]:
        x = x if self.norm is None else self.norm(x)
        if self.convolution is not None:
            x = self.convolution(x, segment_positions)
        return self.linear(x, a, scale)

    def extend(
        self,
        x: Float[Array, "B T D"],
        a: Float[Array, "B T A"],
        past: Float[Array, "B S D"] | None,
        index: Int[Array, " B"] | None,
        segment_positions: Int[Array, "B T"] | None = None,
        scale: Float[Array, "B T R"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"] | None]:
        """Cached version of `__call__`: T positions of each row, from `index` on.

        None means all from 0 on. Also gives the new past.
        """
        x = x if self.norm is None else self.norm(x)
        if self.convolution is not None and past is not None:
            x, past = self.convolution.extend(x, past, index, segment_positions)
        return self.linear(x, a, scale), past


class ChannelMixing(nnx.Module):
    """Norm → adaptive linear → GELU (erf) → adaptive linear; `hidden=0`: one linear, no GELU."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        adapt_dim: int,
        rank: int,
        norm: bool,
        init_std: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm = LayerNorm(dim) if norm else None

        def linear(inputs: int, outputs: int) -> AdaptiveLinear:
            return AdaptiveLinear(inputs, outputs, adapt_dim, rank, init_std, rngs=rngs)

        self.to_hidden = linear(dim, hidden) if hidden else None
        self.linear = linear(hidden or dim, dim)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        a: Float[Array, "B S A"],
        scales: Sequence[Float[Array, "B S R"] | None] = (None, None),
    ) -> Float[Array, "B T D"]:
        """`scales` are those of `to_hidden`, if there is one, and of `linear`."""
        x = x if self.norm is None else self.norm(x)
        if self.to_hidden is not None:
            x = gelu(self.to_hidden(x, a, scales[0]))
        return self.linear(x, a, scales[-1])
