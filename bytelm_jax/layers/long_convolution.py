"""Depthwise causal convolution with long filters: y[t] = Σ_j taps[j] · x[t − j] in each channel.

Axes: B batch, T positions, K taps, D channels, C positions per chunk, M blocks.

Exactly causal: one Fourier transform over the sequence would be causal in exact arithmetic only,
its rounding errors reach every output. Here a chunk mixes within itself by a triangular product,
whose zeros are exact, and a transform reads finished blocks only and is cut to what comes after
them (relaxed multiplication, van der Hoeven 2002): blocks of C, 2C, 4C, … positions hand their
sums to the block that follows, until a block is longer than the filter. A GPU or TPU multiplies
matrices so fast that filters of a few chunks take one product with all that a chunk reaches. Where
the text falls into segments, a transform would carry one into the next: there the plain sum is
taken, tap by tap.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.backend import backend
from bytelm_jax.layers.initializers import normal

_TAPS = 16
"""Taps that `segmented_convolution` adds in one pass over the inputs."""

_DIRECT_CHUNKS = 8
"""Chunks that `direct_convolution` may reach back, being as many copies of the inputs."""


def long_convolution(
    x: Float[Array, "B T D"], taps: Float[Array, "K D"], chunk: int
) -> Float[Array, "B T D"]:
    """y[t] = Σ_{j < K, j <= t} taps[j] · x[t − j]; sums in at least float32, result as `x`.

    `chunk` moves work between the triangular product (2 · chunk operations a value) and the
    transforms, and changes the result by rounding alone.
    """
    length = x.shape[1]
    if length == 0:
        return x
    rows, kernel = jnp.moveaxis(x, -1, 0), taps[:length].T
    size = min(chunk, length)
    short = kernel.shape[1] - 1 <= _DIRECT_CHUNKS * size
    direct = short and backend() != "cpu"
    total = (direct_convolution if direct else transformed_convolution)(rows, kernel, size)
    return jnp.moveaxis(total, 0, -1).astype(x.dtype)


def direct_convolution(
    rows: Float[Array, "D B T"], kernel: Float[Array, "D K"], chunk: int
) -> Float[Array, "D B T"]:
    """The sums in at least float32, K <= T: each chunk by one product with all that it reaches."""
    dim, batch, length = rows.shape
    count, before = -(-length // chunk), -(-(kernel.shape[1] - 1) // chunk)
    padding = (before * chunk, count * chunk - length)
    padded = jnp.pad(rows, ((0, 0), (0, 0), padding)).reshape(dim, batch, before + count, chunk)
    near = [padded[:, :, i : i + count] for i in range(before + 1)]
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    summed = jnp.einsum(
        "dbns,dst->dbnt",
        jnp.concatenate(near, axis=-1),
        # Wide, so that the gradients along a diagonal are summed wide.
        toeplitz(kernel.astype(wide), chunk, before * chunk).astype(rows.dtype),
        preferred_element_type=wide,
    )
    return summed.reshape(dim, batch, count * chunk)[:, :, :length]


def transformed_convolution(
    rows: Float[Array, "D B T"], kernel: Float[Array, "D K"], chunk: int
) -> Float[Array, "D B T"]:
    """The same by products within chunks and transforms from block to block; chunk <= T."""
    length, size, reach = rows.shape[2], chunk, kernel.shape[1] - 1
    total = _within_chunks(rows, kernel, size)
    rows, kernel = rows.astype(total.dtype), kernel.astype(total.dtype)
    while size < length and reach > 0:
        covers = size >= reach
        total = total + _from_block_before(rows, kernel, size, every=covers)
        if covers:
            break
        size *= 2
    return total


def _within_chunks(rows: Array, kernel: Array, chunk: int) -> Array:
    """[D, B, T] → [D, B, T], at least float32: the sums over sources in the output's own chunk."""
    dim, batch, length = rows.shape
    count = -(-length // chunk)
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, count * chunk - length)))
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    summed = jnp.einsum(
        "dbns,dst->dbnt",
        padded.reshape(dim, batch, count, chunk),
        toeplitz(kernel, chunk),
        preferred_element_type=wide,
    )
    return summed.reshape(dim, batch, count * chunk)[:, :, :length]


def toeplitz(
    kernel: Float[Array, "D K"], chunk: int, before: int = 0
) -> Float[Array, "D {before}+{chunk} {chunk}"]:
    """[d, s, t] = kernel[d, t + before − s], and 0 where there is no such tap.

    By tiling and cutting, which a row of odd length shifts by one step a row: the transpose is a
    sum, where that of an indexed read would be a scatter of chunk² colliding values.
    """
    dim, rows = kernel.shape[0], before + chunk
    period, kept = rows + chunk, kernel[:, :rows]
    line = jnp.pad(kept, ((0, 0), (0, period - kept.shape[1])))
    line = jnp.roll(line, -before, axis=1)
    tiled = jnp.tile(line, (1, rows))[:, : rows * (period - 1)]
    return tiled.reshape(dim, rows, period - 1)[:, :, :chunk]


def _from_block_before(rows: Array, kernel: Array, size: int, every: bool) -> Array:
    """[D, B, T] → [D, B, T]: what blocks of `size` positions add to the block after them.

    `every` block hands on, or the even ones only: an odd one's successor belongs to another block
    of twice the size, whose turn comes later.
    """
    dim, batch, length = rows.shape
    step = size if every else 2 * size
    count = -(-(length - size) // step)  # blocks that have a successor
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, max(0, count * step - length))))
    blocks = padded[:, :, : count * step].reshape(dim, batch, count, step)[..., :size]
    # A circular transform of 2 · size wraps only onto its first half, which is dropped.
    spectrum = jnp.fft.rfft(blocks, 2 * size) * jnp.fft.rfft(kernel, 2 * size)[:, None, None]
    after = jnp.fft.irfft(spectrum, 2 * size)[..., size:]
    after = jnp.pad(after, ((0, 0), (0, 0), (0, 0), (0, step - size)))
    after = after.reshape(dim, batch, count * step)
    return jnp.pad(after, ((0, 0), (0, 0), (size, 0)))[:, :, :length]


def segmented_convolution(
    x: Float[Array, "B T D"], taps: Float[Array, "K D"], ages: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """`long_convolution` within segments; `ages` counts the positions before each in its segment.

    The plain sum: K · T operations a channel, in memory linear in T. What lies before a segment
    is left out by a mask, so that a position has the very sum that it has in its segment alone.
    """
    batch, length, dim = x.shape
    wide, block = jnp.promote_types(x.dtype, jnp.float32), min(_TAPS, length, taps.shape[0])
    if length == 0:
        return x
    count = -(-min(length, taps.shape[0]) // block)
    kernel = jnp.pad(taps[:length], ((0, count * block - min(length, taps.shape[0])), (0, 0)))
    padded = jnp.pad(x, ((0, 0), (count * block - 1, 0), (0, 0))).astype(wide)

    @jax.checkpoint  # or the backward pass would keep each tap's masked input
    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        first, some = part
        start = (count - 1) * block - first
        near = jax.lax.dynamic_slice_in_dim(padded, start, length + block - 1, axis=1)
        for i in range(block):
            inside = (ages >= first + i)[..., None]
            total = total + jnp.where(inside, near[:, block - 1 - i :][:, :length], 0) * some[i]
        return total, None

    numbers = jnp.arange(count, dtype=ages.dtype) * block
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
        self, x: Float[Array, "B T D"], ages: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        if ages is not None:
            return segmented_convolution(x, self.taps[...], ages)
        return long_convolution(x, self.taps[...], self.chunk)

    def extend(
        self,
        x: Float[Array, "B T D"],
        past: Float[Array, "B S D"],
        index: int | Int[Array, ""],
        ages: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B S D"]]:
        """The same for one position at `index`, or for T positions from 0, and the new past.

        One position is the plain sum over the filter's length, whatever the context.
        """
        reach = self._reach(past)
        past = jax.lax.dynamic_update_slice_in_dim(past, x, index + reach - 1, axis=1)
        if x.shape[1] != 1:
            return self(x, ages), past
        window = jax.lax.dynamic_slice_in_dim(past, index, reach, axis=1)
        if ages is not None:
            inside = ages >= jnp.arange(reach - 1, -1, -1)[None, :]
            window = jnp.where(inside[..., None], window, 0)
        # A product of matrices: a sum of products would be fused with the write above, and the
        # compiler would copy the whole buffer in every step to read it before and after.
        wide = jnp.promote_types(x.dtype, jnp.float32)
        newest_last = self.taps[...][:reach][::-1].astype(x.dtype)
        mixed = jnp.einsum("brd,rd->bd", window, newest_last, preferred_element_type=wide)
        return mixed[:, None].astype(x.dtype), past

    def empty_past(self, batch: int, length: int, dtype: jnp.dtype) -> Float[Array, "B S D"]:
        """Room for the inputs of `length` positions, after zeros for what lies before the first."""
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
    """Filters [K, D] of norm 1 that die away."""
    taps = noise * decays(*noise.shape)
    return taps / jnp.linalg.norm(taps, axis=0, keepdims=True)
