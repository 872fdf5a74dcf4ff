"""Depthwise causal convolution with long filters: y[t] = Σ_j taps[j] · x[t − j] in each channel.

Axes: B batch, T positions, S positions of a cache, R of them within the filter's reach, K taps, D
channels.

The sums of `kernels.convolution` are exactly causal. Where the text consists of segments, they
would carry one into the next: there the plain sum is computed, tap by tap.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.convolution import long_convolution
from bytelm_jax.layers.caches import read_at, write_at
from bytelm_jax.layers.initializers import normal

_TAPS = 16
"""Taps that `segmented_convolution` adds in one pass over the inputs."""


def segmented_convolution(
    x: Float[Array, "B T D"], taps: Float[Array, "K D"], segment_positions: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """`long_convolution` within segments, by the plain sum.

    `segment_positions` is the number of earlier positions in the same segment. K · T operations per
    channel, in memory linear in T. A mask excludes everything before a segment, so that a position
    has exactly the sum that it has in its segment alone.
    """
    batch, length, dim = x.shape
    wide, block = jnp.promote_types(x.dtype, jnp.float32), min(_TAPS, length, taps.shape[0])
    if length == 0:
        return x
    count = -(-min(length, taps.shape[0]) // block)
    kernel = jnp.pad(taps[:length], ((0, count * block - min(length, taps.shape[0])), (0, 0)))
    padded = jnp.pad(x, ((0, 0), (count * block - 1, 0), (0, 0))).astype(wide)

    @jax.checkpoint  # otherwise the backward pass would keep each tap's masked input
    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        first, some = part
        start = (count - 1) * block - first
        near = jax.lax.dynamic_slice_in_dim(padded, start, length + block - 1, axis=1)
        for i in range(block):
            inside = (segment_positions >= first + i)[..., None]
            total = total + jnp.where(inside, near[:, block - 1 - i :][:, :length], 0) * some[i]
        return total, None

    numbers = jnp.arange(count, dtype=segment_positions.dtype) * block
    parts = (numbers, kernel.astype(wide).reshape(count, block, 1, 1, dim))
    total, _ = jax.lax.scan(add, jnp.zeros_like(padded, shape=(batch, length, dim)), parts)
    return total.astype(x.dtype)


class LongConvolution(nnx.Module):
    """`long_convolution` with learned taps [K, D]; the layout is the same in both packages."""

    def __init__(self, dim: int, kernel_length: int, chunk: int, *, rngs: nnx.Rngs):
        self.chunk = chunk
        init = normal(1.0, finish=_decaying)
        self.taps = nnx.Param(init(rngs.params(), (kernel_length, dim), jnp.float32))

    def __call__(
        self, x: Float[Array, "B T D"], segment_positions: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        if segment_positions is not None:
            return segmented_convolution(x, self.taps[...], segment_positions)
        return long_convolution(x, self.taps[...], self.chunk)

    def extend(
        self,
        x: Float[Array, "B T D"],
        past: Float[Array, "B S D"],
        index: Int[Array, " B"] | None,
        segment_positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
        """Cached version of `__call__`: T positions of each row, from `index` on.

        None means all from 0 on. Also gives the new past. From an index on, each position is the
        plain sum over the filter's length, whatever the context.
        """
        reach, count = self._reach(past), x.shape[1]
        if index is None:
            return self(x, segment_positions), write_at(past, x, reach - 1)
        past = write_at(past, x, index + reach - 1)
        # A position and `reach` − 1 before it, each with the others': [B, T, R, D].
        near = read_at(past, index, reach + count - 1)
        windows = jnp.stack([near[:, t : t + reach] for t in range(count)], axis=1)
        if segment_positions is not None:
            inside = segment_positions[..., None] >= jnp.arange(reach - 1, -1, -1)[None, None, :]
            windows = jnp.where(inside[..., None], windows, 0)
        # A product of matrices: a sum of products would be fused with the write above, and the
        # compiler would copy the whole buffer in every step to read it before and after.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        newest_last = self.taps[...][:reach][::-1].astype(x.dtype)
        mixed = jnp.einsum("btrd,rd->btd", windows, newest_last, preferred_element_type=wide)
        return mixed.astype(x.dtype), past

    def empty_past(self, batch: int, length: int, dtype: jnp.dtype) -> Float[Array, "B S D"]:
        """An empty cache for the inputs of `length` positions, preceded by zeros."""
        kernel_length, dim = self.taps.shape
        return jnp.zeros((batch, length + min(length, kernel_length) - 1, dim), dtype)

    def _reach(self, past: Array) -> int:
        """Taps that can meet an input: S = length + min(length, K) − 1, solved for the minimum."""
        return min(self.taps.shape[0], (past.shape[1] + 1) // 2)


def decays(kernel_length: int, dim: int) -> Float[Array, "K D"]:
    """exp(−j / τ_d), τ from 1 to K in equal ratios over the channels: filters of every length."""
    scale = kernel_length ** (jnp.arange(dim, dtype=jnp.float32) / max(dim - 1, 1))
    return jnp.exp(-jnp.arange(kernel_length, dtype=jnp.float32)[:, None] / scale[None])


def _decaying(noise: Array) -> Array:
    """An initializer of filters [K, D] with norm 1 that decay exponentially."""
    taps = noise * decays(*noise.shape)
    return taps / jnp.linalg.norm(taps, axis=0, keepdims=True)
