"""MEGABYTE: a global transformer over patches and a local one inside each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers"
(arXiv 2305.07185). Axes: B batch, T bytes, N patches, P bytes per patch, D width, V vocabulary.
The mirror of `bytelm_jax/models/megabyte.py`, which says where this differs from the paper.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytelm.config import MegabyteConfig
from bytelm_torch.layers.attention import KeyValueCache, MultiQueryAttention, Scope
from bytelm_torch.layers.caches import Index
from bytelm_torch.layers.dropout import dropout
from bytelm_torch.layers.embedding import ByteEmbedding, PositionEmbedding
from bytelm_torch.layers.feedforward import FeedForward
from bytelm_torch.layers.ids import as_ids, check_ids
from bytelm_torch.layers.logits import LogitsLinear
from bytelm_torch.layers.resets import (
    Layout,
    find_segment_starts,
    lay_out,
    position_in_segment,
    scope_of,
    take_once,
)
from bytelm_torch.models import megabyte_decoding
from bytelm_torch.models.interface import ByteModel, Choose, ModelOutput
from bytelm_torch.models.megabyte_decoding import ByteCache, Cache


class Block(nn.Module):
    """Pre-norm residual block: x += attention(x); x += feedforward(x)."""

    def __init__(self, dim: int, heads: int, init_std: float, rate: float, alibi: bool):
        super().__init__()
        self.rate = rate
        self.attention = MultiQueryAttention(dim, heads, init_std, alibi)
        self.feedforward = FeedForward(dim, init_std)

    def forward(
        self, x: Float[Tensor, "*batch T D"], scope: Scope | None = None
    ) -> Float[Tensor, "*batch T D"]:
        x = x + dropout(self.attention(x, scope), self.rate, self.training)
        return x + dropout(self.feedforward(x), self.rate, self.training)

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        cache: KeyValueCache,
        index: Index | Int[Tensor, "B T"],
        scope: Scope | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """Cached version of `forward`: T positions from `index` on attend to `cache`.

        Also gives the new cache.
        """
        attended, cache = self.attention.extend(x, cache, index, scope)
        x = x + attended
        return x + self.feedforward(x), cache


class Transformer(nn.Module):
    """A stack of blocks without a final norm; `scope` divides rows into segments."""

    def __init__(
        self, dim: int, layers: int, heads: int, init_std: float, rate: float, alibi: bool
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            [Block(dim, heads, init_std, rate, alibi) for _ in range(layers)]
        )

    def forward(
        self, x: Float[Tensor, "*batch T D"], remat: bool = False, scope: Scope | None = None
    ) -> Float[Tensor, "*batch T D"]:
        for block in self.layers:
            x = checkpoint(block, x, scope, use_reentrant=False) if remat else block(x, scope)
        return x

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        caches: tuple[KeyValueCache, ...],
        index: Index | Int[Tensor, "B T"],
        scope: Scope | None = None,
    ) -> tuple[Float[Tensor, "B T D"], tuple[KeyValueCache, ...]]:
        """Cached version of `forward`: T positions from `index` on attend to `caches`.

        Also gives the new caches.
        """
        written = []
        for block, cache in zip(self.layers, caches, strict=True):
            x, cache = block.extend(x, cache, index, scope)  # pyright: ignore[reportCallIssue]
            written.append(cache)
        return x, tuple(written)

    def empty_caches(
        self, batch: int, length: int, dtype: torch.dtype
    ) -> tuple[KeyValueCache, ...]:
        """One empty cache per layer for `length` positions."""
        return tuple(block.attention.empty_cache(batch, length, dtype) for block in self.layers)  # pyright: ignore


class Megabyte(ByteModel, nn.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: MegabyteConfig):
        super().__init__()
        c = self.config = config
        alibi = c.variant == "in_action"

        def embedding(dim: int) -> ByteEmbedding:
            return ByteEmbedding(c.vocab.size, dim, c.init_std)

        def linear(inputs: int, outputs: int, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
            layer = kind(inputs, outputs)
            nn.init.normal_(layer.weight, std=c.init_std)
            nn.init.zeros_(layer.bias)
            return layer

        def transformer(dim: int, layers: int, heads: int) -> Transformer:
            return Transformer(dim, layers, heads, c.init_std, c.dropout, alibi)

        if alibi:
            self.embed = embedding(c.global_dim)
            self.embed_to_local = linear(c.global_dim, c.local_dim)
        else:
            self.global_embed = embedding(c.global_dim)
            self.global_position = PositionEmbedding(c.max_length, c.global_dim, c.init_std)
            self.local_embed = embedding(c.local_dim)
        self.global_transformer = transformer(c.global_width, c.global_layers, c.global_heads)
        self.global_to_local = linear(c.global_dim, c.local_dim)
        self.local_transformer = transformer(c.local_dim, c.local_layers, c.local_heads)
        self.to_logits = linear(c.local_dim, c.vocab.size, LogitsLinear)

    def forward(self, ids: Integer[Tensor, "B T"], remat: bool = False) -> Float[Tensor, "B T V"]:
        """Logits in at least float32; the compute dtype is that of the parameters.

        `ids` may have any integer dtype; one outside the vocabulary raises `ValueError`. `remat`
        recomputes the blocks in the backward pass instead of keeping their activations. In training
        mode dropout is on, and resets are limited by `reset_room`.
        """
        return self.outputs(ids, remat).logits

    def outputs(self, ids: Integer[Tensor, "B T"], remat: bool = False) -> ModelOutput:
        """Logits as from `forward`, and no further loss.

        With resets the metric `reset_overflow` counts those that were skipped for lack of capacity.
        """
        ids = check_ids(ids, self.config.vocab.size)
        self.check_length(ids.shape[1])
        if self.config.reset_on != "none":
            return self._outputs_of_segments(ids, remat)
        patch, pad = self.config.patch_size, self.config.vocab.pad_id
        batch, length = ids.shape
        count = max(1, -(-length // patch))
        padded = F.pad(ids, (0, count * patch - length), value=pad)
        patches = padded.reshape(batch, count, patch)

        context = self.global_transformer(self.global_input(self.shift(patches, axis=1), 0), remat)
        if self.config.variant == "in_action":
            before = self.shift(padded, axis=1).reshape(batch, count, patch)
        else:
            before = self.shift(patches, axis=2)
        hidden = self.local_input(before) + self.split(context)
        hidden = self.local_transformer(hidden, remat)
        logits = self.to_logits(hidden).flatten(1, 2)[:, :length]
        return ModelOutput(logits, logits.new_zeros(batch), {})

    def _outputs_of_segments(self, ids: Tensor, remat: bool) -> ModelOutput:
        c, (batch, length) = self.config, ids.shape
        most = max(1, length)
        capacity = min(most, c.reset_patches(length)) if self.training else most
        layout = lay_out(ids, c.vocab, c.reset_on, c.patch_size, capacity)
        inputs, before = self.inputs_of_segments(layout, c.patches(length))
        context = self.global_transformer(inputs, remat, scope_of(layout))
        hidden = self.local_input(before) + self.split(context)
        hidden = self.local_transformer(hidden, remat)
        hidden = hidden.reshape(batch, layout.bytes.shape[1], c.local_dim)
        logits = self.to_logits(take_once(hidden, layout.slots))
        overflow = {"reset_overflow": layout.overflow.to(torch.float32)}
        return ModelOutput(logits, logits.new_zeros(batch), overflow)

    def patch_starts(self, ids: Integer[Tensor, "B T"]) -> Bool[Tensor, "B T"] | None:
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

    def prefill(self, ids: Integer[Tensor, "B T"], cache: Cache) -> Cache:
        """Writes the rounds of `ids`, which may be padded, into an empty cache in one pass."""
        return megabyte_decoding.prefill(self, ids, cache)

    def prefill_further(
        self, previous: Integer[Tensor, "B T"], cache: Cache, index: Index
    ) -> Cache:
        """Writes more rounds of a prompt, from number `index` on, each after the one before it."""
        if isinstance(cache, ByteCache):
            return super().prefill_further(previous, cache, index)
        return megabyte_decoding.prefill_further(self, previous, cache, index)

    def decode_round(
        self,
        cache: Cache,
        previous: Integer[Tensor, "B P"],
        index: Index,
        choose: Choose,
    ) -> tuple[Cache, Int[Tensor, "B P"]]:
        """Appends round number `index`; `previous` is the round before it (pads for the first).

        `choose(logits [B, V], i)` gives the ids [B] of the round's byte i.
        """
        if isinstance(cache, ByteCache):
            return super().decode_round(cache, previous, index, choose)
        return megabyte_decoding.decode_round(self, cache, previous, index, choose)

    def extend(
        self, before: Integer[Tensor, "B T"], cache: ByteCache, index: Index
    ) -> tuple[Float[Tensor, "B T V"], ByteCache]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each (ignored before the first); the cache is one made
        `by_byte`, or that of a model that resets.
        """
        return megabyte_decoding.extend(self, before, cache, index)[:2]

    def verify(
        self, before: Integer[Tensor, "B T"], cache: ByteCache, index: Index
    ) -> tuple[Float[Tensor, "B T V"], ByteCache, Int[Tensor, " B"]]:
        """`extend` up to the next patch; also gives how many of each row's logits hold.

        The global transformer runs for a patch that begins with the first byte alone: what is
        drafted behind the patch is seldom right, and would cost all of its layers.
        """
        return megabyte_decoding.extend(self, before, cache, index, within_patch=True)

    def start_round(
        self, cache: Any, previous: Integer[Tensor, "B P"], index: Index
    ) -> tuple[Any, Any, Int[Tensor, " B"]]:
        """The part of `decode_round` before its first byte; the last value is a first `before`."""
        if self.config.reset_on != "none":
            return super().start_round(cache, previous, index)
        return megabyte_decoding.start_round(self, cache, as_ids(previous), index)

    def round_logits(
        self, state: Any, before: Int[Tensor, " B"], i: int
    ) -> tuple[Float[Tensor, "B V"], Any]:
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

    def shift(self, ids: Int[Tensor, "*batch"], axis: int) -> Int[Tensor, "*batch"]:
        """Shifts ids by one position along `axis`; pads enter, the last position drops out."""
        pads = torch.full_like(ids.narrow(axis, 0, 1), self.config.vocab.pad_id)
        return torch.cat([pads, ids.narrow(axis, 0, ids.shape[axis] - 1)], dim=axis)

    def global_input(self, patches: Int[Tensor, "B N P"], start: int) -> Float[Tensor, "B N W"]:
        """Embeds ids whose first byte is at position `start`: W = P·D_G features per patch."""
        count, patch = patches.shape[1:]
        if self.config.variant == "in_action":
            embedded = self.embed(patches)
        else:
            positions = self.global_position(start, count * patch)
            embedded = self.global_embed(patches) + positions.reshape(1, count, patch, -1)
        return embedded.flatten(2)

    def inputs_of_segments(
        self, layout: Layout, count: int
    ) -> tuple[Float[Tensor, "B N W"], Int[Tensor, "B N P"]]:
        """Input of the global stack, W = P·D_G, and the ids before each byte.

        No segment has more than `count` patches that are read.
        """
        patches, first = layout.patches, (layout.segment_positions == 0)[..., None]
        previous = torch.where(first, self.config.vocab.pad_id, self.shift(patches, axis=1))
        before = self.shift(patches, axis=2)
        if self.config.variant == "in_action":
            before = torch.cat([previous[..., -1:], patches[..., :-1]], dim=-1)
        return self.global_input_at(previous, layout.segment_positions, count), before

    def global_input_at(
        self, previous: Int[Tensor, "B N P"], segment_positions: Int[Tensor, "B N"], count: int
    ) -> Float[Tensor, "B N W"]:
        """Embeds preceding patches, of these `numbers` in their segments, all below `count`."""
        if self.config.variant == "in_action":
            return self.global_input(previous, 0)
        embedded = self.global_embed(previous).flatten(-2)
        # What lies behind the longest segment is never read, but must be finite.
        segment_positions = segment_positions.clamp(max=count - 1)
        return embedded + self.global_position.patches(
            segment_positions, count, self.config.patch_size
        )

    def local_input(self, before: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        """Embeds the preceding bytes, D = D_L."""
        if self.config.variant == "in_action":
            return self.embed_to_local(self.embed(before))
        return self.local_embed(before)

    def share(
        self, context: Float[Tensor, "B T W"], offsets: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T D"]:
        """Version of `split` for one byte of each context, number `offsets` of its patch."""
        parts = context.unflatten(-1, (self.config.patch_size, -1))
        return self.global_to_local(parts.take_along_dim(offsets[..., None, None], dim=2)[:, :, 0])

    def split(self, context: Float[Tensor, "B N W"]) -> Float[Tensor, "B N P D"]:
        """Each byte's share of its patch's context: W = P·D_G, D = D_L."""
        return self.global_to_local(context.unflatten(-1, (self.config.patch_size, -1)))
