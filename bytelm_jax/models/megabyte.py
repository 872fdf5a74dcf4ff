"""MEGABYTE: a global transformer over patches and a local one inside each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers" (arXiv
2305.07185). Axes: B batch, T bytes, N patches, P bytes per patch, D width, V vocabulary.

Where this differs from the paper: one shared key/value head (multi-query) in every attention, no
norm after the last layer, and a pad id instead of learned start embeddings (section 2.2), so that
the published checkpoints of the PyTorch reimplementation load. `in_action` replaces learned
positions by ALiBi and lets the local input see the byte before its patch (the paper's section 2.3.1
in its smallest form). A length that is not a multiple of P is padded on the right, and the padding
is cut off again. With `reset_on` each segment is a text of its own: its patches start at its first
byte, the last one is padded, and nothing of other segments is seen.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from bytelm.config import MegabyteConfig
from bytelm_jax.kernels.decode_layer import decode_layer
from bytelm_jax.kernels.decode_weights import (
    Heads,
    LayerWeights,
    as_columns,
    layer_weights,
    product_of,
)
from bytelm_jax.layers.attention import KeyValueCache, MultiQueryAttention, Scope
from bytelm_jax.layers.caches import Index, in_each_row
from bytelm_jax.layers.dropout import dropout, fold_rows
from bytelm_jax.layers.embedding import ByteEmbedding, PositionEmbedding
from bytelm_jax.layers.feedforward import FeedForward
from bytelm_jax.layers.ids import as_ids, check_ids
from bytelm_jax.layers.initializers import normal
from bytelm_jax.layers.logits import LogitsLinear
from bytelm_jax.layers.resets import (
    Layout,
    find_segment_starts,
    lay_out,
    position_in_segment,
    scope_of,
    take_once,
)
from bytelm_jax.models import megabyte_decoding
from bytelm_jax.models.interface import ByteModel, Choose, ModelOutput
from bytelm_jax.models.megabyte_decoding import ByteCache, Cache


class Block(nnx.Module):
    """Pre-norm residual block: x += attention(x); x += feedforward(x)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        init_std: float,
        rate: float,
        alibi: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.rate = rate
        self.attention = MultiQueryAttention(dim, heads, init_std, alibi, rngs=rngs)
        self.feedforward = FeedForward(dim, init_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        keys: Key[Array, " B"] | None = None,
        scope: Scope | None = None,
    ) -> Float[Array, "*batch T D"]:
        x = x + dropout(self.attention(x, scope), self.rate, fold_rows(keys, 0))
        return x + dropout(self.feedforward(x), self.rate, fold_rows(keys, 1))

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: KeyValueCache,
        index: Index | Int[Array, "B T"],
        scope: Scope | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """Cached version of `__call__`: T positions from `index` on attend to `cache`.

        Also gives the new cache.
        """
        weights = None if scope is not None else layer_weights(self, x)
        if weights is not None:
            return self._decode(x, weights, cache, index)
        attended, cache = self.attention.extend(x, cache, index, scope)
        x = x + attended
        return x + self.feedforward(x), cache

    def decode_weights(self) -> LayerWeights | None:
        """The weights as sums read them (`kernels.decode_sums`), if these compute the layer."""
        attention, feedforward = self.attention, self.feedforward
        if attention.alibi:
            return None
        first, second = attention.norm.as_stored(), feedforward.norm.as_stored()
        return LayerWeights(
            first,
            product_of(attention.to_q, attention.to_kv, norm=first),
            product_of(attention.to_out),
            second,
            product_of(feedforward.up, norm=second),
            product_of(feedforward.down),
        )

    def _decode(
        self, x: Array, weights: LayerWeights, cache: KeyValueCache, index: Index
    ) -> tuple[Array, KeyValueCache]:
        attention, first = self.attention, jnp.zeros(len(x), jnp.int32)
        at = index if isinstance(index, int) else in_each_row(index, len(x))
        heads = Heads(attention.heads, 1, attention.head_dim)
        columns = as_columns(cache.keys), as_columns(cache.values)
        x, *new = decode_layer(x, weights, "gelu", columns, at, first, None, heads)
        return x, KeyValueCache(*(part[:, 0] for part in new))


class Transformer(nnx.Module):
    """A stack of blocks without a final norm; `scope` divides rows into segments."""

    def __init__(
        self,
        dim: int,
        layers: int,
        heads: int,
        init_std: float,
        rate: float,
        alibi: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List(
            [Block(dim, heads, init_std, rate, alibi, rngs=rngs) for _ in range(layers)]
        )

    def __call__(
        self,
        x: Float[Array, "*batch T D"],
        keys: Key[Array, " B"] | None = None,
        remat: bool = False,
        scope: Scope | None = None,
    ) -> Float[Array, "*batch T D"]:
        for i, block in enumerate(self.layers):
            run = jax.checkpoint(block) if remat else block
            x = run(x, fold_rows(keys, i), scope)
        return x

    def extend(
        self,
        x: Float[Array, "B T D"],
        caches: tuple[KeyValueCache, ...],
        index: Index | Int[Array, "B T"],
        scope: Scope | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValueCache, ...]]:
        """Cached version of `__call__`: T positions from `index` on attend to `caches`.

        Also gives the new caches.
        """
        written = []
        for block, cache in zip(self.layers, caches, strict=True):
            x, cache = block.extend(x, cache, index, scope)
            written.append(cache)
        return x, tuple(written)

    def empty_caches(self, batch: int, length: int, dtype: jnp.dtype) -> tuple[KeyValueCache, ...]:
        """One empty cache per layer for `length` positions."""
        return tuple(block.attention.empty_cache(batch, length, dtype) for block in self.layers)


class Megabyte(ByteModel, nnx.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: MegabyteConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init, alibi = normal(c.init_std), c.variant == "in_action"

        def embedding(dim: int) -> ByteEmbedding:
            return ByteEmbedding(c.vocab.size, dim, c.init_std, rngs=rngs)

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, kernel_init=init, rngs=rngs)

        def transformer(dim: int, layers: int, heads: int) -> Transformer:
            return Transformer(dim, layers, heads, c.init_std, c.dropout, alibi, rngs=rngs)

        if alibi:
            self.embed = embedding(c.global_dim)
            self.embed_to_local = linear(c.global_dim, c.local_dim)
        else:
            self.global_embed = embedding(c.global_dim)
            self.global_position = PositionEmbedding(
                c.max_length, c.global_dim, c.init_std, rngs=rngs
            )
            self.local_embed = embedding(c.local_dim)
        self.global_transformer = transformer(c.global_width, c.global_layers, c.global_heads)
        self.global_to_local = linear(c.global_dim, c.local_dim)
        self.local_transformer = transformer(c.local_dim, c.local_layers, c.local_heads)
        self.to_logits = LogitsLinear(c.local_dim, c.vocab.size, kernel_init=init, rngs=rngs)

    def __call__(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits in at least float32; the compute dtype is that of the parameters.

        `ids` may have any integer dtype; one outside the vocabulary raises `ValueError` (under
        `jit`, where values are unknown, it gives NaN). `dropout_keys` holds one key per row and
        means training: dropout is on, and resets are limited by `reset_room`. `remat` recomputes
        the blocks in the backward pass instead of keeping their activations.
        """
        return self.outputs(ids, dropout_keys, remat).logits

    def outputs(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> ModelOutput:
        """Logits as from `__call__`, and no further loss.

        With resets the metric `reset_overflow` counts those that were skipped for lack of capacity.
        """
        ids = check_ids(ids, self.config.vocab.size)
        self.check_length(ids.shape[1])
        if self.config.reset_on != "none":
            return self._outputs_of_segments(ids, dropout_keys, remat)
        patch, pad = self.config.patch_size, self.config.vocab.pad_id
        batch, length = ids.shape
        count = max(1, -(-length // patch))
        padded = jnp.pad(ids, ((0, 0), (0, count * patch - length)), constant_values=pad)
        patches = padded.reshape(batch, count, patch)

        context = self.global_transformer(
            self.global_input(self.shift(patches, axis=1), 0), fold_rows(dropout_keys, 0), remat
        )
        if self.config.variant == "in_action":
            before = self.shift(padded, axis=1).reshape(batch, count, patch)
        else:
            before = self.shift(patches, axis=2)
        hidden = self.local_input(before) + self.split(context)
        hidden = self.local_transformer(hidden, fold_rows(dropout_keys, 1), remat)
        logits = self.to_logits(hidden).reshape(batch, count * patch, self.config.vocab.size)
        logits = logits[:, :length]
        return ModelOutput(logits, jnp.zeros((batch,)), {})

    def _outputs_of_segments(
        self, ids: Array, dropout_keys: Array | None, remat: bool
    ) -> ModelOutput:
        c, (batch, length) = self.config, ids.shape
        most = max(1, length)
        capacity = most if dropout_keys is None else min(most, c.reset_patches(length))
        layout = lay_out(ids, c.vocab, c.reset_on, c.patch_size, capacity)
        inputs, before = self.inputs_of_segments(layout, c.patches(length))
        context = self.global_transformer(
            inputs, fold_rows(dropout_keys, 0), remat, scope_of(layout)
        )
        hidden = self.local_input(before) + self.split(context)
        hidden = self.local_transformer(hidden, fold_rows(dropout_keys, 1), remat)
        hidden = hidden.reshape(batch, layout.bytes.shape[1], c.local_dim)
        logits = self.to_logits(take_once(hidden, layout.slots, layout.bytes))
        overflow = {"reset_overflow": layout.overflow.astype(jnp.float32)}
        return ModelOutput(logits, jnp.zeros((batch,)), overflow)

    def patch_starts(self, ids: Integer[Array | np.ndarray, "B T"]) -> Bool[Array, "B T"] | None:
        """Whether a patch starts at each byte: every `patch_size` bytes of a text."""
        segment_starts = find_segment_starts(ids, self.config.vocab, self.config.reset_on)
        return position_in_segment(segment_starts) % self.config.patch_size == 0

    # Cached decoding: `models.megabyte_decoding`.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return self.config.patch_size if self.config.reset_on == "none" else 1

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> Cache:
        """An empty cache for sequences of up to `length` bytes; `by_byte` for `extend`."""
        return megabyte_decoding.init_cache(self, batch, length, by_byte)

    def prefill(self, ids: Integer[Array | np.ndarray, "B T"], cache: Cache) -> Cache:
        """Writes the rounds of `ids`, which may be padded, into an empty cache in one pass."""
        return megabyte_decoding.prefill(self, ids, cache)

    def prefill_further(
        self, previous: Integer[Array | np.ndarray, "B T"], cache: Cache, index: Index
    ) -> Cache:
        """Writes more rounds of a prompt, from number `index` on, each after the one before it."""
        if isinstance(cache, ByteCache):
            return super().prefill_further(previous, cache, index)
        return megabyte_decoding.prefill_further(self, previous, cache, index)

    def decode_round(
        self,
        cache: Cache,
        previous: Integer[Array | np.ndarray, "B P"],
        index: Index,
        choose: Choose,
    ) -> tuple[Cache, Int[Array, "B P"]]:
        """Appends round number `index`; `previous` is the round before it (pads for the first).

        `choose(logits [B, V], i)` gives the ids [B] of the round's byte i.
        """
        if isinstance(cache, ByteCache):
            return super().decode_round(cache, previous, index, choose)
        return megabyte_decoding.decode_round(self, cache, previous, index, choose)

    def extend(
        self, before: Integer[Array | np.ndarray, "B T"], cache: ByteCache, index: Index
    ) -> tuple[Float[Array, "B T V"], ByteCache]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each (ignored before the first); the cache is one made
        `by_byte`, or that of a model that resets.
        """
        return megabyte_decoding.extend(self, before, cache, index)[:2]

    def verify(
        self, before: Integer[Array | np.ndarray, "B T"], cache: ByteCache, index: Index
    ) -> tuple[Float[Array, "B T V"], ByteCache, Int[Array, " B"]]:
        """`extend` up to the next patch; also gives how many of each row's logits hold.

        The global transformer runs for a patch that begins with the first byte alone: what is
        drafted behind the patch is seldom right, and would cost all of its layers.
        """
        return megabyte_decoding.extend(self, before, cache, index, within_patch=True)

    def start_round(
        self, cache: Any, previous: Integer[Array | np.ndarray, "B P"], index: Any
    ) -> tuple[Any, Any, Int[Array, " B"]]:
        """The part of `decode_round` before its first byte; the last value is a first `before`."""
        if self.config.reset_on != "none":
            return super().start_round(cache, previous, index)
        return megabyte_decoding.start_round(self, cache, as_ids(previous), index)

    def round_logits(
        self, state: Any, before: Int[Array, " B"], i: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], Any]:
        """The logits of a round's byte number i, after the byte `before`, and the round with it."""
        if self.config.reset_on != "none":
            return super().round_logits(state, before, i)
        return megabyte_decoding.round_logits(self, state, before, i)

    def check_length(self, length: int) -> None:
        """Raises `ValueError` if there are more bytes than learned positions."""
        limit = self.config.max_length
        if self.config.variant == "paper" and length > limit:
            raise ValueError(
                f"length={length}: this model has max_length={limit} positions; give a shorter "
                'input, or train with a larger max_length or variant="in_action"'
            )

    def shift(self, ids: Int[Array, "*batch"], axis: int) -> Int[Array, "*batch"]:
        """Shifts ids by one position along `axis`; pads enter, the last position drops out."""
        pads = jnp.full_like(jax.lax.slice_in_dim(ids, 0, 1, axis=axis), self.config.vocab.pad_id)
        rest = jax.lax.slice_in_dim(ids, 0, ids.shape[axis] - 1, axis=axis)
        return jnp.concatenate([pads, rest], axis=axis)

    def global_input(
        self, patches: Int[Array, "B N P"], start: int | Int[Array, ""]
    ) -> Float[Array, "B N W"]:
        """Embeds ids whose first byte is at position `start`: W = P·D_G features per patch."""
        batch, count, patch = patches.shape
        if self.config.variant == "in_action":
            embedded = self.embed(patches)
        else:
            positions = self.global_position(start, count * patch)
            embedded = self.global_embed(patches) + positions.reshape(1, count, patch, -1)
        return embedded.reshape(batch, count, self.config.global_width)

    def inputs_of_segments(
        self, layout: Layout, count: int
    ) -> tuple[Float[Array, "B N W"], Int[Array, "B N P"]]:
        """Input of the global stack, W = P·D_G, and the ids before each byte.

        No segment has more than `count` patches that are read.
        """
        patches, first = layout.patches, (layout.segment_positions == 0)[..., None]
        previous = jnp.where(first, self.config.vocab.pad_id, self.shift(patches, axis=1))
        before = self.shift(patches, axis=2)
        if self.config.variant == "in_action":
            before = jnp.concatenate([previous[..., -1:], patches[..., :-1]], axis=-1)
        return self.global_input_at(previous, layout.segment_positions, count), before

    def global_input_at(
        self, previous: Int[Array, "B N P"], segment_positions: Int[Array, "B N"], count: int
    ) -> Float[Array, "B N W"]:
        """Embeds preceding patches, of these `numbers` in their segments, all below `count`."""
        if self.config.variant == "in_action":
            return self.global_input(previous, 0)
        embedded = self.global_embed(previous)
        embedded = embedded.reshape(*segment_positions.shape, self.config.global_width)
        # What lies behind the longest segment is never read, but must be finite.
        segment_positions = jnp.minimum(segment_positions, count - 1)
        return embedded + self.global_position.patches(
            segment_positions, count, self.config.patch_size
        )

    def local_input(self, before: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        """Embeds the preceding bytes, D = D_L."""
        if self.config.variant == "in_action":
            return self.embed_to_local(self.embed(before))
        return self.local_embed(before)

    def share(
        self, context: Float[Array, "B T W"], offsets: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Version of `split` for one byte of each context, number `offsets` of its patch."""
        shape = (*context.shape[:-1], self.config.patch_size, self.config.global_dim)
        parts = jnp.take_along_axis(context.reshape(shape), offsets[..., None, None], axis=2)
        return self.global_to_local(parts[:, :, 0])

    def split(self, context: Float[Array, "B N W"]) -> Float[Array, "B N P D"]:
        """Each byte's share of its patch's context: W = P·D_G, D = D_L."""
        shape = (*context.shape[:-1], self.config.patch_size, self.config.global_dim)
        return self.global_to_local(context.reshape(shape))
