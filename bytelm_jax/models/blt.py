"""Byte Latent Transformer: a latent transformer over patches of varying numbers of bytes.

Pagnoni et al. 2024 (arXiv 2412.09871), in the form of the published weights, which transformers
calls `BltForCausalLM`. Axes: B batch, T bytes, N patches, M vectors per patch (W together), G key
heads, K head width, D width, V vocabulary. The model runs on s = [BOS, ids[:, :-1]].

Differences: shapes are static, so a budget bounds the patches and those past it merge into the
last; cross-attention is linear in the bytes; padding is neither patched nor hashed; entropies of a
row never depend on another row; boundaries inside a UTF-8 character are excluded unless
`whole_characters` is off.

With `reset_on` the text consists of segments, each a text of its own with its own BOS and patches:
`segment_starts` holds, wherever it appears, the first position (or patch) of each position's (or
patch's) segment, and is None if the row is one text.

Bytropix is the same skeleton with other parts, each a field of the configuration: patches by the
entropy of byte histograms, splines, entropy-guided attention, sinusoidal positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from bytelm import patch_rules
from bytelm.config import BLTConfig
from bytelm_jax.kernels.segment_sum import segment_sum
from bytelm_jax.layers.caches import Index
from bytelm_jax.layers.dropout import fold_rows
from bytelm_jax.layers.embedding import sinusoids
from bytelm_jax.layers.ids import check_ids
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.logits import LogitsLinear
from bytelm_jax.layers.ngram import ngram_rows
from bytelm_jax.layers.transformer import Transformer, positions_in
from bytelm_jax.models import blt_decoding, patching
from bytelm_jax.models.blt_decoding import BLTCache
from bytelm_jax.models.blt_local import Decoder, Encoder
from bytelm_jax.models.entropy import EntropyModel, entropy, segment_starts_of, shift_right
from bytelm_jax.models.interface import ByteModel, ModelOutput


class Encoded(NamedTuple):
    """The byte encoder's part of a pass over s."""

    states: Float[Array, "B T D"]
    pooled: Float[Array, "B N W"]
    """The patches, which `BLT.widen` projects to the global width."""
    plan: patching.PatchPlan
    shifted: Int[Array, "B T"]
    """s itself."""
    counted: Bool[Array, "B T"]
    """Which positions of s are no padding."""
    segment_starts: Int[Array, "B T"] | None


class BLT(ByteModel, nnx.Module):
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
        kind = (c.rotation_base, c.dropout, c.feedforward, c.entropy_attention, c.global_block)
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
        `jit`, where values are unknown, it gives NaN). `dropout_keys` holds one key per row and
        turns dropout on. `remat` recomputes the layers in the backward pass.
        """
        return self.outputs(ids, dropout_keys, remat).logits

    def outputs(
        self,
        ids: Integer[Array | np.ndarray, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
        starts: Bool[Array, "B S"] | None = None,
    ) -> ModelOutput:
        """Logits as from `__call__`; metrics `patch_length` (mean, bytes) and `patch_overflow`.

        A model that reads histograms adds `histogram_entropy` (mean, bits).

        `starts`, S = T + 1, replaces the patcher: whether a patch starts at each position of s and
        at the byte still to come (`patching.starts_from_lengths` computes it from lengths).
        """
        c = self.config
        ids = check_ids(ids, c.vocab.size)
        batch, length = ids.shape
        if ids.size == 0:
            empty = jnp.zeros((batch,))
            dtype = jnp.promote_types(self.to_logits.kernel[...].dtype, jnp.float32)
            logits = jnp.zeros((batch, length, c.vocab.size), dtype)
            names = "patch_length", "patch_overflow", *["histogram_entropy"] * c.reads_histograms
            return ModelOutput(logits, empty, dict.fromkeys(names, empty))
        states, patches, plan, shifted, counted, segment_starts = self.encode(
            ids, dropout_keys, remat, starts
        )
        histograms = self.histograms(shifted, counted, segment_starts)
        patches, _ = self.global_transformer(
            self.widen(patches),
            fold_rows(dropout_keys, 1),
            remat,
            self.patch_entropy(histograms, shifted, plan, patches.dtype),
            plan.segment_starts,
        )
        x, _, _ = self.decoder(
            states, patches, plan.read_of, fold_rows(dropout_keys, 2), remat, segment_starts
        )
        used = (plan.lengths > 0).sum(axis=1)
        metrics = {
            "patch_length": plan.lengths.sum(axis=1) / used.astype(jnp.float32),
            "patch_overflow": plan.overflow.astype(jnp.float32),
        }
        if c.reads_histograms:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            bits = (histograms.astype(wide) / patch_rules.BIT).sum(axis=1)
            metrics["histogram_entropy"] = bits / counted.sum(axis=1)
        return ModelOutput(self.to_logits(x), jnp.zeros((batch,)), metrics)

    def encode(
        self,
        ids: Int[Array, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
        starts: Bool[Array, "B S"] | None = None,
    ) -> "Encoded":
        """What the byte encoder makes of `ids`, which are checked and not empty; see `outputs`."""
        c = self.config
        segment_starts = segment_starts_of(ids, c)
        shifted = shift_right(ids, c.vocab.bos_id, segment_starts)
        if starts is None:
            starts = patching.patch_starts(
                c, shifted, self.entropies(shifted, segment_starts), segment_starts
            )
        counted = patching.present(shifted, c.vocab, segment_starts)
        plan = patching.plan_patches(starts, counted, c.budget(ids.shape[1]), segment_starts)

        states, _ = self.encoder.transformer(
            self.embed(shifted, segment_starts),
            fold_rows(dropout_keys, 0),
            remat,
            segment_starts=segment_starts,
        )
        patches, _ = self.encoder.pool(states, plan.patch_of, plan.budget, segment_starts is None)
        return Encoded(states, patches, plan, shifted, counted, segment_starts)

    def entropies(
        self, shifted: Int[Array, "B T"], segment_starts: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T"] | None:
        """Entropy in nats of the entropy model's prediction after each position of s.

        No gradient reaches that model. None for the other patchers.
        """
        if self.config.patcher != "entropy":
            return None
        return jax.lax.stop_gradient(entropy(self.patcher.predict(shifted, segment_starts)))

    def patch_starts(self, ids: Integer[Array | np.ndarray, "B T"]) -> Bool[Array, "B T"] | None:
        """Whether a patch starts at each byte, whatever the budget merges later."""
        segment_starts = segment_starts_of(ids, self.config)
        shifted = shift_right(ids, self.config.vocab.bos_id, segment_starts)
        entropies = self.entropies(shifted, segment_starts)
        # s_0 is BOS and s_{t+1} is byte t.
        return patching.patch_starts(self.config, shifted, entropies, segment_starts)[:, 1:]

    # Cached decoding: `models.blt_decoding`.

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> BLTCache:
        """An empty cache for sequences of up to `length` bytes."""
        return blt_decoding.init_cache(self, batch, length)

    @property
    def prefills_in_parts(self) -> bool:
        """No: `extend` is made for few bytes, after each of which a patch may end."""
        return False

    def prefill(self, ids: Integer[Array | np.ndarray, "B T"], cache: BLTCache) -> BLTCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads them.
        """
        return blt_decoding.prefill(self, ids, cache)

    def extend(
        self, before: Integer[Array | np.ndarray, "B T"], cache: BLTCache, index: Index
    ) -> tuple[Float[Array, "B T V"], BLTCache]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each (ignored before the first).
        """
        return blt_decoding.extend(self, before, cache, index)[:2]

    def verify(
        self, before: Integer[Array | np.ndarray, "B T"], cache: BLTCache, index: Index
    ) -> tuple[Float[Array, "B T V"], BLTCache, Int[Array, " B"]]:
        """`extend` up to the next patch; also gives how many of each row's logits hold.

        The global transformer runs for a patch that ends with the first byte alone: what is drafted
        behind a patch is seldom right, and would cost all of its layers.
        """
        return blt_decoding.extend(self, before, cache, index, within_patch=True)

    def draft(
        self, before: Integer[Array | np.ndarray, "B 1"], cache: BLTCache, index: Index
    ) -> tuple[Float[Array, "B 1 V"], BLTCache]:
        """As `extend` for one byte, by the local stacks alone: cheap, and a guess."""
        return blt_decoding.draft(self, before, cache, index)

    def histograms(
        self,
        shifted: Int[Array, "B T"],
        counted: Bool[Array, "B T"],
        segment_starts: Int[Array, "B T"] | None,
    ) -> Int[Array, "B M"]:
        """`patching.histogram_entropy` of each position, 0 for padding; M = 0 if not needed."""
        if not self.config.reads_histograms:
            return jnp.zeros((shifted.shape[0], 0), jnp.int32)
        recent = patching.recent_bytes(
            shifted, self.config.vocab, patch_rules.WINDOWS[-1], segment_starts
        )
        return jnp.where(counted, patching.histogram_entropy(recent), 0)

    def patch_entropy(
        self,
        histograms: Int[Array, "B M"],
        shifted: Int[Array, "B T"],
        plan: patching.PatchPlan,
        dtype: jnp.dtype,
    ) -> Float[Array, "B N"] | None:
        """Mean histogram entropy of each patch's bytes, relative to the largest, log2 7."""
        if not self.config.entropy_attention:
            return None
        wide, count = jnp.promote_types(dtype, jnp.float32), plan.budget
        real = patching.to_bytes(shifted, self.config.vocab) >= 0
        both = jnp.stack([histograms.astype(wide), real.astype(wide)], axis=-1)
        total = segment_sum(both, plan.patch_of, count)
        return total[..., 0] / (patch_rules.MOST * jnp.maximum(total[..., 1], 1))

    def embed(
        self, shifted: Int[Array, "B T"], segment_starts: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """The encoder's input; no n-gram is looked up from the first pad on."""
        x, c = self.encoder.embed(shifted), self.config
        positions = positions_in(shifted.shape[1], segment_starts)
        if not c.ngram_tables:
            return self.add_positions(x, positions)
        back = range(max(c.ngram_sizes) - 1, -1, -1)
        grams = jnp.stack([patching.shifted(shifted, n, 0, segment_starts) for n in back], axis=-1)
        inside = patching.present(shifted, c.vocab, segment_starts)[..., None]
        rows = jnp.where(inside, ngram_rows(grams, c), c.ngram_tables * c.ngram_rows)
        return self.add_positions(self.add_ngrams(x, rows), positions)

    def add_ngrams(
        self, x: Float[Array, "B T D"], rows: Int[Array, "B T E"]
    ) -> Float[Array, "B T D"]:
        """Embeddings of bytes and of their n-grams, whose rows of the fused table are given."""
        total = x + self.encoder.ngrams(rows, x)
        mean = self.config.ngram_combine == "mean"
        return total / (self.config.ngram_tables + 1) if mean else total

    def add_positions(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """Embeddings with their positions added, unless positions are rotations."""
        if self.config.positions == "rotary":
            return x
        return x + sinusoids(positions, x.shape[2], x.dtype)

    def widen(self, patches: Float[Array, "B N W"]) -> Float[Array, "B N D"]:
        """Pooled patches projected to the global width D."""
        wide = self.config.patch_queries * self.config.local_dim
        return patches if wide == self.config.global_dim else self.to_global(patches)
