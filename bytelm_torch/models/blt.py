"""Byte Latent Transformer: a latent transformer over patches of varying numbers of bytes.

Pagnoni et al. 2024 (arXiv 2412.09871). Axes: B batch, T bytes, N patches, M vectors per patch (W
together), G key heads, K head width, D width, V vocabulary. The mirror of
`bytelm_jax/models/blt.py`, which lists the differences from the published form.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from bytelm import patch_rules
from bytelm.config import BLTConfig
from bytelm_torch.layers.caches import Index
from bytelm_torch.layers.embedding import sinusoids
from bytelm_torch.layers.ids import check_ids
from bytelm_torch.layers.logits import LogitsLinear
from bytelm_torch.layers.ngram import ngram_rows
from bytelm_torch.layers.segments import segment_sum
from bytelm_torch.layers.transformer import Transformer, positions_in
from bytelm_torch.models import blt_decoding, patching
from bytelm_torch.models.blt_decoding import BLTCache
from bytelm_torch.models.blt_local import Decoder, Encoder, bias_free
from bytelm_torch.models.entropy import EntropyModel, entropy, segment_starts_of, shift_right
from bytelm_torch.models.interface import ByteModel, ModelOutput


class Encoded(NamedTuple):
    """The byte encoder's part of a pass over s."""

    states: Float[Tensor, "B T D"]
    pooled: Float[Tensor, "B N W"]
    """The patches, which `BLT.widen` projects to the global width."""
    plan: patching.PatchPlan
    shifted: Int[Tensor, "B T"]
    """s itself."""
    counted: Bool[Tensor, "B T"]
    """Which positions of s are no padding."""
    segment_starts: Int[Tensor, "B T"] | None


class BLT(ByteModel, nn.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: BLTConfig):
        super().__init__()
        c = self.config = config
        if c.patcher == "entropy":
            self.patcher = EntropyModel(c.entropy).requires_grad_(False)
        self.encoder = Encoder(c)
        pooled = c.patch_queries * c.local_dim
        if pooled != c.global_dim:
            self.to_global = bias_free(pooled, c.global_dim)
        heads = (c.global_heads, c.global_kv_heads)
        sizes = (c.global_dim, c.global_layers, *heads, c.global_hidden_dim, 0)
        kind = (c.rotation_base, c.dropout, c.feedforward, c.entropy_attention, c.global_block)
        self.global_transformer = Transformer(*sizes, *kind)
        self.decoder = Decoder(c)
        self.to_logits = bias_free(c.local_dim, c.vocab.size, LogitsLinear)

    def forward(self, ids: Integer[Tensor, "B T"], remat: bool = False) -> Float[Tensor, "B T V"]:
        """Logits in at least float32; the compute dtype is that of the parameters.

        `ids` may have any integer dtype; one outside the vocabulary raises `ValueError`. `remat`
        recomputes the layers in the backward pass.
        """
        return self.outputs(ids, remat).logits

    def outputs(
        self,
        ids: Integer[Tensor, "B T"],
        remat: bool = False,
        starts: Bool[Tensor, "B S"] | None = None,
    ) -> ModelOutput:
        """Logits as from `forward`; metrics `patch_length` (mean, bytes) and `patch_overflow`.

        A model that reads histograms adds `histogram_entropy` (mean, bits).

        `starts`, S = T + 1, replaces the patcher: whether a patch starts at each position of s and
        at the byte still to come (`patching.starts_from_lengths` computes it from lengths).
        """
        c = self.config
        ids = check_ids(ids, c.vocab.size)
        batch, length = ids.shape
        if ids.numel() == 0:
            empty = self.to_logits.weight.new_zeros(batch)
            logits = self.to_logits(empty.new_zeros(batch, length, c.local_dim))
            names = ("patch_length", "patch_overflow")
            names += ("histogram_entropy",) * c.reads_histograms
            return ModelOutput(logits, empty, dict.fromkeys(names, empty))
        states, patches, plan, shifted, counted, segment_starts = self.encode(ids, remat, starts)
        histograms = self.histograms(shifted, counted, segment_starts)
        patch_entropy = self.patch_entropy(histograms, shifted, plan, patches.dtype)
        patches, _ = self.global_transformer(
            self.widen(patches), remat, patch_entropy, plan.segment_starts
        )
        x, _, _ = self.decoder(states, patches, plan.read_of, remat, segment_starts)
        used = (plan.lengths > 0).sum(dim=1)
        metrics = {
            "patch_length": plan.lengths.sum(dim=1) / used.float(),
            "patch_overflow": plan.overflow.float(),
        }
        if c.reads_histograms:
            wide = torch.promote_types(x.dtype, torch.float32)
            bits = (histograms.to(wide) / patch_rules.BIT).sum(dim=1)
            metrics["histogram_entropy"] = bits / counted.sum(dim=1)
        return ModelOutput(self.to_logits(x), x.new_zeros(batch), metrics)

    def encode(
        self,
        ids: Int[Tensor, "B T"],
        remat: bool = False,
        starts: Bool[Tensor, "B S"] | None = None,
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
            self.embed(shifted, segment_starts), remat, segment_starts=segment_starts
        )
        patches, _ = self.encoder.pool(states, plan.patch_of, plan.budget)
        return Encoded(states, patches, plan, shifted, counted, segment_starts)

    def entropies(
        self, shifted: Int[Tensor, "B T"], segment_starts: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T"] | None:
        """Entropy in nats of the entropy model's prediction after each position of s.

        No gradient reaches that model. None for the other patchers.
        """
        if self.config.patcher != "entropy":
            return None
        with torch.no_grad():
            return entropy(self.patcher.predict(shifted, segment_starts))

    def train(self, mode: bool = True) -> "BLT":
        """As in torch, but the frozen entropy model stays in evaluation mode."""
        super().train(mode)
        if self.config.patcher == "entropy":
            self.patcher.eval()
        return self

    def patch_starts(self, ids: Integer[Tensor, "B T"]) -> Bool[Tensor, "B T"] | None:
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

    def prefill(self, ids: Integer[Tensor, "B T"], cache: BLTCache) -> BLTCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads them.
        """
        return blt_decoding.prefill(self, ids, cache)

    def extend(
        self, before: Integer[Tensor, "B T"], cache: BLTCache, index: Index
    ) -> tuple[Float[Tensor, "B T V"], BLTCache]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each (ignored before the first).
        """
        return blt_decoding.extend(self, before, cache, index)[:2]

    def verify(
        self, before: Integer[Tensor, "B T"], cache: BLTCache, index: Index
    ) -> tuple[Float[Tensor, "B T V"], BLTCache, Int[Tensor, " B"]]:
        """`extend` up to the next patch; also gives how many of each row's logits hold.

        The global transformer runs for a patch that ends with the first byte alone: what is drafted
        behind a patch is seldom right, and would cost all of its layers.
        """
        return blt_decoding.extend(self, before, cache, index, within_patch=True)

    def draft(
        self, before: Integer[Tensor, "B 1"], cache: BLTCache, index: Index
    ) -> tuple[Float[Tensor, "B 1 V"], BLTCache]:
        """As `extend` for one byte, by the local stacks alone: cheap, and a guess."""
        return blt_decoding.draft(self, before, cache, index)

    def histograms(
        self,
        shifted: Int[Tensor, "B T"],
        counted: Bool[Tensor, "B T"],
        segment_starts: Int[Tensor, "B T"] | None,
    ) -> Int[Tensor, "B M"]:
        """`patching.histogram_entropy` of each position, 0 for padding; M = 0 if not needed."""
        if not self.config.reads_histograms:
            return torch.zeros_like(shifted[:, :0])
        recent = patching.recent_bytes(
            shifted, self.config.vocab, patch_rules.WINDOWS[-1], segment_starts
        )
        return patching.histogram_entropy(recent).where(counted, 0)

    def patch_entropy(
        self,
        histograms: Int[Tensor, "B M"],
        shifted: Int[Tensor, "B T"],
        plan: patching.PatchPlan,
        dtype: torch.dtype,
    ) -> Float[Tensor, "B N"] | None:
        """Mean histogram entropy of each patch's bytes, relative to the largest, log2 7."""
        if not self.config.entropy_attention:
            return None
        wide, count = torch.promote_types(dtype, torch.float32), plan.budget
        real = patching.to_bytes(shifted, self.config.vocab) >= 0
        both = torch.stack([histograms.to(wide), real.to(wide)], dim=-1)
        total = segment_sum(both, plan.patch_of, count)
        return total[..., 0] / (patch_rules.MOST * total[..., 1].clamp(min=1))

    def embed(
        self, shifted: Int[Tensor, "B T"], segment_starts: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T D"]:
        """The encoder's input; no n-gram is looked up from the first pad on."""
        x, c = self.encoder.embed(shifted), self.config
        positions = positions_in(shifted.shape[1], segment_starts, x.device)
        if not c.ngram_tables:
            return self.add_positions(x, positions)
        back = range(max(c.ngram_sizes) - 1, -1, -1)
        grams = torch.stack([patching.shifted(shifted, n, 0, segment_starts) for n in back], dim=-1)
        inside = patching.present(shifted, c.vocab, segment_starts)[..., None]
        rows = ngram_rows(grams, c).where(inside, c.ngram_tables * c.ngram_rows)
        return self.add_positions(self.add_ngrams(x, rows), positions)

    def add_ngrams(
        self, x: Float[Tensor, "B T D"], rows: Int[Tensor, "B T E"]
    ) -> Float[Tensor, "B T D"]:
        """Embeddings of bytes and of their n-grams, whose rows of the fused table are given."""
        total = x + self.encoder.ngrams(rows)
        mean = self.config.ngram_combine == "mean"
        return total / (self.config.ngram_tables + 1) if mean else total

    def add_positions(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "#B T"]
    ) -> Float[Tensor, "B T D"]:
        """Embeddings with their positions added, unless positions are rotations."""
        if self.config.positions == "rotary":
            return x
        return x + sinusoids(positions, x.shape[2], x.dtype)

    def widen(self, patches: Float[Tensor, "B N W"]) -> Float[Tensor, "B N D"]:
        """Pooled patches projected to the global width D."""
        wide = self.config.patch_queries * self.config.local_dim
        return patches if wide == self.config.global_dim else self.to_global(patches)
