"""Byte Latent Transformer: a latent transformer over patches of bytes whose length varies.

Pagnoni et al. 2024 (arXiv 2412.09871), in the form of the published weights, which transformers
calls `BltForCausalLM`. Axes: B batch, T bytes, N patches, M vectors a patch (W together), G key
heads, K head width, D width, V vocabulary. The model runs on s = [BOS, ids[:, :-1]].

Where this differs: shapes are static, a budget bounds the patches and those past it merge into the
last; cross-attention is linear in the bytes; padding is neither patched nor hashed; entropies of a
row never see another row; boundaries inside a UTF-8 character are left out unless
`whole_characters` is off.

With `reset_on` the text falls into segments, each a text of its own with its own BOS and patches:
`begins` holds, wherever it appears, the first position (or patch) of each one's segment, and is
None where all is one text.

Bytropix is the same skeleton with other parts, each a field of the configuration: patches by the
entropy of byte histograms, splines, entropy-guided attention, sinusoidal positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from bytelm.config import BLTConfig
<<<<<<< HEAD
from bytelm_jax.kernels.segment_sum import segment_sum
from bytelm_jax.layers.attention import KeyValueCache
=======
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
from bytelm_jax.layers.dropout import fold_rows
from bytelm_jax.layers.embedding import sinusoids
from bytelm_jax.layers.ids import check_ids
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.logits import LogitsLinear
from bytelm_jax.layers.ngram import ngram_rows
<<<<<<< HEAD
from bytelm_jax.layers.transformer import Caches, Transformer, position_in, positions_in
from bytelm_jax.models import patching
=======
from bytelm_jax.layers.segments import segment_sum
from bytelm_jax.layers.transformer import Transformer, positions_in
from bytelm_jax.models import blt_decoding, patching
from bytelm_jax.models.blt_decoding import BLTCache
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
from bytelm_jax.models.blt_local import Decoder, Encoder
from bytelm_jax.models.entropy import EntropyModel, begins_of, entropy, shift_right
from bytelm_jax.models.interface import Choose, ModelOutput


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
        kind = (c.rotation_base, c.dropout, c.feedforward, c.entropy_attention)
        self.global_transformer = Transformer(*sizes, *kind, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)
        self.to_logits = LogitsLinear(
            c.local_dim,
            c.vocab.size,
            use_bias=False,
            kernel_init=fan_in_normal(c.local_dim),
            rngs=rngs,
        )

    def __call__(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits in at least float32; the compute dtype is that of the parameters.

        `ids` may have any integer dtype; one outside the vocabulary raises `ValueError` (under
        `jit`, where values are unknown, it gives NaN). `dropout_keys` holds one key a row and turns
        dropout on. `remat` recomputes the layers in the backward pass.
        """
        return self.outputs(ids, dropout_keys, remat).logits

    def outputs(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
        starts: Bool[Array, "B S"] | None = None,
    ) -> ModelOutput:
        """As `__call__`, with the metrics `patch_length` (mean, bytes) and `patch_overflow`.

        A model that reads histograms adds `histogram_entropy` (mean, bits).

        `starts`, S = T + 1, takes the place of the patcher: whether a patch starts at each position
        of s and at the byte still to come (`patching.starts_from_lengths` makes it from lengths).
        """
        c = self.config
        ids = check_ids(ids, c.vocab.size)
        batch, length = ids.shape
        if length == 0:
            empty = jnp.zeros((batch,))
            logits = jnp.zeros((batch, 0, c.vocab.size), self.to_logits.kernel[...].dtype)
            names = ("patch_length", "patch_overflow")
            names += ("histogram_entropy",) * c.reads_histograms
            return ModelOutput(logits, empty, dict.fromkeys(names, empty))
        begins = begins_of(ids, c)
        shifted = shift_right(ids, c.vocab.bos_id, begins)
        if starts is None:
            starts = patching.patch_starts(c, shifted, self.entropies(shifted, begins), begins)
        counted = patching.present(shifted, c.vocab, begins)
        plan = patching.plan_patches(starts, counted, c.budget(length), begins)

        states, _ = self.encoder.transformer(
            self.embed(shifted, begins), fold_rows(dropout_keys, 0), remat, begins=begins
        )
        patches, _ = self.encoder.pool(states, plan.patch_of, plan.lengths.shape[1] - 1)
        histograms = self.histograms(shifted, counted, begins)
        patches, _ = self.global_transformer(
            self.widen(patches),
            fold_rows(dropout_keys, 1),
            remat,
<<<<<<< HEAD
            self._patch_entropy(histograms, shifted, plan, patches.dtype),
=======
            self.unrest(histograms, shifted, plan, patches.dtype),
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
            plan.begins,
        )
        x, _, _ = self.decoder(
            states, patches, plan.read_of, fold_rows(dropout_keys, 2), remat, begins
        )
        used = (plan.lengths > 0).sum(axis=1)
        metrics = {
            "patch_length": plan.lengths.sum(axis=1) / used.astype(jnp.float32),
            "patch_overflow": plan.overflow.astype(jnp.float32),
        }
        if c.reads_histograms:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            bits = (histograms.astype(wide) / patching.BIT).sum(axis=1)
            metrics["histogram_entropy"] = bits / counted.sum(axis=1)
        return ModelOutput(self.to_logits(x), jnp.zeros((batch,)), metrics)

    def entropies(
        self, shifted: Int[Array, "B T"], begins: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T"] | None:
        """Entropy in nats of the entropy model's prediction after each position of s.

        No gradient reaches that model. None under the other patchers.
        """
        if self.config.patcher != "entropy":
            return None
        return jax.lax.stop_gradient(entropy(self.patcher.predict(shifted, begins)))

    # Cached decoding: `models.blt_decoding`.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return 1

    def init_cache(self, batch: int, length: int) -> BLTCache:
        """An empty cache for sequences of up to `length` bytes."""
        return blt_decoding.init_cache(self, batch, length)

    def prefill(self, ids: Integer[Array | np.ndarray, "B T"], cache: BLTCache) -> BLTCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
<<<<<<< HEAD
        c, length = self.config, ids.shape[1]
        if length == 0:
            return cache
        begins, entropies = begins_of(ids, c), None
        shifted, patcher = shift_right(ids, c.vocab.bos_id, begins), cache.patcher
        if c.patcher == "entropy":
            logits, written = self.patcher.predict_cached(shifted, begins)
            entropies, patcher = entropy(logits), write_prefix(patcher, written)
        starts = patching.patch_starts(c, shifted, entropies, begins)
        room = cache.memory.shape[1]
        counted = patching.present(shifted, c.vocab, begins)
        plan = patching.plan_patches(starts, counted, min(room, length), begins)

        embedded = self._embed(shifted, begins)
        states, encoder = self.encoder.transformer(embedded, begins=begins)
        patches, pooled = self.encoder.pool(states, plan.patch_of, min(room, length))
        histograms = self._histograms(shifted, counted, begins)
        patch_entropy = self._patch_entropy(histograms, shifted, plan, patches.dtype)
        patches, global_layers = self.global_transformer(
            self._widen(patches), patch_entropy=patch_entropy, begins=plan.begins
        )
        _, memory, decoder = self.decoder(states, patches, plan.read_of, begins=begins)
        first = self._look_back() - 1
        return cache._replace(
            ids=cache.ids.at[:, first : first + length].set(shifted.astype(jnp.int32)),
            begins=write_begins(cache.begins, begins),
            patches=cache.patches.at[:, : length + 1].set(plan.numbers),
            histograms=cache.histograms.at[:, : histograms.shape[1]].set(histograms),
            patcher=patcher,
            encoder=write_prefix(cache.encoder, encoder),
            states=cache.states.at[:, :length].set(states),
            pooled=write_prefix((cache.pooled,), (pooled,))[0],
            global_layers=write_at(cache.global_layers, pack(global_layers, 2), 0),
            memory=write_at(cache.memory, pack(memory, 2), 0),
            decoder=write_prefix(cache.decoder, decoder),
        )
=======
        return blt_decoding.prefill(self, ids, cache)
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)

    def decode_round(
        self,
        cache: BLTCache,
        previous: Integer[Array | np.ndarray, "B 1"],
        index: int | Int[Array, ""],
        choose: Choose,
    ) -> tuple[BLTCache, Int[Array, "B 1"]]:
        """Appends byte number `index`; `previous` is the byte before it (anything at first).

        `choose(logits [B, V], 0)` gives its ids [B].
        """
        return blt_decoding.decode_round(self, cache, previous, index, choose)

<<<<<<< HEAD
        x = self._embed_recent(byte, recent, index, begin)
        x, encoder = self.encoder.transformer.extend(x, cache.encoder, index, begin)
        new = self.encoder.cross_attention.keys_values(x)
        states, pooled = (
            write_at(room, made, index) for room, made in ((cache.states, x), (cache.pooled, new))
        )
        cache = cache._replace(encoder=encoder, states=states, pooled=pooled)
        cache = self._finish_patches(cache, ends, number, first, index)
        memory = self._newest(cache, jnp.where(ends, number, number - 1), first)
        x, decoder = self.decoder.extend(x, memory, cache.decoder, index, begin)
        chosen = as_ids(choose(self.to_logits(x)[:, 0], 0))
        return cache._replace(decoder=decoder), chosen[:, None]

    def _remember(
        self, cache: BLTCache, byte: Array, index: Array, begin: Array | None
    ) -> tuple[BLTCache, Array]:
        """The cache with s_index in it, and the ids of its segment that end there."""
        c, span = self.config, self._look_back()
        ids = write_at(cache.ids, byte.astype(jnp.int32), index + span - 1)
        recent = jax.lax.dynamic_slice_in_dim(ids, index, span, axis=1)
        if begin is not None:
            own = index + jnp.arange(1 - span, 1)[None, :] >= begin[:, None]
            recent = jnp.where(own, recent, patching.NO_BYTE)
        histograms = cache.histograms
        if c.reads_histograms:
            values = patching.to_bytes(recent[:, -patching.WINDOWS[-1] :], c.vocab)
            found = jnp.where(byte[:, 0] == c.vocab.pad_id, 0, patching.histogram_entropy(values))
            histograms = write_at(histograms, found[:, None], index)
        return cache._replace(ids=ids, histograms=histograms), recent

    def _mark(
        self, cache: BLTCache, byte: Array, recent: Array, index: Array, begin: Array | None
    ) -> tuple[BLTCache, Array, Array, Array | None]:
        """The cache with the patch of the byte to come; whether a patch ends here; its number.

        And, where texts start anew, the number of the segment's first patch.
        """
        c, room = self.config, cache.memory.shape[1]
        patcher, entropies, summed = cache.patcher, None, None
        if c.patcher == "entropy":
            logits, patcher = self.patcher.extend(byte, patcher, index, begin)
            entropies = entropy(logits)
        number = jax.lax.dynamic_index_in_dim(cache.patches, index, axis=1, keepdims=False)
        position, first = jnp.full(number.shape, index), None
        if begin is not None:
            # A segment begins with a patch, whatever the patcher said before it.
            before = jnp.take(cache.patches, jnp.maximum(index - 1, 0), axis=1)
            anew = jnp.minimum(before + 1, room)
            number = jnp.where((begin == index) & (index > 0), anew, number)
            cache = cache._replace(patches=write_at(cache.patches, number[:, None], index))
            first = jnp.take_along_axis(cache.patches, begin[:, None], axis=1)[:, 0]
            position = position - begin
        if c.patcher == "histogram":
            mask = self._in_patch(cache, number, index)
            summed = jnp.where(mask, cache.histograms, 0).sum(axis=1)
        values = patching.to_bytes(recent[:, -patching.CONTEXT :], c.vocab)
        starts = patching.boundary_after(c, values, position, entropies, summed) | (position == 0)
        ends = starts & (byte[:, 0] != c.vocab.pad_id) & (number < room)
        patches = write_at(cache.patches, (number + ends)[:, None], index + 1)
        return cache._replace(patcher=patcher, patches=patches), ends, number, first

    def _finish_patches(
        self, cache: BLTCache, ends: Array, number: Array, first: Array | None, index: Array
    ) -> BLTCache:
        """Runs the patches that end here through the global transformer, if any does."""
        mask = self._in_patch(cache, number, index)
        batch, room = cache.memory.shape[:2]

        def run() -> tuple[Array, Array]:
            patch = self._widen(self.encoder.pool_one(cache.states, cache.pooled, mask))
            patch_entropy = self._patch_entropy_of(cache, mask, patch.dtype)
            like = self.global_transformer.empty_caches(batch, room, patch.dtype)
            layers = unpack(cache.global_layers, like)
            patch, made = self.global_transformer.extend_rows(
                patch, layers, number, patch_entropy, first
            )
            vectors = self.decoder.split(patch)[:, 0]
            read = tuple(cross.keys_values(vectors) for cross in self.decoder.cross_attentions)
            return pack(made, 1), pack(read, 1)

        def skip() -> tuple[Array, Array]:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run))

        some = ends.any()
        layers, memory = jax.lax.cond(some, run, skip)
        rows, slot = jnp.arange(batch), jnp.where(ends, number, room)
        # A slot past the end is dropped: rows whose patch goes on write nothing.
        return cache._replace(
            global_layers=cache.global_layers.at[rows, slot].set(layers, mode="drop"),
            memory=cache.memory.at[rows, slot].set(memory, mode="drop"),
            global_calls=cache.global_calls + some,
        )

    def _newest(self, cache: BLTCache, newest: Array, first: Array | None) -> Caches:
        """Keys and values of the patch `newest` of each row, zeros if its segment has none yet."""
        if first is not None:
            # A row in a segment that began past the budget reads past the end, and so zeros.
            room = cache.memory.shape[1]
            newest = jnp.where(first < room, newest, room)
        rows = jnp.arange(newest.shape[0])
        read = cache.memory.at[rows, newest].get(mode="fill", fill_value=0)
        return unpack(read, self._empty_memory((1,), read.dtype))

    def _empty_memory(self, lead: tuple[int, ...], dtype: jnp.dtype) -> Caches:
        """Keys and values of patches' vectors for each layer of the decoder, [*lead, M, G, K]."""
        c = self.config
        read = (c.decoder_kv_heads or c.decoder_heads, c.local_dim // c.decoder_heads)
        empty = jnp.zeros((*lead, c.patch_queries, *read), dtype)
        return (KeyValueCache(empty, empty),) * c.decoder_layers

    def _in_patch(self, cache: BLTCache, number: Array, index: Array) -> Bool[Array, "B L"]:
        """The positions up to `index` that belong to the patch `number` of each row."""
        positions = jnp.arange(cache.states.shape[1])[None, :]
        return (cache.patches[:, :-1] == number[:, None]) & (positions <= index)

    def _histograms(
        self, shifted: Array, counted: Array, begins: Array | None
=======
    def histograms(
        self,
        shifted: Int[Array, "B T"],
        counted: Bool[Array, "B T"],
        begins: Int[Array, "B T"] | None,
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
    ) -> Int[Array, "B M"]:
        """`patching.histogram_entropy` of each position, 0 for padding; M = 0 if not read."""
        if not self.config.reads_histograms:
            return jnp.zeros((shifted.shape[0], 0), jnp.int32)
        recent = patching.recent_bytes(shifted, self.config.vocab, patching.WINDOWS[-1], begins)
        return jnp.where(counted, patching.histogram_entropy(recent), 0)

<<<<<<< HEAD
    def _patch_entropy(
        self, histograms: Array, shifted: Array, plan: patching.PatchPlan, dtype: jnp.dtype
=======
    def unrest(
        self,
        histograms: Int[Array, "B M"],
        shifted: Int[Array, "B T"],
        plan: patching.PatchPlan,
        dtype: jnp.dtype,
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
    ) -> Float[Array, "B N"] | None:
        """Mean histogram entropy of each patch's bytes, as a part of the largest, log2 7."""
        if not self.config.entropy_attention:
            return None
        wide, count = jnp.promote_types(dtype, jnp.float32), plan.lengths.shape[1] - 1
        real = patching.to_bytes(shifted, self.config.vocab) >= 0
        both = jnp.stack([histograms.astype(wide), real.astype(wide)], axis=-1)
        total = segment_sum(both, plan.patch_of, count)
        return total[..., 0] / (patching.MOST * jnp.maximum(total[..., 1], 1))

<<<<<<< HEAD
    def _patch_entropy_of(
        self, cache: BLTCache, mask: Array, dtype: jnp.dtype
    ) -> Float[Array, "B 1"] | None:
        """The same for one patch a row, whose bytes `mask` picks out of the cached ones."""
        if not self.config.entropy_attention:
            return None
        wide = jnp.promote_types(dtype, jnp.float32)
        ids = cache.ids[:, self._look_back() - 1 :]
        real = mask & (patching.to_bytes(ids, self.config.vocab) >= 0)
        total = jnp.where(mask, cache.histograms.astype(wide), 0).sum(axis=1, keepdims=True)
        count = jnp.maximum(real.sum(axis=1, keepdims=True), 1).astype(wide)
        return total / (patching.MOST * count)

    def _look_back(self) -> int:
        """Ids that patcher and hashes need up to a byte, itself included."""
        windows = patching.WINDOWS if self.config.reads_histograms else ()
        return max((patching.CONTEXT, *windows, *self.config.ngram_sizes))

    def _embed(self, shifted: Array, begins: Array | None) -> Array:
        """[B, T] ids of s → [B, T, D]; no n-gram is looked up from the first pad on."""
=======
    def embed(
        self, shifted: Int[Array, "B T"], begins: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """The encoder's input; no n-gram is looked up from the first pad on."""
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
        x, c = self.encoder.embed(shifted), self.config
        positions = positions_in(shifted.shape[1], begins)
        if not c.ngram_tables:
            return self.add_positions(x, positions)
        back = range(max(c.ngram_sizes) - 1, -1, -1)
        grams = jnp.stack([patching.shifted(shifted, n, 0, begins) for n in back], axis=-1)
        inside = patching.present(shifted, c.vocab, begins)[..., None]
        rows = jnp.where(inside, ngram_rows(grams, c), c.ngram_tables * c.ngram_rows)
        return self.add_positions(self.add_ngrams(x, rows), positions)

    def add_ngrams(
        self, x: Float[Array, "B T D"], rows: Int[Array, "B T E"]
    ) -> Float[Array, "B T D"]:
        """Byte embeddings and those of the n-grams, in these rows of the fused table."""
        total = x + self.encoder.ngrams(rows)
        mean = self.config.ngram_combine == "mean"
        return total / (self.config.ngram_tables + 1) if mean else total

    def add_positions(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """Embeddings with their positions, where those are not rotations."""
        if self.config.positions == "rotary":
            return x
        return x + sinusoids(positions, x.shape[2], x.dtype)

    def widen(self, patches: Float[Array, "B N W"]) -> Float[Array, "B N D"]:
        """Pooled patches → the global width D."""
        wide = self.config.patch_queries * self.config.local_dim
        return patches if wide == self.config.global_dim else self.to_global(patches)
