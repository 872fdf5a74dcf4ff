"""LFByteTransformer: a stack of token mixing, channel mixing and a mixture of experts.

All are built from linear layers that adapt their weights to the input, on top of byte embeddings
with sinusoidal positions.

The family it builds on (lfm-torch 0.0.2) takes the adaptation from the mean over the whole
sequence, which shows each byte its future, mixes no information between positions, and composes
linear maps without norm, residual or nonlinearity. `LFByteConfig.original` is that model; the
defaults adapt to the running mean, convolve causally, and put each part into a pre-norm residual
branch. With `reset_on`, means, filters and positions restart at each segment; the shares of the
experts, a statistic, remain those of the row.

Axes: B batch, T bytes, D width, A adaptation width, E experts, V vocabulary, L layers.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytelm.config import LFByteConfig
from bytelm_torch.layers.adaptive import (
    ChannelMixing,
    TokenMixing,
    extend_running_mean,
    running_mean,
)
from bytelm_torch.layers.caches import Index, positions_from, write_at
from bytelm_torch.layers.dropout import dropout
from bytelm_torch.layers.embedding import ByteEmbedding, sinusoidal_positions, sinusoids
from bytelm_torch.layers.experts import MixtureOfExperts, Routing
from bytelm_torch.layers.ids import as_ids, check_ids
from bytelm_torch.layers.logits import LogitsLinear
from bytelm_torch.layers.norm import LayerNorm
from bytelm_torch.layers.resets import (
    extend_segment_starts,
    find_segment_starts,
    pad_segment_starts,
    position_in_segment,
)
from bytelm_torch.models.interface import ByteModel, ModelOutput


class LayerCache(NamedTuple):
    """A layer's past, by position: running sums, and the convolution's inputs."""

    sums: Tensor
    past: Tensor | None


class LFByteCache(NamedTuple):
    """The state of cached decoding; with resets also each position's segment start, [B, L]."""

    layers: tuple[LayerCache, ...]
    segment_starts: Tensor | None = None


class LFByteLayer(nn.Module):
    """Token mixing, channel mixing, experts; the three share one adaptation vector per position."""

    def __init__(self, config: LFByteConfig):
        super().__init__()
        c = self.config = config
        dim, residual = c.embed_dim, c.block == "residual"
        rank = c.rank if c.adaptation == "low_rank" else 0
        taps = c.kernel_length if c.token_mixing == "long_conv" else 0
        rest = (c.adapt_dim, rank, residual, c.init_std)
        self.featurizer = _linear(dim, c.adapt_dim, c.init_std)
        self.token_mixing = TokenMixing(dim, taps, c.convolution_chunk, *rest)
        self.channel_mixing = ChannelMixing(dim, c.hidden_dim, *rest)
        self.mixture = MixtureOfExperts(dim, c.num_experts, c.top_k if c.sparse else 0, *rest)
        self.output = None if residual else _linear(dim, dim, c.init_std)

    def forward(
        self, x: Float[Tensor, "B T D"], segment_positions: Int[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Routing]:
        """`segment_positions` is the number of earlier positions in the same segment.

        None means that the row is one segment.
        """
        if self.config.context == "causal":
            context = running_mean(x, segment_positions)
        else:
            wide = torch.promote_types(x.dtype, torch.float32)
            context = x.mean(dim=1, keepdim=True, dtype=wide).to(x.dtype)
        a = self.featurizer(context)
        x = self._join(x, self.token_mixing(x, a, segment_positions))
        return self._at_each_position(x, a)

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        cache: LayerCache,
        index: Index | None,
        segment_positions: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], LayerCache]:
        """Cached version of `forward`: T positions of each row from `index` on; None: from 0."""
        start = 0 if index is None else index
        context, sums = extend_running_mean(x, cache.sums, start, segment_positions)
        a = self.featurizer(context)
        mixed, past = self.token_mixing.extend(x, a, cache.past, index, segment_positions)
        x, _ = self._at_each_position(self._join(x, mixed), a)
        return x, LayerCache(sums, past)

    def empty_cache(self, batch: int, length: int, dtype: torch.dtype) -> LayerCache:
        """An empty cache for `length` positions."""
        wide = torch.promote_types(dtype, torch.float32)
        device = self.featurizer.weight.device
        shape = (batch, length + 1, self.config.embed_dim)
        convolution = self.token_mixing.convolution
        past = None if convolution is None else convolution.empty_past(batch, length, dtype)
        return LayerCache(torch.zeros(shape, dtype=wide, device=device), past)

    def _at_each_position(self, x: Tensor, a: Tensor) -> tuple[Tensor, Routing]:
        """The part after token mixing, which works on each position alone."""
        x = self._join(x, self.channel_mixing(x, a))
        mixed, routing = self.mixture(x, a)
        x = self._join(x, mixed)
        return (x if self.output is None else self.output(x)), routing

    def _join(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = dropout(branch, self.config.dropout, self.training)
        return x + branch if self.config.block == "residual" else branch


class LFByteTransformer(ByteModel, nn.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside.

    With `causal=False` there is no shift, and every output may depend on every id.
    """

    def __init__(self, config: LFByteConfig):
        super().__init__()
        c = self.config = config
        # Embeddings of the same magnitude as the positions that are added to them.
        self.embed = ByteEmbedding(c.vocab.size, c.embed_dim, 1.0)
        self.layers = nn.ModuleList([LFByteLayer(c) for _ in range(c.num_layers)])
        self.norm = LayerNorm(c.embed_dim) if c.block == "residual" else None
        self.to_logits = _linear(c.embed_dim, c.logit_width, c.init_std, LogitsLinear)

    def forward(self, ids: Integer[Tensor, "B T"], remat: bool = False) -> Float[Tensor, "B T V"]:
        """Logits in at least float32; the compute dtype is that of the parameters.

        `ids` may have any integer dtype; one outside the vocabulary raises `ValueError`. `remat`
        recomputes the layers in the backward pass instead of keeping their activations.
        """
        return self.outputs(ids, remat).logits

    def outputs(self, ids: Integer[Tensor, "B T"], remat: bool = False) -> ModelOutput:
        """Logits as from `forward`; with sparse experts also their balance loss and load.

        The extra loss is `balance_coefficient` times the sum of the layers' balance. Metrics:
        `expert_balance`, the mean over the layers (1 if even); `expert_load_<e>`, expert e's share,
        averaged likewise; `expert_load_max`, the largest share in any layer.
        """
        c = self.config
        ids = check_ids(ids, c.vocab.size)
        segment_positions = None
        if c.reset_on != "none":
            segment_positions = position_in_segment(find_segment_starts(ids, c.vocab, c.reset_on))
        x = self._embed(self._shift(ids) if c.causal else ids, None, segment_positions)
        routings = []
        for layer in self.layers:
            again = functools.partial(checkpoint, layer, use_reentrant=False)
            x, routing = (again if remat else layer)(x, segment_positions)
            routings.append(routing)
        logits = self._to_logits(x)
        if not c.sparse:
            return ModelOutput(logits, logits.new_zeros(len(ids), dtype=torch.float32), {})
        balance = torch.stack([routing.balance for routing in routings])
        load = torch.stack([routing.load for routing in routings])
        metrics = {"expert_balance": balance.mean(dim=0), "expert_load_max": load.amax(dim=(0, 2))}
        metrics |= {f"expert_load_{e}": load[:, :, e].mean(dim=0) for e in range(c.num_experts)}
        return ModelOutput(logits, c.balance_coefficient * balance.sum(dim=0), metrics)

    # Cached decoding: one round is one byte, and its cost does not depend on the context's length.

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> LFByteCache:
        """An empty cache for sequences of up to `length` bytes."""
        if not self.config.causal:
            raise ValueError("causal=False: this model sees later bytes; generate with causal=True")
        dtype = self.to_logits.weight.dtype
        layers = tuple(layer.empty_cache(batch, length, dtype) for layer in self.layers)  # pyright: ignore
        if self.config.reset_on == "none":
            return LFByteCache(layers)
        device = self.to_logits.weight.device
        return LFByteCache(layers, torch.zeros(batch, length, dtype=torch.int32, device=device))

    def prefill(self, ids: Integer[Tensor, "B T"], cache: LFByteCache) -> LFByteCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads them.
        """
        ids, segment_positions = as_ids(ids), None
        if cache.segment_starts is not None:
            segment_starts = find_segment_starts(ids, self.config.vocab, self.config.reset_on)
            write_at(cache.segment_starts, segment_starts, 0)
            segment_positions = position_in_segment(segment_starts)
        _, cache = self._extend(self._shift(ids), cache, None, segment_positions)
        return cache

    def extend(
        self, before: Integer[Tensor, "B T"], cache: LFByteCache, index: Index
    ) -> tuple[Float[Tensor, "B T V"], LFByteCache]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each (ignored before the first).
        """
        before, segment_positions = as_ids(before), None
        positions = positions_from(index, before.shape[1], before.device)
        before = before.masked_fill(positions == 0, self.config.vocab.pad_id)
        if cache.segment_starts is not None:
            segment_starts = extend_segment_starts(
                before, index, cache.segment_starts, self.config.vocab, self.config.reset_on
            )
            write_at(cache.segment_starts, segment_starts, index)
            segment_positions = positions - segment_starts
        x, cache = self._extend(before, cache, index, segment_positions)
        return self._to_logits(x), cache

    def _extend(
        self, ids: Tensor, cache: LFByteCache, index: Index | None, segment_positions: Tensor | None
    ) -> tuple[Tensor, LFByteCache]:
        x, written = self._embed(ids, index, segment_positions), []
        for layer, past in zip(self.layers, cache.layers, strict=True):
            x, past = layer.extend(x, past, index, segment_positions)  # pyright: ignore[reportCallIssue]
            written.append(past)
        return x, cache._replace(layers=tuple(written))

    def _shift(self, ids: Tensor) -> Tensor:
        """Shifts ids by one position; a pad enters, the last position drops out."""
        return F.pad(ids, (1, 0), value=self.config.vocab.pad_id)[:, : ids.shape[1]]

    def _embed(self, ids: Tensor, start: Index | None, segment_positions: Tensor | None) -> Tensor:
        """Embeds preceding bytes, [B, T, D], with positions from `start` (0) or in segments."""
        if segment_positions is not None:
            embedded = self.embed(
                pad_segment_starts(ids, segment_positions, self.config.vocab.pad_id)
            )
            return embedded + sinusoids(segment_positions, self.config.embed_dim, embedded.dtype)
        embedded, dim = self.embed(ids), self.config.embed_dim
        if start is not None:
            positions = positions_from(start, ids.shape[1], ids.device)
            return embedded + sinusoids(positions, dim, embedded.dtype)
        return embedded + sinusoidal_positions(0, ids.shape[1], dim, embedded.dtype, ids.device)

    def _to_logits(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, V]; the columns that only pad the product are cut off."""
        x = x if self.norm is None else self.norm(x)
        return self.to_logits(x)[..., : self.config.vocab.size]


def _linear(
    inputs: int, outputs: int, init_std: float, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    linear = kind(inputs, outputs)
    nn.init.normal_(linear.weight, std=init_std)
    nn.init.zeros_(linear.bias)
    return linear
