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

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, Key

from bytelm.config import LFByteConfig
from bytelm_jax.kernels.low_precision import linears_at_once
from bytelm_jax.layers.adaptive import (
    ChannelMixing,
    TokenMixing,
    extend_running_mean,
    running_mean,
)
from bytelm_jax.layers.caches import Index, in_each_row, positions_from, write_at
from bytelm_jax.layers.dropout import dropout, fold_rows
from bytelm_jax.layers.embedding import ByteEmbedding, sinusoidal_positions, sinusoids
from bytelm_jax.layers.experts import MixtureOfExperts, Routing
from bytelm_jax.layers.ids import as_ids, check_ids
from bytelm_jax.layers.initializers import normal
from bytelm_jax.layers.logits import LogitsLinear
from bytelm_jax.layers.norm import LayerNorm
from bytelm_jax.layers.resets import (
    extend_segment_starts,
    find_segment_starts,
    pad_segment_starts,
    position_in_segment,
)
from bytelm_jax.models.interface import ByteModel, ModelOutput


class LayerCache(NamedTuple):
    """A layer's past, by position: running sums, and the convolution's inputs."""

    sums: Array
    past: Array | None


class Adaptation(NamedTuple):
    """The adaptation vector of each position, and what is computed from nothing else."""

    a: Float[Array, "B S A"]
    scales: list[Float[Array, "B S R"] | None]
    """Those of the adaptive linear layers before the experts, in order; None in the full form."""
    logits: Float[Array, "B S E"] | None
    """Those of the experts' gate."""


class LFByteCache(NamedTuple):
    """The state of cached decoding; with resets also each position's segment start, [B, L]."""

    layers: tuple[LayerCache, ...]
    segment_starts: Array | None = None


class LFByteLayer(nnx.Module):
    """Token mixing, channel mixing, experts; the three share one adaptation vector per position."""

    def __init__(self, config: LFByteConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        dim, residual = c.embed_dim, c.block == "residual"
        init = normal(c.init_std)
        rank = c.rank if c.adaptation == "low_rank" else 0
        taps = c.kernel_length if c.token_mixing == "long_conv" else 0
        rest = (c.adapt_dim, rank, residual, c.init_std)
        self.featurizer = nnx.Linear(dim, c.adapt_dim, kernel_init=init, rngs=rngs)
        self.token_mixing = TokenMixing(dim, taps, c.convolution_chunk, *rest, rngs=rngs)
        self.channel_mixing = ChannelMixing(dim, c.hidden_dim, *rest, rngs=rngs)
        self.mixture = MixtureOfExperts(
            dim, c.num_experts, c.top_k if c.sparse else 0, *rest, rngs=rngs
        )
        self.output = None if residual else nnx.Linear(dim, dim, kernel_init=init, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        keys: Key[Array, " B"] | None = None,
        segment_positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """`segment_positions` is the number of earlier positions in the same segment.

        None means that the row is one segment.
        """
        if self.config.context == "causal":
            context = running_mean(x, segment_positions)
        else:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            context = x.mean(axis=1, keepdims=True, dtype=wide).astype(x.dtype)
        read = self._read(context)
        mixed = self.token_mixing(x, read.a, segment_positions, read.scales[0])
        return self._at_each_position(self._join(x, mixed, fold_rows(keys, 0)), read, keys)

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        index: Int[Array, " B"] | None,
        segment_positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Cached version of `__call__`: T positions of each row from `index` on; None: from 0."""
        start = jnp.zeros((x.shape[0],), jnp.int32) if index is None else index
        context, sums = extend_running_mean(x, cache.sums, start, segment_positions)
        read = self._read(context)
        mixed, past = self.token_mixing.extend(
            x, read.a, cache.past, index, segment_positions, read.scales[0]
        )
        x, _ = self._at_each_position(self._join(x, mixed, None), read, None)
        return x, LayerCache(sums, past)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> LayerCache:
        """An empty cache for `length` positions."""
        wide = jnp.promote_types(dtype, jnp.float32)
        sums = jnp.zeros((batch, length + 1, self.config.embed_dim), wide)
        convolution = self.token_mixing.convolution
        past = None if convolution is None else convolution.empty_past(batch, length, dtype)
        return LayerCache(sums, past)

    def _read(self, context: Array) -> Adaptation:
        """What the layer reads of its context, [B, S, D]; its narrow products are computed as one.

        Together they read the adaptation vector once: 2.7 % of a layer of `lfbyte_130m` on an H100.
        """
        a, mixing = self.featurizer(context), self.channel_mixing
        adaptive = [self.token_mixing.linear, *filter(None, [mixing.to_hidden]), mixing.linear]
        if self.config.adaptation == "full":
            return Adaptation(a, [None] * len(adaptive), None)
        *scales, logits = linears_at_once(
            a, *(linear.adapt for linear in adaptive), self.mixture.gate
        )
        return Adaptation(a, [scale.astype(a.dtype) for scale in scales], logits)

    def _at_each_position(
        self, x: Array, read: Adaptation, keys: Array | None
    ) -> tuple[Array, Routing]:
        """The part after token mixing, which works on each position alone."""
        mixed = self.channel_mixing(x, read.a, read.scales[1:])
        x = self._join(x, mixed, fold_rows(keys, 1))
        mixed, routing = self.mixture(x, read.a, read.logits)
        x = self._join(x, mixed, fold_rows(keys, 2))
        return (x if self.output is None else self.output(x)), routing

    def _join(self, x: Array, branch: Array, keys: Array | None) -> Array:
        branch = dropout(branch, self.config.dropout, keys)
        return x + branch if self.config.block == "residual" else branch


class LFByteTransformer(ByteModel, nnx.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside.

    With `causal=False` there is no shift, and every output may depend on every id.
    """

    def __init__(self, config: LFByteConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        # Embeddings of the same magnitude as the positions that are added to them.
        self.embed = ByteEmbedding(c.vocab.size, c.embed_dim, 1.0, rngs=rngs)
        self.layers = nnx.List([LFByteLayer(c, rngs=rngs) for _ in range(c.num_layers)])
        self.norm = LayerNorm(c.embed_dim) if c.block == "residual" else None
        init = normal(c.init_std)
        self.to_logits = LogitsLinear(c.embed_dim, c.logit_width, kernel_init=init, rngs=rngs)

    def __call__(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits in at least float32; the compute dtype is that of the parameters.

        `ids` may have any integer dtype; one outside the vocabulary raises `ValueError` (under
        `jit`, where values are unknown, it gives NaN). `dropout_keys` holds one key per row and
        turns dropout on. `remat` recomputes the layers in the backward pass instead of keeping
        their activations.
        """
        return self.outputs(ids, dropout_keys, remat).logits

    def outputs(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> ModelOutput:
        """Logits as from `__call__`; with sparse experts also their balance loss and load.

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
        for i, layer in enumerate(self.layers):
            run = jax.checkpoint(layer) if remat else layer
            x, routing = run(x, fold_rows(dropout_keys, i), segment_positions)
            routings.append(routing)
        logits = self._to_logits(x)
        if not c.sparse:
            return ModelOutput(logits, jnp.zeros((ids.shape[0],)), {})
        balance = jnp.stack([routing.balance for routing in routings])
        load = jnp.stack([routing.load for routing in routings])
        metrics = {"expert_balance": balance.mean(axis=0), "expert_load_max": load.max(axis=(0, 2))}
        metrics |= {f"expert_load_{e}": load[:, :, e].mean(axis=0) for e in range(c.num_experts)}
        return ModelOutput(logits, c.balance_coefficient * balance.sum(axis=0), metrics)

    # Cached decoding: one round is one byte, and its cost does not depend on the context's length.

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> LFByteCache:
        """An empty cache for sequences of up to `length` bytes."""
        if not self.config.causal:
            raise ValueError("causal=False: this model sees later bytes; generate with causal=True")
        dtype = self.to_logits.kernel[...].dtype
        segment_starts = (
            None if self.config.reset_on == "none" else jnp.zeros((batch, length), jnp.int32)
        )
        layers = tuple(layer.empty_cache(batch, length, dtype) for layer in self.layers)
        return LFByteCache(layers, segment_starts)

    def prefill(self, ids: Integer[Array | np.ndarray, "B T"], cache: LFByteCache) -> LFByteCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads them.
        """
        ids, segment_positions = as_ids(ids), None
        if cache.segment_starts is not None:
            segment_starts = find_segment_starts(ids, self.config.vocab, self.config.reset_on)
            cache, segment_positions = (
                _with_segment_starts(cache, segment_starts, 0),
                position_in_segment(segment_starts),
            )
        _, cache = self._extend(self._shift(ids), cache, None, segment_positions)
        return cache

    def extend(
        self, before: Integer[Array | np.ndarray, "B T"], cache: LFByteCache, index: Index
    ) -> tuple[Float[Array, "B T V"], LFByteCache]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each (ignored before the first).
        """
        before, segment_positions = as_ids(before), None
        index = in_each_row(index, before.shape[0])
        positions = positions_from(index, before.shape[1])
        before = jnp.where(positions == 0, self.config.vocab.pad_id, before)
        if cache.segment_starts is not None:
            segment_starts = extend_segment_starts(
                before, index, cache.segment_starts, self.config.vocab, self.config.reset_on
            )
            cache = _with_segment_starts(cache, segment_starts, index)
            segment_positions = positions - segment_starts
        x, cache = self._extend(before, cache, index, segment_positions)
        return self._to_logits(x), cache

    def _extend(
        self, ids: Array, cache: LFByteCache, index: Array | None, segment_positions: Array | None
    ) -> tuple[Array, LFByteCache]:
        x, written = self._embed(ids, index, segment_positions), []
        for layer, past in zip(self.layers, cache.layers, strict=True):
            x, past = layer.extend(x, past, index, segment_positions)
            written.append(past)
        return x, cache._replace(layers=tuple(written))

    def _shift(self, ids: Array) -> Array:
        """Shifts ids by one position; a pad enters, the last position drops out."""
        padded = jnp.pad(ids, ((0, 0), (1, 0)), constant_values=self.config.vocab.pad_id)
        return padded[:, : ids.shape[1]]

    def _embed(self, ids: Array, start: Array | None, segment_positions: Array | None) -> Array:
        """Embeds preceding bytes, [B, T, D], with positions from `start` (0) or in segments."""
        if segment_positions is not None:
            embedded = self.embed(
                pad_segment_starts(ids, segment_positions, self.config.vocab.pad_id)
            )
            return embedded + sinusoids(segment_positions, self.config.embed_dim, embedded.dtype)
        embedded, dim = self.embed(ids), self.config.embed_dim
        if start is not None:
            positions = positions_from(start, ids.shape[1])
            return embedded + sinusoids(positions, dim, embedded.dtype)
        return embedded + sinusoidal_positions(0, ids.shape[1], dim, embedded.dtype)[None]

    def _to_logits(self, x: Array) -> Array:
        """[B, T, D] → [B, T, V]; the columns that only pad the product are cut off."""
        x = x if self.norm is None else self.norm(x)
        return self.to_logits(x)[..., : self.config.vocab.size]


def _with_segment_starts(cache: LFByteCache, segment_starts: Array, index: Index) -> LFByteCache:
    assert cache.segment_starts is not None
    segment_starts = segment_starts.astype(cache.segment_starts.dtype)
    return cache._replace(segment_starts=write_at(cache.segment_starts, segment_starts, index))
