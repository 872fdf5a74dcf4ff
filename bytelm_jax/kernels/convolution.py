"""Causal convolution of each channel with a long filter: y[t] = Σ_j taps[j] · x[t − j].

Axes: B batch, T positions, K taps, D channels, C positions per chunk, M blocks.

Exactly causal: one Fourier transform over the whole sequence would be causal in exact arithmetic
only, because its rounding errors reach every output. Here a chunk mixes within itself by a
triangular product, whose zeros are exact, and a transform reads finished blocks only and is cut to
what comes after them (relaxed multiplication, van der Hoeven 2002): blocks of C, 2C, 4C, …
positions add their sums to the block that follows, until a block is longer than the filter. A GPU
or TPU multiplies matrices so fast that filters of a few chunks take a single product instead.
"""

from functools import partial

import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from bytelm_jax.kernels.backend import backend
from bytelm_jax.kernels.rows import on_each_device

_DIRECT_CHUNKS = 8
"""Chunks that `direct_convolution` may reach back; it holds that many copies of the inputs."""


def long_convolution(
    x: Float[Array, "B T D"], taps: Float[Array, "K D"], chunk: int
) -> Float[Array, "B T D"]:
    """y[t] = Σ_{j < K, j <= t} taps[j] · x[t − j]; sums in at least float32, result in x's dtype.

    `chunk` shifts work between the triangular product (2 · chunk operations per value) and the
    transforms, and changes the result by rounding only.
    """
    if x.shape[1] == 0:
        return x
    # No compiler divides a Fourier transform over devices: each would transform all rows.
    return on_each_device(partial(_convolution, chunk), taps, x)


def _convolution(chunk: int, taps: Array, x: Array) -> Array:
    length = x.shape[1]
    rows, kernel = _row_major(jnp.moveaxis(_row_major(x), -1, 0)), taps[:length].T
    size = min(chunk, length)
    short = kernel.shape[1] - 1 <= _DIRECT_CHUNKS * size
    if not short or backend() == "cpu":
        total = transformed_convolution(rows, kernel, size)
    else:
        # A GPU makes up for the larger triangles, since it writes fewer copies of the inputs.
        size = min(2 * chunk, length) if backend() == "gpu" else size
        total = direct_convolution(rows, kernel, size)
    return _row_major(jnp.moveaxis(_row_major(total.astype(x.dtype)), 0, -1))


def _row_major(x: Array) -> Array:
    """x, on a GPU with its axes in memory in their order.

    Left to itself, the compiler keeps all activations of a model as the convolution has them, with
    the channels outermost, for which reading rows of experts reads each value by itself.
    """
    if backend() != "gpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def direct_convolution(
    rows: Float[Array, "D B T"], kernel: Float[Array, "D K"], chunk: int
) -> Float[Array, "D B T"]:
    """The sums in at least float32, K <= T: one product per chunk with everything it reaches."""
    dim, batch, length = rows.shape
    count, before = -(-length // chunk), -(-(kernel.shape[1] - 1) // chunk)
    padding = (before * chunk, count * chunk - length)
    padded = jnp.pad(rows, ((0, 0), (0, 0), padding)).reshape(dim, batch, before + count, chunk)
    # Summed side by side: for a concatenation, each part would be written twice.
    near = sum(
        jnp.pad(padded[:, :, i : i + count], (*[(0, 0)] * 3, (i * chunk, (before - i) * chunk)))
        for i in range(before + 1)
    )
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    summed = jnp.einsum(
        "dbns,dst->dbnt",
        near,
        # In the wide dtype, so that the gradients along a diagonal are summed in it.
        toeplitz(kernel.astype(wide), chunk, before * chunk).astype(rows.dtype),
        preferred_element_type=wide,
    )
    return summed.reshape(dim, batch, count * chunk)[:, :, :length]


def transformed_convolution(
    rows: Float[Array, "D B T"], kernel: Float[Array, "D K"], chunk: int
) -> Float[Array, "D B T"]:
    """The same sums by products within chunks and transforms between blocks; chunk <= T."""
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
    """[d, s, t] = kernel[d, t + before − s], and 0 outside the filter.

    Built by tiling and cutting, which shifts rows of odd length by one step per row: its transpose
    is a sum, whereas that of an indexed read would be a scatter of chunk² colliding values.
    """
    dim, rows = kernel.shape[0], before + chunk
    period, taps = rows + chunk, kernel[:, :rows]
    line = jnp.pad(taps, ((0, 0), (0, period - taps.shape[1])))
    line = jnp.roll(line, -before, axis=1)
    tiled = jnp.tile(line, (1, rows))[:, : rows * (period - 1)]
    return tiled.reshape(dim, rows, period - 1)[:, :, :chunk]


def _from_block_before(rows: Array, kernel: Array, size: int, every: bool) -> Array:
    """[D, B, T] → [D, B, T]: what blocks of `size` positions add to the block after them.

    Either `every` block adds to its successor, or only the even ones: the successor of an odd block
    belongs to another block of twice the size, which is handled in a later round.
    """
    dim, batch, length = rows.shape
    step = size if every else 2 * size
    count = -(-(length - size) // step)  # blocks that have a successor
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, max(0, count * step - length))))
    blocks = padded[:, :, : count * step].reshape(dim, batch, count, step)[..., :size]
    # A circular transform of length 2 · size wraps only onto its first half, which is dropped.
    spectrum = jnp.fft.rfft(blocks, 2 * size) * jnp.fft.rfft(kernel, 2 * size)[:, None, None]
    after = jnp.fft.irfft(spectrum, 2 * size)[..., size:]
    after = jnp.pad(after, ((0, 0), (0, 0), (0, 0), (0, step - size)))
    after = after.reshape(dim, batch, count * step)
    return jnp.pad(after, ((0, 0), (0, 0), (size, 0)))[:, :, :length]
