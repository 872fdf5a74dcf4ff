"""Linear layers whose weights adapt to the input, and the mixing layers built from them.

y = (W + ΔW(a)) x + b with an adaptation vector a for each position. `full`: ΔW is a linear function
of a, as in lfm-torch 0.0.2. `low_rank` (default): ΔW = U diag(S a + s) V, like LoRA (Hu et al.
2021, arXiv 2106.09685) with a middle that depends on the input.

Axes: B batch, T positions, D width, A adaptation width, R rank, I inputs and O outputs of a linear.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytelm_torch.layers.caches import Index, positions_from, read_at, write_at
from bytelm_torch.layers.long_convolution import LongConvolution
from bytelm_torch.layers.norm import LayerNorm
from bytelm_torch.layers.resets import segmented_sums


class AdaptiveWeights(NamedTuple):
    """The tensors of one adaptive linear, matrices [in, out]; the full form has no `down`, `up`.

    In the full form `adapt` is [A, O·I] and `adapt_bias` [O·I], in the low-rank form [A, R], [R].
    """

    base: Tensor
    bias: Tensor
    adapt: Tensor
    adapt_bias: Tensor
    down: Tensor | None
    up: Tensor | None


def adaptive_linear(
    weights: AdaptiveWeights, x: Float[Tensor, "B T I"], a: Float[Tensor, "B S A"]
) -> Float[Tensor, "B T O"]:
    """Applies the linear layer; S is T (one vector per position) or 1 (one per row)."""
    if weights.down is not None and weights.up is not None:
        narrow = (a @ weights.adapt + weights.adapt_bias) * (x @ weights.down)
        return x @ weights.base + narrow @ weights.up + weights.bias
    if a.shape[1] == 1:
        change = (a @ weights.adapt + weights.adapt_bias).reshape(a.shape[0], *weights.base.T.shape)
        return torch.einsum("bti,boi->bto", x, weights.base.T + change) + weights.bias
    return full_adaptation(weights, x, a) + weights.bias


def full_adaptation(
    weights: AdaptiveWeights, x: Float[Tensor, "*n I"], a: Float[Tensor, "*n A"]
) -> Float[Tensor, "*n O"]:
    """W x + ΔW(a) x as a sum over the A matrices of ΔW: no position's own matrix is materialised.

    The sum is accumulated in at least float32.
    """
    inputs, outputs = weights.base.shape
    wide = torch.promote_types(x.dtype, torch.float32)

    def kernel(flat: Tensor) -> Tensor:
        return flat.reshape(outputs, inputs).T

    def add(total: Tensor, share: Tensor, matrix: Tensor) -> Tensor:
        return total + (share[..., None] * (x @ kernel(matrix))).to(wide)

    total = (x @ (weights.base + kernel(weights.adapt_bias))).to(wide)
    for share, matrix in zip(a.unbind(-1), weights.adapt.unbind(0), strict=True):
        # Otherwise the backward pass would keep A results.
        total = checkpoint(add, total, share, matrix, use_reentrant=False)
        assert total is not None
    return total.to(x.dtype)


class AdaptiveLinear(nn.Module):
    """An adaptive linear layer I → O; `rank=0` is the full form. Starts as a plain one: ΔW = 0."""

    def __init__(self, inputs: int, outputs: int, adapt_dim: int, rank: int, init_std: float):
        super().__init__()
        self.rank = rank
        self.base = nn.Linear(inputs, outputs)
        nn.init.normal_(self.base.weight, std=init_std)
        nn.init.zeros_(self.base.bias)
        if rank:
            self.adapt = nn.Linear(adapt_dim, rank)
            self.down = nn.Linear(inputs, rank, bias=False)
            self.up = nn.Linear(rank, outputs, bias=False)
            nn.init.normal_(self.adapt.weight, std=init_std)
            nn.init.ones_(self.adapt.bias)
            nn.init.normal_(self.down.weight, std=init_std)
            nn.init.zeros_(self.up.weight)
        else:
            self.adapt = nn.Linear(adapt_dim, outputs * inputs)
            nn.init.zeros_(self.adapt.weight)
            nn.init.zeros_(self.adapt.bias)

    def forward(
        self, x: Float[Tensor, "B T I"], a: Float[Tensor, "B S A"]
    ) -> Float[Tensor, "B T O"]:
        return adaptive_linear(self._weights(), x, a)

    def _weights(self) -> AdaptiveWeights:
        return AdaptiveWeights(
            self.base.weight.T,
            self.base.bias,
            self.adapt.weight.T,
            self.adapt.bias,
            self.down.weight.T if self.rank else None,
            self.up.weight.T if self.rank else None,
        )


def running_mean(
    x: Float[Tensor, "B T D"], segment_positions: Int[Tensor, "B T"] | None = None
) -> Float[Tensor, "B T D"]:
    """Mean over all positions up to each one, summed in at least float32.

    With `segment_positions`, the number of earlier positions in the same segment, the mean restarts
    at each segment.
    """
    if segment_positions is not None:
        sums = segmented_sums(x.to(torch.promote_types(x.dtype, torch.float32)), segment_positions)
        return (sums / (segment_positions + 1)[..., None].to(sums.dtype)).to(x.dtype)
    sums = torch.cumsum(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
    counts = torch.arange(1, 1 + sums.shape[1], dtype=sums.dtype, device=sums.device)[:, None]
    return (sums / counts).to(x.dtype)


def extend_running_mean(
    x: Float[Tensor, "B T D"],
    sums: Float[Tensor, "B S D"],
    index: Index,
    segment_positions: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S D"]]:
    """Cached version of `running_mean` for T positions of each row, from `index` on.

    Also gives the new `sums`, written in place. `segment_positions` as in `running_mean`.
    `sums[:, t]` holds the sum over the first t positions, restricted to the segment of the last of
    them, in at least float32; S is the capacity in positions plus 1. Since sums are stored by
    position, entries past `index` may hold anything.
    """
    before, wide = read_at(sums, index, 1), x.to(sums.dtype)
    if segment_positions is None:
        segment_positions = positions_from(index, x.shape[1], x.device)
        more = before + torch.cumsum(wide, dim=1)
    else:
        reaches = segment_positions > torch.arange(x.shape[1], device=x.device)
        more = segmented_sums(wide, segment_positions) + before.where(reaches[..., None], 0)
    counts = (segment_positions + 1)[..., None].to(sums.dtype)
    return (more / counts).to(x.dtype), write_at(sums, more, index + 1)


class TokenMixing(nn.Module):
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
    ):
        super().__init__()
        self.norm = LayerNorm(dim) if norm else None
        self.convolution = LongConvolution(dim, kernel_length, chunk) if kernel_length else None
        self.linear = AdaptiveLinear(dim, dim, adapt_dim, rank, init_std)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        a: Float[Tensor, "B S A"],
        segment_positions: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = x if self.norm is None else self.norm(x)
        return self.linear(
            x if self.convolution is None else self.convolution(x, segment_positions), a
        )

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        a: Float[Tensor, "B T A"],
        past: Float[Tensor, "B S D"] | None,
        index: Index | None,
        segment_positions: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S D"] | None]:
        """Cached version of `forward`: T positions of each row, from `index` on.

        None means all from 0 on. Also gives the new past.
        """
        x = x if self.norm is None else self.norm(x)
        if self.convolution is not None and past is not None:
            x, past = self.convolution.extend(x, past, index, segment_positions)
        return self.linear(x, a), past


class ChannelMixing(nn.Module):
    """Norm → adaptive linear → GELU (erf) → adaptive linear; `hidden=0`: one linear, no GELU."""

    def __init__(
        self, dim: int, hidden: int, adapt_dim: int, rank: int, norm: bool, init_std: float
    ):
        super().__init__()
        self.norm = LayerNorm(dim) if norm else None

        def linear(inputs: int, outputs: int) -> AdaptiveLinear:
            return AdaptiveLinear(inputs, outputs, adapt_dim, rank, init_std)

        self.to_hidden = linear(dim, hidden) if hidden else None
        self.linear = linear(hidden or dim, dim)

    def forward(
        self, x: Float[Tensor, "B T D"], a: Float[Tensor, "B S A"]
    ) -> Float[Tensor, "B T D"]:
        x = x if self.norm is None else self.norm(x)
        if self.to_hidden is not None:
            x = F.gelu(self.to_hidden(x, a))
        return self.linear(x, a)
