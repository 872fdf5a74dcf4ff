"""MEGABYTE: a global transformer over patches and a local one inside each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers"
(arXiv 2305.07185). Axes: B batch, T bytes, N patches, P bytes per patch, D width, V vocabulary.
The mirror of `bytelm_jax/models/megabyte.py`, which says where this differs from the paper.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytelm.config import MegabyteConfig
from bytelm_torch.layers.attention import KeyValueCache, MultiQueryAttention, Scope
from bytelm_torch.layers.dropout import dropout
from bytelm_torch.layers.embedding import ByteEmbedding, PositionEmbedding
from bytelm_torch.layers.feedforward import FeedForward
from bytelm_torch.layers.ids import as_ids, check_ids
from bytelm_torch.layers.logits import LogitsLinear
from bytelm_torch.layers.resets import Layout, ends_segment, lay_out, segment_begins, take_once
from bytelm_torch.models.interface import Choose, ModelOutput


class MegabyteCache(NamedTuple):
    """What cached decoding keeps: the global layers' keys and values, S = patches."""

    layers: tuple[KeyValueCache, ...]


class ResetCache(NamedTuple):
    """The same with `reset_on`, where each row is at its own place of its own patch.

    All by position, so that what lies ahead may hold anything. L positions, S = P − 1 + L and
    I = P + L with what comes before the first.
    """

    layers: tuple[KeyValueCache, ...]
    """The global layers' keys and values, [B, L, K]; read where a patch begins."""
    local: tuple[KeyValueCache, ...]
    """The local layers', [B, S, K], after P − 1 zeros."""
    shares: Float[Tensor, "B S D"]
    """Each byte's share of its patch's context, those of the patch begun last included."""
    ids: Int[Tensor, "B I"]
    """After P pads."""
    begins: Int[Tensor, "B L"]
    """Where the segment of each position begins."""


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
        index: int,
        scope: Scope | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """The same for T positions that start at `index`, with the past taken from `cache`."""
        attended, cache = self.attention.extend(x, cache, index, scope)
        x = x + attended
        return x + self.feedforward(x), cache


class Transformer(nn.Module):
    """A stack of blocks without a final norm; `scope` cuts rows into texts (`layers.attention`)."""

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
            x = checkpoint(block, x, scope, use_reentrant=False) if remat else block(x, scope)  # pyright: ignore[reportAssignmentType]
        return x

    def extend(
        self,
        x: Float[Tensor, "B T D"],
        caches: tuple[KeyValueCache, ...],
        index: int,
        scope: Scope | None = None,
    ) -> tuple[Float[Tensor, "B T D"], tuple[KeyValueCache, ...]]:
        """The same for T positions that start at `index`, with the past taken from `caches`."""
        written = []
        for block, cache in zip(self.layers, caches, strict=True):
            x, cache = block.extend(x, cache, index, scope)  # pyright: ignore[reportCallIssue]
            written.append(cache)
        return x, tuple(written)

    def empty_caches(
        self, batch: int, length: int, dtype: torch.dtype
    ) -> tuple[KeyValueCache, ...]:
        """One cache a layer for `length` positions."""
        return tuple(block.attention.empty_cache(batch, length, dtype) for block in self.layers)  # pyright: ignore


class Megabyte(nn.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: MegabyteConfig):
        super().__init__()
        c = self.config = config
        alibi = c.variant == "in_action"

        def embedding(dim: int) -> ByteEmbedding:
            return ByteEmbedding(c.vocab.size, dim, c.init_std)

        def linear(inputs: int, outputs: int, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
            made = kind(inputs, outputs)
            nn.init.normal_(made.weight, std=c.init_std)
            nn.init.zeros_(made.bias)
            return made

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
        mode dropout is on, and resets find the room of `reset_room`.
        """
        return self.outputs(ids, remat).logits

    def outputs(self, ids: Integer[Tensor, "B T"], remat: bool = False) -> ModelOutput:
        """As `forward`, and no further loss.

        With resets the metric `reset_overflow` counts those that found no room.
        """
        ids = check_ids(ids, self.config.vocab.size)
        self._check_length(ids.shape[1])
        if self.config.reset_on != "none":
            return self._outputs_of_segments(ids, remat)
        patch, pad = self.config.patch_size, self.config.vocab.pad_id
        batch, length = ids.shape
        count = max(1, -(-length // patch))
        padded = F.pad(ids, (0, count * patch - length), value=pad)
        patches = padded.reshape(batch, count, patch)

        context = self.global_transformer(
            self._global_input(self._shift(patches, axis=1), 0), remat
        )
        if self.config.variant == "in_action":
            before = self._shift(padded, axis=1).reshape(batch, count, patch)
        else:
            before = self._shift(patches, axis=2)
        hidden = self._local_input(before) + self._split(context)
        hidden = self.local_transformer(hidden, remat)
        logits = self.to_logits(hidden).reshape(batch, count * patch, -1)[:, :length]
        return ModelOutput(logits, logits.new_zeros(batch), {})

    def _outputs_of_segments(self, ids: Tensor, remat: bool) -> ModelOutput:
        c, (batch, length) = self.config, ids.shape
        most = max(1, length)
        room = min(most, c.reset_patches(length)) if self.training else most
        layout = lay_out(ids, c.vocab, c.reset_on, c.patch_size, room)
        inputs, before = self._inputs_of_segments(layout, c.patches(length))
        context = self.global_transformer(inputs, remat, _scope_of(layout))
        hidden = self._local_input(before) + self._split(context)
        hidden = self.local_transformer(hidden, remat)
        hidden = hidden.reshape(batch, layout.bytes.shape[1], -1)
        logits = self.to_logits(take_once(hidden, layout.slots))
        overflow = {"reset_overflow": layout.overflow.to(torch.float32)}
        return ModelOutput(logits, logits.new_zeros(batch), overflow)

    # Cached decoding: one round is one patch, the global transformer runs once a round. With resets
    # a round is one byte, and the global transformer runs where a patch begins in some row.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return self.config.patch_size if self.config.reset_on == "none" else 1

    def init_cache(self, batch: int, length: int) -> MegabyteCache | ResetCache:
        """An empty cache for sequences of up to `length` bytes."""
        self._check_length(length)
        patch, weight = self.config.patch_size, self.to_logits.weight
        if self.config.reset_on == "none":
            patches = -(-length // patch)
            return MegabyteCache(self.global_transformer.empty_caches(batch, patches, weight.dtype))
        behind = length + patch - 1
        ids = torch.full((batch, patch + length), self.config.vocab.pad_id, device=weight.device)
        return ResetCache(
            self.global_transformer.empty_caches(batch, length, weight.dtype),
            self.local_transformer.empty_caches(batch, behind, weight.dtype),
            weight.new_zeros(batch, behind, self.config.local_dim),
            ids,
            torch.zeros(batch, length, dtype=torch.int64, device=weight.device),
        )

    def prefill(
        self, ids: Integer[Tensor, "B T"], cache: MegabyteCache | ResetCache
    ) -> MegabyteCache | ResetCache:
        """Writes the rounds of `ids` into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
        ids = as_ids(ids)
        if isinstance(cache, ResetCache):
            return self._prefill_segments(ids, cache)
        patches = ids.reshape(ids.shape[0], -1, self.config.patch_size)
        inputs = self._global_input(self._shift(patches, axis=1), 0)
        _, layers = self.global_transformer.extend(inputs, cache.layers, 0)
        return MegabyteCache(layers)

    def _prefill_segments(self, ids: Tensor, cache: ResetCache) -> ResetCache:
        c, (batch, length) = self.config, ids.shape
        # The patch that the prompt leaves unfinished needs the shares of its other bytes, too.
        behind = F.pad(ids, (0, c.patch_size - 1), value=c.vocab.pad_id)
        most = behind.shape[1]
        layout = lay_out(behind, c.vocab, c.reset_on, c.patch_size, most)
        inputs, before = self._inputs_of_segments(layout, c.patches(length))
        dtype = inputs.dtype
        empty = self.global_transformer.empty_caches(batch, most, dtype)
        context, layers = self.global_transformer.extend(inputs, empty, 0, _scope_of(layout))
        shares = self._split(context)
        hidden = (self._local_input(before) + shares).reshape(batch * most, c.patch_size, -1)
        empty = self.local_transformer.empty_caches(batch * most, c.patch_size, dtype)
        _, local = self.local_transformer.extend(hidden, empty, 0)

        def at_bytes(x: Tensor, slots: Tensor) -> Tensor:
            flat = x.reshape(batch, -1, x.shape[-1])
            return flat.take_along_dim(slots[..., None], dim=1)

        slots = layout.slots[:, :length]
        for caches, made, where in (
            (cache.layers, layers, slots // c.patch_size),
            (cache.local, local, slots),
        ):
            start = c.patch_size - 1 if caches is cache.local else 0
            for rooms, values in zip(caches, made, strict=True):
                for room, value in zip(rooms, values, strict=True):
                    room[:, start : start + length] = at_bytes(value, where)
        cache.shares[:, :most] = at_bytes(shares, layout.slots)
        cache.ids[:, c.patch_size : c.patch_size + length] = ids
        cache.begins[:, :length] = segment_begins(ids, c.vocab, c.reset_on)
        return cache

    def decode_round(
        self,
        cache: MegabyteCache | ResetCache,
        previous: Integer[Tensor, "B P"],
        index: int,
        choose: Choose,
    ) -> tuple[MegabyteCache | ResetCache, Int[Tensor, "B P"]]:
        """Appends round number `index`; `previous` is the round before it (pads for the first).

        `choose(logits [B, V], i)` gives the ids [B] of the round's byte i.
        """
        previous = as_ids(previous)
        if isinstance(cache, ResetCache):
            return self._decode_byte(cache, previous, index, choose)
        batch, patch = previous.shape
        pad = self.config.vocab.pad_id
        inputs = self._global_input(previous[:, None, :], index * patch)
        context, layers = self.global_transformer.extend(inputs, cache.layers, index)
        context = self._split(context)[:, 0]
        local = self.local_transformer.empty_caches(batch, patch, context.dtype)
        first = torch.full_like(previous[:, 0], pad)
        byte = previous[:, -1] if self.config.variant == "in_action" else first
        chosen = []
        for i in range(patch):
            hidden = self._local_input(byte[:, None]) + context[:, i : i + 1]
            hidden, local = self.local_transformer.extend(hidden, local, i)
            byte = as_ids(choose(self.to_logits(hidden)[:, 0], i))
            chosen.append(byte)
        return MegabyteCache(layers), torch.stack(chosen, dim=1)

    def _decode_byte(
        self, cache: ResetCache, previous: Tensor, index: int, choose: Choose
    ) -> tuple[ResetCache, Tensor]:
        c, pad = self.config, self.config.vocab.pad_id
        anew = ends_segment(previous[:, 0], c.vocab, c.reset_on)
        anew = anew if index else torch.ones_like(anew)
        begin = torch.where(anew, index, cache.begins[:, max(index - 1, 0)])
        place, offset = (index - begin) // c.patch_size, (index - begin) % c.patch_size
        cache.ids[:, index + c.patch_size - 1] = previous[:, 0]
        cache.begins[:, index] = begin
        self._begin_patches(cache, begin, place, offset == 0, index)

        share = cache.shares[:, index : index + 1]
        first = anew if c.variant == "in_action" else offset == 0
        hidden = self._local_input(torch.where(first[:, None], pad, previous)) + share
        near = tuple(  # views: what is written there is written in the cache
            KeyValueCache(*(room[:, index : index + c.patch_size] for room in rooms))
            for rooms in cache.local
        )
        slots = torch.arange(c.patch_size, device=previous.device)[None, :]
        inside = slots - (c.patch_size - 1 - offset)[:, None]
        scope = Scope((inside >= 0)[:, None, :], inside.clamp(min=0))
        hidden, _ = self.local_transformer.extend(hidden, near, c.patch_size - 1, scope)
        return cache, as_ids(choose(self.to_logits(hidden)[:, 0], 0))[:, None]

    def _begin_patches(
        self, cache: ResetCache, begin: Tensor, place: Tensor, starts: Tensor, index: int
    ) -> None:
        """Runs the patches that begin at `index`, in the rows `starts`, through the global stack.

        The other rows write keys where no patch of theirs begins, which nobody reads.
        """
        if not bool(starts.any()):
            return
        patch, pad = self.config.patch_size, self.config.vocab.pad_id
        recent = cache.ids[:, index : index + patch]
        recent = torch.where((place == 0)[:, None], pad, recent)[:, None]
        slots = torch.arange(cache.begins.shape[1], device=begin.device)[None, :]
        inside = slots - begin[:, None]
        seen = (inside >= 0) & (inside % patch == 0) & (slots <= index)
        scope = Scope(seen[:, None, :], inside.clamp(min=0) // patch)
        inputs = self._place(recent, place[:, None], self._most_places())
        context, _ = self.global_transformer.extend(inputs, cache.layers, index, scope)
        shares = cache.shares[:, index : index + patch]
        shares[:] = torch.where(starts[:, None, None], self._split(context)[:, 0], shares)

    def _check_length(self, length: int) -> None:
        limit = self.config.max_length
        if self.config.variant == "paper" and length > limit:
            raise ValueError(
                f"length={length}: this model has max_length={limit} positions; give a shorter "
                'input, or train with a larger max_length or variant="in_action"'
            )

    def _shift(self, ids: Tensor, axis: int) -> Tensor:
        """Moves ids one step right along `axis`; pads come in, the last step drops out."""
        pads = torch.full_like(ids.narrow(axis, 0, 1), self.config.vocab.pad_id)
        return torch.cat([pads, ids.narrow(axis, 0, ids.shape[axis] - 1)], dim=axis)

    def _global_input(self, patches: Tensor, start: int) -> Tensor:
        """[B, N, P] ids whose first byte stands at position `start` → [B, N, P·D_G]."""
        batch, count, patch = patches.shape
        if self.config.variant == "in_action":
            embedded = self.embed(patches)
        else:
            positions = self.global_position(start, count * patch)
            embedded = self.global_embed(patches) + positions.reshape(1, count, patch, -1)
        return embedded.reshape(batch, count, -1)

    def _inputs_of_segments(self, layout: Layout, count: int) -> tuple[Tensor, Tensor]:
        """Input of the global stack [B, N, P·D_G], and the ids before each byte [B, N, P]."""
        patches, first = layout.patches, (layout.places == 0)[..., None]
        previous = torch.where(first, self.config.vocab.pad_id, self._shift(patches, axis=1))
        before = self._shift(patches, axis=2)
        if self.config.variant == "in_action":
            before = torch.cat([previous[..., -1:], patches[..., :-1]], dim=-1)
        return self._place(previous, layout.places, count), before

    def _place(self, previous: Tensor, places: Tensor, count: int) -> Tensor:
        """[B, N, P] ids of the patches before, and numbers below `count` → [B, N, P·D_G]."""
        if self.config.variant == "in_action":
            return self._global_input(previous, 0)
        embedded = self.global_embed(previous).flatten(-2)
        # What lies behind the longest text is never read, but must be finite.
        places = places.clamp(max=count - 1)
        return embedded + self.global_position.patches(places, count, self.config.patch_size)

    def _most_places(self) -> int:
        return self.config.patches(self.config.max_length)

    def _local_input(self, before: Tensor) -> Tensor:
        """Ids of the bytes before → [..., D_L]."""
        if self.config.variant == "in_action":
            return self.embed_to_local(self.embed(before))
        return self.local_embed(before)

    def _split(self, context: Tensor) -> Tensor:
        """[B, N, P·D_G] → [B, N, P, D_L]: each byte's share of its patch's context."""
        return self.global_to_local(context.unflatten(-1, (self.config.patch_size, -1)))


def _scope_of(layout: Layout) -> Scope:
    """Each patch sees itself and those before it in its segment."""
    here = layout.begins[:, :, None] == layout.begins[:, None, :]
    return Scope(here.tril(), layout.places)
