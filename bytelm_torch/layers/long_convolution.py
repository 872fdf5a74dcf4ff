"""Depthwise causal convolution with long filters: y[t] = Σ_j taps[j] · x[t − j] in each channel.

Axes: B batch, T positions, K taps, D channels, C positions per chunk, M blocks.

Exactly causal: one Fourier transform over the whole sequence would be causal in exact arithmetic
only, because its rounding errors reach every output. Here a chunk mixes within itself by a
triangular product, whose zeros are exact, and a transform reads finished blocks only and is cut to
what comes after them (relaxed multiplication, van der Hoeven 2002): blocks of C, 2C, 4C, …
positions add their sums to the block that follows, until a block is longer than the filter. Where
the text consists of segments, a transform would carry one into the next: there the plain sum is
computed, tap by tap.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytelm_torch.layers.caches import Index, read_at, write_at

_TAPS = 16
"""Taps that `segmented_convolution` adds in one pass over the inputs."""


def long_convolution(
    x: Float[Tensor, "B T D"], taps: Float[Tensor, "K D"], chunk: int
) -> Float[Tensor, "B T D"]:
    """y[t] = Σ_{j < K, j <= t} taps[j] · x[t − j]; sums in at least float32, result in x's dtype.

    `chunk` shifts work between the triangular product (2 · chunk operations per value) and the
    transforms, and changes the result by rounding only.
    """
    length = x.shape[1]
    if length == 0:
        return x
    # Cast first: a product of bfloat16 matrices would round its sums to bfloat16 here.
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, kernel = x.to(wide).movedim(-1, 0), taps[:length].to(wide).T
    size = min(chunk, length)
    total = _within_chunks(rows, kernel, size)
    reach = kernel.shape[1] - 1
    while size < length and reach > 0:
        covers = size >= reach
        total = total + _from_block_before(rows, kernel, size, every=covers)
        if covers:
            break
        size *= 2
    return total.movedim(0, -1).to(x.dtype)


def _within_chunks(rows: Tensor, kernel: Tensor, chunk: int) -> Tensor:
    """[D, B, T] → [D, B, T]: the sums over sources in the output's own chunk."""
    dim, batch, length = rows.shape
    count = -(-length // chunk)
    padded = F.pad(rows, (0, count * chunk - length))
    summed = torch.einsum(
        "dbns,dst->dbnt", padded.reshape(dim, batch, count, chunk), toeplitz(kernel, chunk)
    )
    return summed.reshape(dim, batch, count * chunk)[:, :, :length]


def toeplitz(kernel: Float[Tensor, "D K"], chunk: int) -> Float[Tensor, "D {chunk} {chunk}"]:
    """[d, s, t] = kernel[d, t − s], and 0 outside the filter.

    Built by tiling and cutting, which shifts rows of odd length by one step per row.
    """
    dim, period = kernel.shape[0], 2 * chunk
    taps = kernel[:, :chunk]
    line = F.pad(taps, (0, period - taps.shape[1]))
    tiled = line.tile(1, chunk)[:, : chunk * (period - 1)]
    return tiled.reshape(dim, chunk, period - 1)[:, :, :chunk]


def _from_block_before(rows: Tensor, kernel: Tensor, size: int, every: bool) -> Tensor:
    """[D, B, T] → [D, B, T]: what blocks of `size` positions add to the block after them.

    Either `every` block adds to its successor, or only the even ones: the successor of an odd block
    belongs to another block of twice the size, which is handled in a later round.
    """
    dim, batch, length = rows.shape
    step = size if every else 2 * size
    count = -(-(length - size) // step)  # blocks that have a successor
    padded = F.pad(rows, (0, max(0, count * step - length)))
    blocks = padded[:, :, : count * step].reshape(dim, batch, count, step)[..., :size]
    # A circular transform of length 2 · size wraps only onto its first half, which is dropped.
    spectrum = torch.fft.rfft(blocks, 2 * size) * torch.fft.rfft(kernel, 2 * size)[:, None, None]
    after = torch.fft.irfft(spectrum, 2 * size)[..., size:]
    after = F.pad(after, (0, step - size)).reshape(dim, batch, count * step)
    return F.pad(after, (size, 0))[:, :, :length]


def segmented_convolution(
    x: Float[Tensor, "B T D"], taps: Float[Tensor, "K D"], segment_positions: Int[Tensor, "B T"]
) -> Float[Tensor, "B T D"]:
    """`long_convolution` within segments, by the plain sum.

    `segment_positions` is the number of earlier positions in the same segment. K · T operations per
    channel, in memory linear in T. A mask excludes everything before a segment, so that a position
    has exactly the sum that it has in its segment alone.
    """
    length, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    if length == 0:
        return x
    kernel = taps[:length].to(wide)
    reach = len(kernel) - 1
    padded = F.pad(x.to(wide), (0, 0, reach, 0))

    def add(total: Tensor, near: Tensor, some: Tensor, first: int) -> Tensor:
        for i, tap in enumerate(some.unbind(0)):
            start = len(some) - 1 - i
            before = near[:, start : start + length]
            total = total + before.masked_fill((segment_positions < first + i)[..., None], 0) * tap
        return total

    total = torch.zeros_like(x, dtype=wide)
    for first in range(0, reach + 1, _TAPS):
        some = kernel[first : first + _TAPS]
        start = reach - first - len(some) + 1
        near = padded[:, start : start + length + len(some) - 1]
        # Otherwise the backward pass would keep each tap's masked input.
        total = checkpoint(add, total, near, some, first, use_reentrant=False)
        assert total is not None
    return total.to(x.dtype)


class LongConvolution(nn.Module):
    """`long_convolution` with learned taps [K, D]; the layout is the same in both packages."""

    def __init__(self, dim: int, kernel_length: int, chunk: int):
        super().__init__()
        self.chunk = chunk
        self.taps = nn.Parameter(torch.empty(kernel_length, dim))
        if not self.taps.is_meta:  # arithmetic there would import torch's compiler
            taps = torch.randn(kernel_length, dim) * decays(kernel_length, dim)
            self.taps.data = taps / torch.linalg.norm(taps, dim=0, keepdim=True)

    def forward(
        self, x: Float[Tensor, "B T D"], segment_positions: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        if segment_positions is not None:
            return segmented_convolution(x, self.taps, segment_positions)
        return long_convolution(x, self.taps, self.chunk)

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        past: Float[Tensor, "B S D"],
        index: Index | None,
        segment_positions: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S D"]]:
        """Cached version of `forward`: T positions of each row, from `index` on.

        None means all from 0 on. From an index on, each position is the plain sum over the filter's
        length, whatever the context. `past` is written in place, and returned.
        """
        reach, count = self._reach(past), x.shape[1]
        if index is None:
            return self(x, segment_positions), write_at(past, x, reach - 1)
        past = write_at(past, x, index + reach - 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        # A position and `reach` − 1 before it, each with the others': [B, T, D, R].
        windows = read_at(past, index, reach + count - 1).to(wide).unfold(1, reach, 1)
        if segment_positions is not None:
            taps_back = torch.arange(reach - 1, -1, -1, device=x.device)
            before = segment_positions[..., None] < taps_back
            windows = windows.masked_fill(before[:, :, None, :], 0)
        newest_last = self.taps[:reach].flip(0).to(wide)
        return (windows * newest_last.T).sum(dim=-1).to(x.dtype), past

    def empty_past(self, batch: int, length: int, dtype: torch.dtype) -> Float[Tensor, "B S D"]:
        """An empty cache for the inputs of `length` positions, preceded by zeros."""
        kernel_length, dim = self.taps.shape
        shape = (batch, length + min(length, kernel_length) - 1, dim)
        return torch.zeros(shape, dtype=dtype, device=self.taps.device)

    def _reach(self, past: Tensor) -> int:
        """Taps that can meet an input: S = length + min(length, K) − 1, solved for the minimum."""
        return min(self.taps.shape[0], (past.shape[1] + 1) // 2)


def decays(kernel_length: int, dim: int) -> Float[Tensor, "K D"]:
    """exp(−j / τ_d), τ from 1 to K in equal ratios over the channels: filters of every length."""
    scale = kernel_length ** (torch.arange(dim) / max(dim - 1, 1))
    return torch.exp(-torch.arange(kernel_length)[:, None] / scale)
