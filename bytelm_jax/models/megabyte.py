"""MEGABYTE: a global transformer over patches and a local one inside each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers"
(arXiv 2305.07185). Axes: B batch, T bytes, N patches, P bytes per patch, D width, V vocabulary.

Where this differs from the paper: one shared key/value head (multi-query) in every attention, no
norm after the last layer, and a pad id instead of learned start embeddings (section 2.2); so the
published checkpoints of the PyTorch reimplementation load. `in_action` replaces learned positions
by ALiBi and lets the local input see the byte before its patch (the paper's section 2.3.1 in its
smallest form). A length that is no multiple of P is padded on the right and cut again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from bytelm_jax.config import MegabyteConfig
from bytelm_jax.layers.attention import KeyValueCache, MultiQueryAttention
from bytelm_jax.layers.dropout import dropout, fold_rows
from bytelm_jax.layers.embedding import ByteEmbedding, PositionEmbedding
from bytelm_jax.layers.feedforward import FeedForward
from bytelm_jax.layers.initializers import normal
from bytelm_jax.models.interface import Choose, ModelOutput, check_ids


class MegabyteCache(NamedTuple):
    """What cached decoding keeps: the global layers' keys and values, S = patches."""

    layers: tuple[KeyValueCache, ...]


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
        self, x: Float[Array, "*batch T D"], keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "*batch T D"]:
        x = x + dropout(self.attention(x), self.rate, fold_rows(keys, 0))
        return x + dropout(self.feedforward(x), self.rate, fold_rows(keys, 1))

    def extend(
        self, x: Float[Array, "B T D"], cache: KeyValueCache, index: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """The same for T positions that start at `index`, with the past taken from `cache`."""
        attended, cache = self.attention.extend(x, cache, index)
        x = x + attended
        return x + self.feedforward(x), cache


class Transformer(nnx.Module):
    """A stack of blocks without a final norm."""

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
    ) -> Float[Array, "*batch T D"]:
        for i, block in enumerate(self.layers):
            run = jax.checkpoint(block) if remat else block
            x = run(x, fold_rows(keys, i))
        return x

    def extend(
        self,
        x: Float[Array, "B T D"],
        caches: tuple[KeyValueCache, ...],
        index: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValueCache, ...]]:
        """The same for T positions that start at `index`, with the past taken from `caches`."""
        written = []
        for block, cache in zip(self.layers, caches, strict=True):
            x, cache = block.extend(x, cache, index)
            written.append(cache)
        return x, tuple(written)

    def empty_caches(self, batch: int, length: int, dtype: jnp.dtype) -> tuple[KeyValueCache, ...]:
        """One cache a layer for `length` positions."""
        return tuple(block.attention.empty_cache(batch, length, dtype) for block in self.layers)


class Megabyte(nnx.Module):
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
        self.to_logits = linear(c.local_dim, c.vocab.size)

    def __call__(
        self,
        ids: Int[Array, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits in the compute dtype, which is that of the parameters.

        `dropout_keys` holds one key a row and turns dropout on. `remat` recomputes the blocks in
        the backward pass instead of keeping their activations. Ids outside the vocabulary raise
        `ValueError` (under `jit`, where values are unknown, they give NaN).
        """
        return self.outputs(ids, dropout_keys, remat).logits

    def outputs(
        self,
        ids: Int[Array, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> ModelOutput:
        """As `__call__`; this architecture adds no loss and no metrics."""
        check_ids(ids, self.config.vocab.size)
        self._check_length(ids.shape[1])
        patch, pad = self.config.patch_size, self.config.vocab.pad_id
        batch, length = ids.shape
        count = max(1, -(-length // patch))
        padded = jnp.pad(ids, ((0, 0), (0, count * patch - length)), constant_values=pad)
        patches = padded.reshape(batch, count, patch)

        context = self.global_transformer(
            self._global_input(self._shift(patches, axis=1), 0), fold_rows(dropout_keys, 0), remat
        )
        if self.config.variant == "in_action":
            before = self._shift(padded, axis=1).reshape(batch, count, patch)
        else:
            before = self._shift(patches, axis=2)
        hidden = self._local_input(before) + self._split(context)
        hidden = self.local_transformer(hidden, fold_rows(dropout_keys, 1), remat)
        logits = self.to_logits(hidden).reshape(batch, count * patch, -1)[:, :length]
        return ModelOutput(logits, jnp.zeros((batch,)), {})

    # Cached decoding: one round is one patch, the global transformer runs once a round.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return self.config.patch_size

    def init_cache(self, batch: int, length: int) -> MegabyteCache:
        """An empty cache for sequences of up to `length` bytes."""
        self._check_length(length)
        dtype = self.to_logits.kernel[...].dtype
        patches = -(-length // self.config.patch_size)
        return MegabyteCache(self.global_transformer.empty_caches(batch, patches, dtype))

    def prefill(self, ids: Int[Array, "B T"], cache: MegabyteCache) -> MegabyteCache:
        """Writes the patches of `ids`, T a multiple of P, into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
        patches = ids.reshape(ids.shape[0], -1, self.config.patch_size)
        inputs = self._global_input(self._shift(patches, axis=1), 0)
        _, layers = self.global_transformer.extend(inputs, cache.layers, 0)
        return MegabyteCache(layers)

    def decode_round(
        self,
        cache: MegabyteCache,
        previous: Int[Array, "B P"],
        index: int | Int[Array, ""],
        choose: Choose,
    ) -> tuple[MegabyteCache, Int[Array, "B P"]]:
        """Appends patch number `index`; `previous` is the patch before it (pads for the first).

        `choose(logits [B, V], i)` gives the ids [B] of the patch's byte i.
        """
        batch, patch = previous.shape
        pad = self.config.vocab.pad_id
        inputs = self._global_input(previous[:, None, :], index * patch)
        context, layers = self.global_transformer.extend(inputs, cache.layers, index)
        context = self._split(context)[:, 0]
        local = self.local_transformer.empty_caches(batch, patch, context.dtype)
        first = jnp.full_like(previous[:, 0], pad)
        byte = previous[:, -1] if self.config.variant == "in_action" else first
        chosen = []
        for i in range(patch):
            hidden = self._local_input(byte[:, None]) + context[:, i : i + 1]
            hidden, local = self.local_transformer.extend(hidden, local, i)
            byte = choose(self.to_logits(hidden)[:, 0], i)
            chosen.append(byte)
        return MegabyteCache(layers), jnp.stack(chosen, axis=1)

    def _check_length(self, length: int) -> None:
        limit = self.config.max_length
        if self.config.variant == "paper" and length > limit:
            raise ValueError(
                f"length={length}: this model has max_length={limit} positions; give a shorter "
                'input, or train with a larger max_length or variant="in_action"'
            )

    def _shift(self, ids: Array, axis: int) -> Array:
        """Moves ids one step right along `axis`; pads come in, the last step drops out."""
        pads = jnp.full_like(jax.lax.slice_in_dim(ids, 0, 1, axis=axis), self.config.vocab.pad_id)
        kept = jax.lax.slice_in_dim(ids, 0, ids.shape[axis] - 1, axis=axis)
        return jnp.concatenate([pads, kept], axis=axis)

    def _global_input(self, patches: Array, start: int | Array) -> Array:
        """[B, N, P] ids whose first byte stands at position `start` → [B, N, P·D_G]."""
        batch, count, patch = patches.shape
        if self.config.variant == "in_action":
            embedded = self.embed(patches)
        else:
            positions = self.global_position(start, count * patch)
            embedded = self.global_embed(patches) + positions.reshape(1, count, patch, -1)
        return embedded.reshape(batch, count, -1)

    def _local_input(self, before: Array) -> Array:
        """Ids of the bytes before → [..., D_L]."""
        if self.config.variant == "in_action":
            return self.embed_to_local(self.embed(before))
        return self.local_embed(before)

    def _split(self, context: Array) -> Array:
        """[B, N, P·D_G] → [B, N, P, D_L]: each byte's share of its patch's context."""
        patch = self.config.patch_size
        return self.global_to_local(context.reshape(*context.shape[:-1], patch, -1))
