"""MEGABYTE: a global transformer over patches and a local one inside each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers"
(arXiv 2305.07185). Axes: B batch, T bytes, N patches, P bytes per patch, D width, V vocabulary.
The mirror of `bytelm_jax/models/megabyte.py`, which says where this differs from the paper.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bytelm_torch.config import MegabyteConfig
from bytelm_torch.layers.attention import KeyValueCache, MultiQueryAttention
from bytelm_torch.layers.dropout import dropout
from bytelm_torch.layers.embedding import ByteEmbedding, PositionEmbedding
from bytelm_torch.layers.feedforward import FeedForward
from bytelm_torch.models.interface import Choose, ModelOutput, check_ids


class MegabyteCache(NamedTuple):
    """What cached decoding keeps: the global layers' keys and values, S = patches."""

    layers: tuple[KeyValueCache, ...]


class Block(nn.Module):
    """Pre-norm residual block: x += attention(x); x += feedforward(x)."""

    def __init__(self, dim: int, heads: int, init_std: float, rate: float, alibi: bool):
        super().__init__()
        self.rate = rate
        self.attention = MultiQueryAttention(dim, heads, init_std, alibi)
        self.feedforward = FeedForward(dim, init_std)

    def forward(self, x: Float[Tensor, "*batch T D"]) -> Float[Tensor, "*batch T D"]:
        x = x + dropout(self.attention(x), self.rate, self.training)
        return x + dropout(self.feedforward(x), self.rate, self.training)

    def extend(
        self, x: Float[Tensor, "B T D"], cache: KeyValueCache, index: int
    ) -> tuple[Float[Tensor, "B T D"], KeyValueCache]:
        """The same for T positions that start at `index`, with the past taken from `cache`."""
        attended, cache = self.attention.extend(x, cache, index)
        x = x + attended
        return x + self.feedforward(x), cache


class Transformer(nn.Module):
    """A stack of blocks without a final norm."""

    def __init__(
        self, dim: int, layers: int, heads: int, init_std: float, rate: float, alibi: bool
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            [Block(dim, heads, init_std, rate, alibi) for _ in range(layers)]
        )

    def forward(
        self, x: Float[Tensor, "*batch T D"], remat: bool = False
    ) -> Float[Tensor, "*batch T D"]:
        for block in self.layers:
            x = checkpoint(block, x, use_reentrant=False) if remat else block(x)  # pyright: ignore[reportAssignmentType]
        return x

    def extend(
        self, x: Float[Tensor, "B T D"], caches: tuple[KeyValueCache, ...], index: int
    ) -> tuple[Float[Tensor, "B T D"], tuple[KeyValueCache, ...]]:
        """The same for T positions that start at `index`, with the past taken from `caches`."""
        written = []
        for block, cache in zip(self.layers, caches, strict=True):
            x, cache = block.extend(x, cache, index)  # pyright: ignore[reportCallIssue]
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

        def linear(inputs: int, outputs: int) -> nn.Linear:
            made = nn.Linear(inputs, outputs)
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
        self.to_logits = linear(c.local_dim, c.vocab.size)

    def forward(self, ids: Int[Tensor, "B T"], remat: bool = False) -> Float[Tensor, "B T V"]:
        """Logits in the compute dtype, which is that of the parameters.

        `remat` recomputes the blocks in the backward pass instead of keeping their activations.
        Ids outside the vocabulary raise `ValueError`.
        """
        return self.outputs(ids, remat).logits

    def outputs(self, ids: Int[Tensor, "B T"], remat: bool = False) -> ModelOutput:
        """As `forward`; this architecture adds no loss and no metrics."""
        check_ids(ids, self.config.vocab.size)
        self._check_length(ids.shape[1])
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

    # Cached decoding: one round is one patch, the global transformer runs once a round.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return self.config.patch_size

    def init_cache(self, batch: int, length: int) -> MegabyteCache:
        """An empty cache for sequences of up to `length` bytes."""
        self._check_length(length)
        dtype = self.to_logits.weight.dtype
        patches = -(-length // self.config.patch_size)
        return MegabyteCache(self.global_transformer.empty_caches(batch, patches, dtype))

    def prefill(self, ids: Int[Tensor, "B T"], cache: MegabyteCache) -> MegabyteCache:
        """Writes the patches of `ids`, T a multiple of P, into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
        patches = ids.reshape(ids.shape[0], -1, self.config.patch_size)
        inputs = self._global_input(self._shift(patches, axis=1), 0)
        _, layers = self.global_transformer.extend(inputs, cache.layers, 0)
        return MegabyteCache(layers)

    def decode_round(
        self, cache: MegabyteCache, previous: Int[Tensor, "B P"], index: int, choose: Choose
    ) -> tuple[MegabyteCache, Int[Tensor, "B P"]]:
        """Appends patch number `index`; `previous` is the patch before it (pads for the first).

        `choose(logits [B, V], i)` gives the ids [B] of the patch's byte i.
        """
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
            byte = choose(self.to_logits(hidden)[:, 0], i)
            chosen.append(byte)
        return MegabyteCache(layers), torch.stack(chosen, dim=1)

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

    def _local_input(self, before: Tensor) -> Tensor:
        """Ids of the bytes before → [..., D_L]."""
        if self.config.variant == "in_action":
            return self.embed_to_local(self.embed(before))
        return self.local_embed(before)

    def _split(self, context: Tensor) -> Tensor:
        """[B, N, P·D_G] → [B, N, P, D_L]: each byte's share of its patch's context."""
        return self.global_to_local(context.unflatten(-1, (self.config.patch_size, -1)))
