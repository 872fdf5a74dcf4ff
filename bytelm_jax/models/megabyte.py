"""MEGABYTE: a global transformer over patches and a local one inside each patch.

Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers"
(arXiv 2305.07185). Axes: B batch, T bytes, N patches, P bytes per patch, D width, V vocabulary.

Where this differs from the paper: one shared key/value head (multi-query) in every attention, no
norm after the last layer, and a pad id instead of learned start embeddings (section 2.2); so the
published checkpoints of the PyTorch reimplementation load. `in_action` replaces learned positions
by ALiBi and lets the local input see the byte before its patch (the paper's section 2.3.1 in its
smallest form). A length that is no multiple of P is padded on the right and cut again. With
`reset_on` each segment is a text of its own: its patches start at its first byte, the last one is
filled up with pads, and nothing is seen of other segments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer, Key

from bytelm.config import MegabyteConfig
from bytelm_jax.layers.attention import KeyValueCache, MultiQueryAttention, Scope
from bytelm_jax.layers.dropout import dropout, fold_rows
from bytelm_jax.layers.embedding import ByteEmbedding, PositionEmbedding
from bytelm_jax.layers.feedforward import FeedForward
from bytelm_jax.layers.ids import as_ids, check_ids
from bytelm_jax.layers.initializers import normal
from bytelm_jax.layers.logits import LogitsLinear
from bytelm_jax.layers.resets import Layout, ends_segment, lay_out, segment_begins, take_once
from bytelm_jax.models.interface import Choose, ModelOutput, write_at


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
    shares: Float[Array, "B S D"]
    """Each byte's share of its patch's context, those of the patch begun last included."""
    ids: Int[Array, "B I"]
    """After P pads."""
    begins: Int[Array, "B L"]
    """Where the segment of each position begins."""


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
        index: int | Int[Array, ""],
        scope: Scope | None = None,
    ) -> tuple[Float[Array, "B T D"], KeyValueCache]:
        """The same for T positions that start at `index`, with the past taken from `cache`."""
        attended, cache = self.attention.extend(x, cache, index, scope)
        x = x + attended
        return x + self.feedforward(x), cache


class Transformer(nnx.Module):
    """A stack of blocks without a final norm; `scope` cuts rows into texts (`layers.attention`)."""

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
        index: int | Int[Array, ""],
        scope: Scope | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[KeyValueCache, ...]]:
        """The same for T positions that start at `index`, with the past taken from `caches`."""
        written = []
        for block, cache in zip(self.layers, caches, strict=True):
            x, cache = block.extend(x, cache, index, scope)
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
        self.to_logits = LogitsLinear(c.local_dim, c.vocab.size, kernel_init=init, rngs=rngs)

    def __call__(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits in at least float32; the compute dtype is that of the parameters.

        `ids` may have any integer dtype; one outside the vocabulary raises `ValueError` (under
        `jit`, where values are unknown, it gives NaN). `dropout_keys` holds one key a row and means
        training: dropout is on, and resets find the room of `reset_room`. `remat` recomputes the
        blocks in the backward pass instead of keeping their activations.
        """
        return self.outputs(ids, dropout_keys, remat).logits

    def outputs(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> ModelOutput:
        """As `__call__`, and no further loss.

        With resets the metric `reset_overflow` counts those that found no room.
        """
        ids = check_ids(ids, self.config.vocab.size)
        self._check_length(ids.shape[1])
        if self.config.reset_on != "none":
            return self._outputs_of_segments(ids, dropout_keys, remat)
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

    def _outputs_of_segments(
        self, ids: Array, dropout_keys: Array | None, remat: bool
    ) -> ModelOutput:
        c, (batch, length) = self.config, ids.shape
        most = max(1, length)
        room = most if dropout_keys is None else min(most, c.reset_patches(length))
        layout = lay_out(ids, c.vocab, c.reset_on, c.patch_size, room)
        inputs, before = self._inputs_of_segments(layout, c.patches(length))
        context = self.global_transformer(
            inputs, fold_rows(dropout_keys, 0), remat, _scope_of(layout)
        )
        hidden = self._local_input(before) + self._split(context)
        hidden = self.local_transformer(hidden, fold_rows(dropout_keys, 1), remat)
        hidden = hidden.reshape(batch, layout.bytes.shape[1], -1)
        logits = self.to_logits(take_once(hidden, layout.slots, layout.bytes))
        overflow = {"reset_overflow": layout.overflow.astype(jnp.float32)}
        return ModelOutput(logits, jnp.zeros((batch,)), overflow)

    # Cached decoding: one round is one patch, the global transformer runs once a round. With resets
    # a round is one byte, and the global transformer runs where a patch begins in some row.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return self.config.patch_size if self.config.reset_on == "none" else 1

    def init_cache(self, batch: int, length: int) -> MegabyteCache | ResetCache:
        """An empty cache for sequences of up to `length` bytes."""
        self._check_length(length)
        patch, dtype = self.config.patch_size, self.to_logits.kernel[...].dtype
        if self.config.reset_on == "none":
            patches = -(-length // patch)
            return MegabyteCache(self.global_transformer.empty_caches(batch, patches, dtype))
        behind = length + patch - 1
        return ResetCache(
            self.global_transformer.empty_caches(batch, length, dtype),
            self.local_transformer.empty_caches(batch, behind, dtype),
            jnp.zeros((batch, behind, self.config.local_dim), dtype),
            jnp.full((batch, patch + length), self.config.vocab.pad_id, jnp.int32),
            jnp.zeros((batch, length), jnp.int32),
        )

    def prefill(
        self, ids: Integer[Array | np.ndarray, "B T"], cache: MegabyteCache | ResetCache
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

    def _prefill_segments(self, ids: Array, cache: ResetCache) -> ResetCache:
        c, (batch, length) = self.config, ids.shape
        # The patch that the prompt leaves unfinished needs the shares of its other bytes, too.
        behind = jnp.pad(ids, ((0, 0), (0, c.patch_size - 1)), constant_values=c.vocab.pad_id)
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

        def at_bytes(x: Array, slots: Array) -> Array:
            flat = x.reshape(batch, -1, x.shape[-1])
            return jnp.take_along_axis(flat, slots[..., None], axis=1)

        slots = layout.slots[:, :length]
        layers = jax.tree.map(lambda x: at_bytes(x, slots // c.patch_size), layers)
        local = jax.tree.map(lambda x: at_bytes(x, slots), local)
        begins = segment_begins(ids, c.vocab, c.reset_on)
        return ResetCache(
            write_at(cache.layers, layers, 0),
            write_at(cache.local, local, c.patch_size - 1),
            write_at(cache.shares, at_bytes(shares, layout.slots), 0),
            write_at(cache.ids, ids.astype(jnp.int32), c.patch_size),
            write_at(cache.begins, begins, 0),
        )

    def decode_round(
        self,
        cache: MegabyteCache | ResetCache,
        previous: Integer[Array | np.ndarray, "B P"],
        index: int | Int[Array, ""],
        choose: Choose,
    ) -> tuple[MegabyteCache | ResetCache, Int[Array, "B P"]]:
        """Appends round number `index`; `previous` is the round before it (pads for the first).

        `choose(logits [B, V], i)` gives the ids [B] of the round's byte i.
        """
        previous = as_ids(previous)
        if isinstance(cache, ResetCache):
            return self._decode_byte(cache, previous, jnp.asarray(index), choose)
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
            byte = as_ids(choose(self.to_logits(hidden)[:, 0], i))
            chosen.append(byte)
        return MegabyteCache(layers), jnp.stack(chosen, axis=1)

    def _decode_byte(
        self, cache: ResetCache, previous: Array, index: Array, choose: Choose
    ) -> tuple[ResetCache, Array]:
        c, pad = self.config, self.config.vocab.pad_id
        before = jax.lax.dynamic_index_in_dim(
            cache.begins, jnp.maximum(index - 1, 0), axis=1, keepdims=False
        )
        anew = (index == 0) | ends_segment(previous[:, 0], c.vocab, c.reset_on)
        begin = jnp.where(anew, index.astype(before.dtype), before)
        place, offset = jnp.divmod(index - begin, c.patch_size)
        cache = cache._replace(
            ids=write_at(cache.ids, previous.astype(jnp.int32), index + c.patch_size - 1),
            begins=write_at(cache.begins, begin[:, None], index),
        )
        cache = self._begin_patches(cache, begin, place, offset == 0, index)

        share = jax.lax.dynamic_slice_in_dim(cache.shares, index, 1, axis=1)
        first = anew if c.variant == "in_action" else offset == 0
        hidden = self._local_input(jnp.where(first[:, None], pad, previous)) + share
        near = _read_at(cache.local, index, c.patch_size)
        inside = jnp.arange(c.patch_size)[None, :] - (c.patch_size - 1 - offset)[:, None]
        scope = Scope((inside >= 0)[:, None, :], jnp.maximum(inside, 0))
        hidden, near = self.local_transformer.extend(hidden, near, c.patch_size - 1, scope)
        newest = jax.tree.map(lambda x: x[:, c.patch_size - 1 :], near)
        local = write_at(cache.local, newest, index + c.patch_size - 1)
        return cache._replace(local=local), as_ids(choose(self.to_logits(hidden)[:, 0], 0))[:, None]

    def _begin_patches(
        self, cache: ResetCache, begin: Array, place: Array, starts: Array, index: Array
    ) -> ResetCache:
        """Runs the patches that begin at `index`, in the rows `starts`, through the global stack.

        The other rows write keys where no patch of theirs begins, which nobody reads.
        """
        patch, pad = self.config.patch_size, self.config.vocab.pad_id

        def run() -> tuple[Array, tuple[KeyValueCache, ...]]:
            recent = jax.lax.dynamic_slice_in_dim(cache.ids, index, patch, axis=1)
            recent = jnp.where((place == 0)[:, None], pad, recent)[:, None]
            slots = jnp.arange(cache.begins.shape[1])[None, :]
            inside = slots - begin[:, None]
            seen = (inside >= 0) & (inside % patch == 0) & (slots <= index)
            scope = Scope(seen[:, None, :], jnp.maximum(inside, 0) // patch)
            inputs = self._place(recent, place[:, None], self._most_places())
            context, layers = self.global_transformer.extend(inputs, cache.layers, index, scope)
            return self._split(context)[:, 0], _read_at(layers, index, 1)

        def skip() -> tuple[Array, tuple[KeyValueCache, ...]]:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))

        shares, layers = jax.lax.cond(starts.any(), run, skip)
        kept = jax.lax.dynamic_slice_in_dim(cache.shares, index, patch, axis=1)
        shares = jnp.where(starts[:, None, None], shares, kept)
        return cache._replace(
            layers=write_at(cache.layers, layers, index),
            shares=write_at(cache.shares, shares, index),
        )

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

    def _inputs_of_segments(self, layout: Layout, count: int) -> tuple[Array, Array]:
        """Input of the global stack [B, N, P·D_G], and the ids before each byte [B, N, P]."""
        patches, first = layout.patches, (layout.places == 0)[..., None]
        previous = jnp.where(first, self.config.vocab.pad_id, self._shift(patches, axis=1))
        before = self._shift(patches, axis=2)
        if self.config.variant == "in_action":
            before = jnp.concatenate([previous[..., -1:], patches[..., :-1]], axis=-1)
        return self._place(previous, layout.places, count), before

    def _place(self, previous: Array, places: Array, count: int) -> Array:
        """[B, N, P] ids of the patches before, and numbers below `count` → [B, N, P·D_G]."""
        if self.config.variant == "in_action":
            return self._global_input(previous, 0)
        embedded = self.global_embed(previous).reshape(*places.shape, -1)
        # What lies behind the longest text is never read, but must be finite.
        places = jnp.minimum(places, count - 1)
        return embedded + self.global_position.patches(places, count, self.config.patch_size)

    def _most_places(self) -> int:
        return self.config.patches(self.config.max_length)

    def _local_input(self, before: Array) -> Array:
        """Ids of the bytes before → [..., D_L]."""
        if self.config.variant == "in_action":
            return self.embed_to_local(self.embed(before))
        return self.local_embed(before)

    def _split(self, context: Array) -> Array:
        """[B, N, P·D_G] → [B, N, P, D_L]: each byte's share of its patch's context."""
        patch = self.config.patch_size
        return self.global_to_local(context.reshape(*context.shape[:-1], patch, -1))


def _scope_of(layout: Layout) -> Scope:
    """Each patch sees itself and those before it in its segment."""
    here = layout.begins[:, :, None] == layout.begins[:, None, :]
    return Scope(here & np.tri(here.shape[1], dtype=bool)[None], layout.places)


def _read_at(rooms: Any, index: int | Array, count: int) -> Any:
    """Positions `index` … `index + count − 1` of axis 1 of every array in a tree."""
    return jax.tree.map(
        lambda room: jax.lax.dynamic_slice_in_dim(room, index, count, axis=1), rooms
    )
