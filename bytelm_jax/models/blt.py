"""Byte Latent Transformer: a latent transformer over patches of bytes whose length varies.

Pagnoni et al. 2024 (arXiv 2412.09871), in the form of the published weights, which transformers
calls `BltForCausalLM`. Axes: B batch, T bytes, N patches, M vectors a patch (W together), G key
heads, K head width, D width, V vocabulary. The model runs on s = [BOS, ids[:, :-1]].

Where this differs: shapes are static, a budget bounds the patches and those past it merge into the
last; cross-attention is linear in the bytes; padding is neither patched nor hashed; entropies of a
row never see another row; boundaries inside a UTF-8 character are left out unless
`whole_characters` is off.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from bytelm_jax import patching
from bytelm_jax.config import BLTConfig
from bytelm_jax.layers.attention import KeyValueCache
from bytelm_jax.layers.cross_attention import CrossAttention
from bytelm_jax.layers.dropout import fold_rows
from bytelm_jax.layers.embedding import ByteEmbedding
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.ngram import NgramEmbedding, ngram_rows
from bytelm_jax.layers.norm import RMSNorm
from bytelm_jax.layers.segments import segment_max
from bytelm_jax.layers.transformer import Caches, Transformer
from bytelm_jax.models.entropy import (
    EntropyModel,
    begin_with,
    entropy,
    shift_right,
    write_prefix,
)
from bytelm_jax.models.interface import Choose, ModelOutput, check_ids


class BLTCache(NamedTuple):
    """What cached decoding keeps, by position in s or by patch, so that a round may be run again.

    L positions, N patches. Whatever a prefill wrote past the true prompt is written once more by
    the round of its position, or of its patch, before anything reads it.
    """

    ids: Int[Array, "B L"]
    """s behind as many −1 as the longest look back needs."""
    patches: Int[Array, "B L+1"]
    """The patch of each position, known before its byte is."""
    patcher: Caches
    encoder: Caches
    states: Float[Array, "B L D"]
    """The encoder's byte states, of which a complete patch takes the maximum."""
    pooled: KeyValueCache
    """Keys and values of those states for pooling, [B, L, G, K]."""
    global_layers: Caches
    memory: Caches
    """Keys and values of each patch's vectors for every layer of the decoder, [B, N, M, G, K]."""
    decoder: Caches
    global_calls: Int[Array, ""]
    """Rounds in which the global transformer ran."""


class Encoder(nnx.Module):
    """Bytes → byte states, and the pooling of a patch's states into M vectors."""

    def __init__(self, config: BLTConfig, *, rngs: nnx.Rngs):
        c, dim = config, config.local_dim
        self.queries = c.patch_queries
        init = fan_in_normal(dim)
        self.embed = ByteEmbedding(c.vocab.size, dim, init, rngs=rngs)
        if c.ngram_tables:
            self.ngrams = NgramEmbedding(c.ngram_tables * c.ngram_rows, dim, rngs=rngs)
        heads = (c.encoder_heads, c.encoder_kv_heads)
        sizes = (dim, c.encoder_layers, *heads, c.encoder_hidden_dim, c.local_window)
        self.transformer = Transformer(*sizes, c.rope_theta, c.dropout, rngs=rngs)
        self.to_queries = nnx.Linear(
            dim, c.patch_queries * dim, use_bias=False, kernel_init=init, rngs=rngs
        )
        self.cross_attention = CrossAttention(dim, *heads, rngs=rngs)

    def pool(
        self, states: Float[Array, "B T D"], patch_of: Int[Array, "B T"], count: int
    ) -> tuple[Float[Array, "B {count} W"], KeyValueCache]:
        """Patches of byte states, and the keys and values [B, T, G, K] that pooled them."""
        top = segment_max(states, patch_of, count)
        pooled, cache = self.cross_attention.pool(
            self._split(self.to_queries(top)), states, patch_of
        )
        return pooled.reshape(*top.shape[:2], -1), cache

    def pool_one(
        self, states: Float[Array, "B L D"], cache: KeyValueCache, mask: Bool[Array, "B L"]
    ) -> Float[Array, "B 1 W"]:
        """The same for one patch a row, whose bytes `mask` picks out of the cached ones."""
        top = jnp.where(mask[:, :, None], states, -jnp.inf).max(axis=1, keepdims=True)
        queries = self._split(self.to_queries(top))[:, 0]
        pooled = self.cross_attention.pool_one(queries, cache, mask)
        return pooled.reshape(top.shape[0], 1, -1)

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.queries, -1)


class Decoder(nnx.Module):
    """Byte states and patches → byte states that know the newest complete patch."""

    def __init__(self, config: BLTConfig, *, rngs: nnx.Rngs):
        c, dim = config, config.local_dim
        self.queries = c.patch_queries
        heads = (c.decoder_heads, c.decoder_kv_heads)
        sizes = (dim, c.decoder_layers, *heads, c.decoder_hidden_dim, c.local_window)
        self.to_memory = nnx.Linear(
            c.global_dim,
            c.patch_queries * dim,
            use_bias=False,
            kernel_init=fan_in_normal(c.global_dim),
            rngs=rngs,
        )
        self.cross_attentions = nnx.List(
            [CrossAttention(dim, *heads, rngs=rngs) for _ in range(c.decoder_layers)]
        )
        self.transformer = Transformer(*sizes, c.rope_theta, c.dropout, rngs=rngs)
        self.norm = RMSNorm(dim)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        patches: Float[Array, "B N W"],
        read_of: Int[Array, "B T"],
        keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> tuple[Float[Array, "B T D"], Caches, Caches]:
        """Also gives keys and values of the patches' vectors and of the bytes, a pair a layer."""
        turn = self.transformer.turn(jnp.arange(x.shape[1])[None, :], x.dtype)
        memory, read, written = self.split(patches), [], []
        for i, (cross, layer) in enumerate(self._layers()):
            if remat:
                cross, layer = jax.checkpoint(cross.read), jax.checkpoint(layer)
            else:
                cross = cross.read
            x, vectors = cross(x, memory, read_of)
            x, cache = layer(x, turn, fold_rows(keys, i))
            read.append(vectors)
            written.append(cache)
        return self.norm(x), tuple(read), tuple(written)

    def extend(
        self, x: Float[Array, "B 1 D"], memory: Caches, caches: Caches, index: Int[Array, ""]
    ) -> tuple[Float[Array, "B 1 D"], Caches]:
        """The same for the position `index`; `memory` holds one patch a row, [B, M, G, K]."""
        turn, written = self.transformer.turn(index[None, None], x.dtype), []
        for (cross, layer), vectors, cache in zip(self._layers(), memory, caches, strict=True):
            x, cache = layer.extend(cross.read_one(x, vectors), turn, cache, index)
            written.append(cache)
        return self.norm(x), tuple(written)

    def split(self, patches: Float[Array, "B N W"]) -> Float[Array, "B N M D"]:
        """The M vectors of each patch."""
        return self.to_memory(patches).reshape(*patches.shape[:2], self.queries, -1)

    def _layers(self) -> zip:
        return zip(self.cross_attentions, self.transformer.layers, strict=True)


class BLT(nnx.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: BLTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        if c.patcher == "entropy":
            self.patcher = EntropyModel(c.entropy, rngs=rngs)
        self.encoder = Encoder(c, rngs=rngs)
        pooled = c.patch_queries * c.local_dim
        if pooled != c.global_dim:
            self.to_global = nnx.Linear(
                pooled, c.global_dim, use_bias=False, kernel_init=fan_in_normal(pooled), rngs=rngs
            )
        heads = (c.global_heads, c.global_kv_heads)
        sizes = (c.global_dim, c.global_layers, *heads, c.global_hidden_dim, 0)
        self.global_transformer = Transformer(*sizes, c.rope_theta, c.dropout, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)
        self.to_logits = nnx.Linear(
            c.local_dim,
            c.vocab.size,
            use_bias=False,
            kernel_init=fan_in_normal(c.local_dim),
            rngs=rngs,
        )

    def __call__(
        self,
        ids: Int[Array, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits in the compute dtype, which is that of the parameters.

        `dropout_keys` holds one key a row and turns dropout on. `remat` recomputes the layers in
        the backward pass. Ids outside the vocabulary raise `ValueError` (NaN under `jit`).
        """
        return self.outputs(ids, dropout_keys, remat).logits

    def outputs(
        self,
        ids: Int[Array, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
        starts: Bool[Array, "B S"] | None = None,
    ) -> ModelOutput:
        """As `__call__`, with the metrics `patch_length` (mean, bytes) and `patch_overflow`.

        `starts`, S = T + 1, takes the place of the patcher: whether a patch starts at each position
        of s and at the byte still to come (`patching.starts_from_lengths` makes it from lengths).
        """
        c = self.config
        check_ids(ids, c.vocab.size)
        batch, length = ids.shape
        if length == 0:
            empty = jnp.zeros((batch,))
            logits = jnp.zeros((batch, 0, c.vocab.size), self.to_logits.kernel[...].dtype)
            return ModelOutput(logits, empty, {"patch_length": empty, "patch_overflow": empty})
        shifted = shift_right(ids, c.vocab.bos_id)
        if starts is None:
            starts = patching.patch_starts(c, shifted, self.entropies(shifted))
        counted = patching.present(shifted, c.vocab)
        plan = patching.plan_patches(starts, counted, c.budget(length))

        states, _ = self.encoder.transformer(
            self._embed(shifted), fold_rows(dropout_keys, 0), remat
        )
        patches, _ = self.encoder.pool(states, plan.patch_of, plan.lengths.shape[1] - 1)
        patches, _ = self.global_transformer(
            self._widen(patches), fold_rows(dropout_keys, 1), remat
        )
        x, _, _ = self.decoder(states, patches, plan.read_of, fold_rows(dropout_keys, 2), remat)
        used = (plan.lengths > 0).sum(axis=1)
        metrics = {
            "patch_length": plan.lengths.sum(axis=1) / used.astype(jnp.float32),
            "patch_overflow": plan.overflow.astype(jnp.float32),
        }
        return ModelOutput(self.to_logits(x), jnp.zeros((batch,)), metrics)

    def entropies(self, shifted: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
        """Entropy in nats of the entropy model's prediction after each position of s.

        No gradient reaches that model. None under the other patchers.
        """
        if self.config.patcher != "entropy":
            return None
        return jax.lax.stop_gradient(entropy(self.patcher.predict(shifted)))

    # Cached decoding: one round is one byte, the global transformer runs where a patch ends.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return 1

    def init_cache(self, batch: int, length: int) -> BLTCache:
        """An empty cache for sequences of up to `length` bytes."""
        c, dtype = self.config, self.to_logits.kernel[...].dtype
        local, patches = self.encoder.transformer, c.budget(length)
        head = (c.encoder_kv_heads or c.encoder_heads, c.local_dim // c.encoder_heads)
        read = (c.decoder_kv_heads or c.decoder_heads, c.local_dim // c.decoder_heads)

        def empty(*shape: int) -> KeyValueCache:
            return KeyValueCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

        memory = empty(batch, patches, c.patch_queries, *read)
        return BLTCache(
            ids=jnp.full((batch, self._look_back() - 1 + length), patching.NO_BYTE, jnp.int32),
            patches=jnp.zeros((batch, length + 1), jnp.int32),
            patcher=self.patcher.init_cache(batch, length) if c.patcher == "entropy" else (),
            encoder=local.empty_caches(batch, length, dtype),
            states=jnp.zeros((batch, length, c.local_dim), dtype),
            pooled=empty(batch, length, *head),
            global_layers=self.global_transformer.empty_caches(batch, patches, dtype),
            memory=(memory,) * c.decoder_layers,
            decoder=self.decoder.transformer.empty_caches(batch, length, dtype),
            global_calls=jnp.zeros((), jnp.int32),
        )

    def prefill(self, ids: Int[Array, "B T"], cache: BLTCache) -> BLTCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
        c, length = self.config, ids.shape[1]
        if length == 0:
            return cache
        shifted, entropies = shift_right(ids, c.vocab.bos_id), None
        patcher = cache.patcher
        if c.patcher == "entropy":
            logits, written = self.patcher.predict_cached(shifted)
            entropies, patcher = entropy(logits), write_prefix(patcher, written)
        starts = patching.patch_starts(c, shifted, entropies)
        room = cache.memory[0].keys.shape[1]
        counted = patching.present(shifted, c.vocab)
        plan = patching.plan_patches(starts, counted, min(room, length))

        states, encoder = self.encoder.transformer(self._embed(shifted))
        patches, pooled = self.encoder.pool(states, plan.patch_of, min(room, length))
        patches, global_layers = self.global_transformer(self._widen(patches))
        _, memory, decoder = self.decoder(states, patches, plan.read_of)
        first = self._look_back() - 1
        return cache._replace(
            ids=cache.ids.at[:, first : first + length].set(shifted.astype(jnp.int32)),
            patches=cache.patches.at[:, 1 : length + 1].set(plan.read_of + 1),
            patcher=patcher,
            encoder=write_prefix(cache.encoder, encoder),
            states=cache.states.at[:, :length].set(states),
            pooled=write_prefix((cache.pooled,), (pooled,))[0],
            global_layers=write_prefix(cache.global_layers, global_layers),
            memory=write_prefix(cache.memory, memory),
            decoder=write_prefix(cache.decoder, decoder),
        )

    def decode_round(
        self,
        cache: BLTCache,
        previous: Int[Array, "B 1"],
        index: int | Int[Array, ""],
        choose: Choose,
    ) -> tuple[BLTCache, Int[Array, "B 1"]]:
        """Appends byte number `index`; `previous` is the byte before it (anything at first).

        `choose(logits [B, V], 0)` gives its ids [B].
        """
        index = jnp.asarray(index)
        byte = begin_with(previous, index, self.config.vocab.bos_id)
        cache, recent = self._remember(cache, byte, index)
        cache, ends, number = self._mark(cache, byte, recent, index)

        x = self._embed_recent(byte, recent)
        x, encoder = self.encoder.transformer.extend(x, cache.encoder, index)
        new = self.encoder.cross_attention.keys_values(x)
        states, pooled = (
            write_at(room, made, index) for room, made in ((cache.states, x), (cache.pooled, new))
        )
        cache = cache._replace(encoder=encoder, states=states, pooled=pooled)
        cache = self._finish_patches(cache, ends, number, index)

        rows, newest = jnp.arange(byte.shape[0]), jnp.where(ends, number, number - 1)
        memory = jax.tree.map(lambda room: room[rows, newest], cache.memory)
        x, decoder = self.decoder.extend(x, memory, cache.decoder, index)
        chosen = choose(self.to_logits(x)[:, 0], 0)
        return cache._replace(decoder=decoder), chosen[:, None]

    def _remember(self, cache: BLTCache, byte: Array, index: Array) -> tuple[BLTCache, Array]:
        """The cache with s_index in it, and the ids that end there."""
        span = self._look_back()
        ids = write_at(cache.ids, byte.astype(jnp.int32), index + span - 1)
        return cache._replace(ids=ids), jax.lax.dynamic_slice_in_dim(ids, index, span, axis=1)

    def _mark(
        self, cache: BLTCache, byte: Array, recent: Array, index: Array
    ) -> tuple[BLTCache, Array, Array]:
        """The cache with the patch of the byte to come; whether a patch ends here; its number."""
        c, room = self.config, cache.memory[0].keys.shape[1]
        patcher, entropies = cache.patcher, None
        if c.patcher == "entropy":
            logits, patcher = self.patcher.extend(byte, patcher, index)
            entropies = entropy(logits)
        number = jax.lax.dynamic_index_in_dim(cache.patches, index, axis=1, keepdims=False)
        values = patching.to_bytes(recent[:, -patching.CONTEXT :], c.vocab)
        position = jnp.full(number.shape, index)
        starts = patching.boundary_after(c, values, position, entropies) | (index == 0)
        ends = starts & (byte[:, 0] != c.vocab.pad_id) & (number < room)
        patches = write_at(cache.patches, (number + ends)[:, None], index + 1)
        return cache._replace(patcher=patcher, patches=patches), ends, number

    def _finish_patches(
        self, cache: BLTCache, ends: Array, number: Array, index: Array
    ) -> BLTCache:
        """Runs the patches that end here through the global transformer, if any does."""
        positions = jnp.arange(cache.states.shape[1])[None, :]
        mask = (cache.patches[:, :-1] == number[:, None]) & (positions <= index)

        def run() -> tuple[Caches, Caches]:
            patch = self._widen(self.encoder.pool_one(cache.states, cache.pooled, mask))
            patch, layers = self.global_transformer.extend_rows(patch, cache.global_layers, number)
            vectors = self.decoder.split(patch)[:, 0]
            memory = tuple(cross.keys_values(vectors) for cross in self.decoder.cross_attentions)
            return layers, memory

        def skip() -> tuple[Caches, Caches]:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))

        some = ends.any()
        layers, memory = jax.lax.cond(some, run, skip)
        room = cache.memory[0].keys.shape[1]
        rows, slot = jnp.arange(number.shape[0]), jnp.where(ends, number, room)

        def put(caches: Caches, made: Caches) -> Caches:
            # A slot past the end is dropped: rows whose patch goes on write nothing.
            write = lambda room, value: room.at[rows, slot].set(value, mode="drop")  # noqa: E731
            return jax.tree.map(write, caches, made)

        return cache._replace(
            global_layers=put(cache.global_layers, layers),
            memory=put(cache.memory, memory),
            global_calls=cache.global_calls + some,
        )

    def _look_back(self) -> int:
        """Ids that patcher and hashes need up to a byte, itself included."""
        return max((patching.CONTEXT, *self.config.ngram_sizes))

    def _embed(self, shifted: Array) -> Array:
        """[B, T] ids of s → [B, T, D]; no n-gram is looked up from the first pad on."""
        x, c = self.encoder.embed(shifted), self.config
        if not c.ngram_tables:
            return x
        back = range(max(c.ngram_sizes) - 1, -1, -1)
        grams = jnp.stack([patching.shifted(shifted, n, 0) for n in back], axis=-1)
        inside = patching.present(shifted, c.vocab)[..., None]
        rows = jnp.where(inside, ngram_rows(grams, c), c.ngram_tables * c.ngram_rows)
        return x + self.encoder.ngrams(rows)

    def _embed_recent(self, byte: Array, recent: Array) -> Array:
        """The same for one position, given the ids that end there, −1 before the first."""
        x, c = self.encoder.embed(byte), self.config
        if not c.ngram_tables:
            return x
        grams = jnp.maximum(recent, 0)[:, None, -max(c.ngram_sizes) :]
        inside = (byte != c.vocab.pad_id)[..., None]
        rows = jnp.where(inside, ngram_rows(grams, c), c.ngram_tables * c.ngram_rows)
        return x + self.encoder.ngrams(rows)

    def _widen(self, patches: Array) -> Array:
        """Pooled patches → the global width."""
        wide = self.config.patch_queries * self.config.local_dim
        return patches if wide == self.config.global_dim else self.to_global(patches)


def write_at(room: Any, made: Any, index: Int[Array, ""]) -> Any:
    """`room`, an array or a tree of them, with position `index` of axis 1 overwritten."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1), room, made
    )
