"""Byte Latent Transformer: a latent transformer over patches of bytes whose length varies.

Pagnoni et al. 2024 (arXiv 2412.09871). Axes: B batch, T bytes, N patches, M vectors a patch (W
together), G key heads, K head width, D width, V vocabulary.
The mirror of `bytelm_jax/models/blt.py`, which says where this differs from the published form.
"""

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from bytelm.config import BLTConfig
from bytelm_torch.layers.embedding import sinusoids
from bytelm_torch.layers.ids import check_ids
from bytelm_torch.layers.logits import LogitsLinear
from bytelm_torch.layers.ngram import ngram_rows
from bytelm_torch.layers.segments import segment_sum
from bytelm_torch.layers.transformer import Transformer, positions_in
from bytelm_torch.models import blt_decoding, patching
from bytelm_torch.models.blt_decoding import BLTCache
from bytelm_torch.models.blt_local import Decoder, Encoder, bias_free
from bytelm_torch.models.entropy import EntropyModel, begins_of, entropy, shift_right
from bytelm_torch.models.interface import Choose, ModelOutput


class BLT(nn.Module):
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
        kind = (c.rotation_base, c.dropout, c.feedforward, c.entropy_attention)
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
        """As `forward`, with the metrics `patch_length` (mean, bytes) and `patch_overflow`.

        A model that reads histograms adds `histogram_entropy` (mean, bits).

        `starts`, S = T + 1, takes the place of the patcher: whether a patch starts at each position
        of s and at the byte still to come (`patching.starts_from_lengths` makes it from lengths).
        """
        c = self.config
        ids = check_ids(ids, c.vocab.size)
        batch, length = ids.shape
        if length == 0:
            empty = self.to_logits.weight.new_zeros(batch)
            logits = self.to_logits.weight.new_zeros((batch, 0, c.vocab.size))
            names = ("patch_length", "patch_overflow")
            names += ("histogram_entropy",) * c.reads_histograms
            return ModelOutput(logits, empty, dict.fromkeys(names, empty))
        begins = begins_of(ids, c)
        shifted = shift_right(ids, c.vocab.bos_id, begins)
        if starts is None:
            starts = patching.patch_starts(c, shifted, self.entropies(shifted, begins), begins)
        counted = patching.present(shifted, c.vocab, begins)
        plan = patching.plan_patches(starts, counted, c.budget(length), begins)

        states, _ = self.encoder.transformer(self.embed(shifted, begins), remat, begins=begins)
        patches, _ = self.encoder.pool(states, plan.patch_of, plan.lengths.shape[1] - 1)
<<<<<<< HEAD
        histograms = self._histograms(shifted, counted, begins)
        patch_entropy = self._patch_entropy(histograms, shifted, plan, patches.dtype)
        patches, _ = self.global_transformer(
            self._widen(patches), remat, patch_entropy, plan.begins
        )
=======
        histograms = self.histograms(shifted, counted, begins)
        unrest = self.unrest(histograms, shifted, plan, patches.dtype)
        patches, _ = self.global_transformer(self.widen(patches), remat, unrest, plan.begins)
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
        x, _, _ = self.decoder(states, patches, plan.read_of, remat, begins)
        used = (plan.lengths > 0).sum(dim=1)
        metrics = {
            "patch_length": plan.lengths.sum(dim=1) / used.float(),
            "patch_overflow": plan.overflow.float(),
        }
        if c.reads_histograms:
            wide = torch.promote_types(x.dtype, torch.float32)
            bits = (histograms.to(wide) / patching.BIT).sum(dim=1)
            metrics["histogram_entropy"] = bits / counted.sum(dim=1)
        return ModelOutput(self.to_logits(x), x.new_zeros(batch), metrics)

    def entropies(
        self, shifted: Int[Tensor, "B T"], begins: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T"] | None:
        """Entropy in nats of the entropy model's prediction after each position of s.

        No gradient reaches that model. None under the other patchers.
        """
        if self.config.patcher != "entropy":
            return None
        with torch.no_grad():
            return entropy(self.patcher.predict(shifted, begins))

    def train(self, mode: bool = True) -> "BLT":
        """As in torch, but the frozen entropy model stays in evaluation."""
        super().train(mode)
        if self.config.patcher == "entropy":
            self.patcher.eval()
        return self

    # Cached decoding: `models.blt_decoding`.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return 1

    def init_cache(self, batch: int, length: int) -> BLTCache:
        """An empty cache for sequences of up to `length` bytes."""
        return blt_decoding.init_cache(self, batch, length)

    def prefill(self, ids: Integer[Tensor, "B T"], cache: BLTCache) -> BLTCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
<<<<<<< HEAD
        c, length = self.config, ids.shape[1]
        if length == 0:
            return cache
        begins, entropies = begins_of(ids, c), None
        shifted = shift_right(ids, c.vocab.bos_id, begins)
        if c.patcher == "entropy":
            logits, written = self.patcher.predict_cached(shifted, begins)
            entropies = entropy(logits)
            write_prefix(cache.patcher, written)
        starts = patching.patch_starts(c, shifted, entropies, begins)
        room = cache.memory[0].keys.shape[1]
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
        cache.ids[:, first : first + length] = shifted
        write_begins(cache.begins, begins)
        cache.patches[:, : length + 1] = plan.numbers
        cache.histograms[:, : histograms.shape[1]] = histograms
        cache.states[:, :length] = states
        write_prefix((cache.pooled,), (pooled,))
        write_prefix(cache.encoder, encoder)
        write_prefix(cache.global_layers, global_layers)
        write_prefix(cache.memory, memory)
        write_prefix(cache.decoder, decoder)
        return cache
=======
        return blt_decoding.prefill(self, ids, cache)
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)

    def decode_round(
        self, cache: BLTCache, previous: Integer[Tensor, "B 1"], index: int, choose: Choose
    ) -> tuple[BLTCache, Int[Tensor, "B 1"]]:
        """Appends byte number `index`; `previous` is the byte before it (anything at first).

        `choose(logits [B, V], 0)` gives its ids [B].
        """
        return blt_decoding.decode_round(self, cache, previous, index, choose)

<<<<<<< HEAD
        x = self._embed_recent(byte, recent, index, begin)
        x, _ = self.encoder.transformer.extend(x, cache.encoder, index, begin)
        new = self.encoder.cross_attention.keys_values(x)
        cache.states[:, index] = x[:, 0]
        cache.pooled.keys[:, index], cache.pooled.values[:, index] = (part[:, 0] for part in new)
        self._finish_patches(cache, ends, number, first, index)
        memory = self._newest(cache, torch.where(ends, number, number - 1), first)
        x, _ = self.decoder.extend(x, memory, cache.decoder, index, begin)
        chosen = as_ids(choose(self.to_logits(x)[:, 0], 0))
        return cache, chosen[:, None]

    def _remember(self, cache: BLTCache, byte: Tensor, index: int, begin: Tensor | None) -> Tensor:
        """Writes s_index; gives the ids of its segment that end there."""
        c, span = self.config, self._look_back()
        cache.ids[:, index + span - 1] = byte[:, 0]
        recent = cache.ids[:, index : index + span]
        if begin is not None:
            positions = torch.arange(index + 1 - span, index + 1, device=byte.device)
            recent = recent.where(positions >= begin[:, None], patching.NO_BYTE)
        if c.reads_histograms:
            values = patching.to_bytes(recent[:, -patching.WINDOWS[-1] :], c.vocab)
            found = patching.histogram_entropy(values)
            cache.histograms[:, index] = found.where(byte[:, 0] != c.vocab.pad_id, 0)
        return recent

    def _mark(
        self, cache: BLTCache, byte: Tensor, recent: Tensor, index: int, begin: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Writes the patch of the byte to come; whether a patch ends here, and its number.

        And, where texts start anew, the number of the segment's first patch.
        """
        c, room = self.config, cache.memory[0].keys.shape[1]
        entropies = summed = None
        if c.patcher == "entropy":
            logits, _ = self.patcher.extend(byte, cache.patcher, index, begin)
            entropies = entropy(logits)
        number = cache.patches[:, index]
        position, first = torch.full_like(number, index), None
        if begin is not None:
            # A segment begins with a patch, whatever the patcher said before it.
            anew = (cache.patches[:, max(index - 1, 0)] + 1).clamp(max=room)
            number = torch.where((begin == index) & (index > 0), anew, number)
            cache.patches[:, index] = number
            first = cache.patches.gather(1, begin[:, None])[:, 0]
            position = position - begin
        if c.patcher == "histogram":
            mask = self._in_patch(cache, number, index)
            summed = cache.histograms.where(mask, 0).sum(dim=1)
        values = patching.to_bytes(recent[:, -patching.CONTEXT :], c.vocab)
        starts = patching.boundary_after(c, values, position, entropies, summed) | (position == 0)
        ends = starts & (byte[:, 0] != c.vocab.pad_id) & (number < room)
        cache.patches[:, index + 1] = number + ends
        return ends, number, first

    def _finish_patches(
        self, cache: BLTCache, ends: Tensor, number: Tensor, first: Tensor | None, index: int
    ) -> None:
        """Runs the patches that end here through the global transformer, if any does."""
        if not ends.any():
            return
        mask = self._in_patch(cache, number, index)
        patch = self._widen(self.encoder.pool_one(cache.states, cache.pooled, mask))
        patch_entropy = self._patch_entropy_of(cache, mask, patch.dtype)
        patch, layers = self.global_transformer.extend_rows(
            patch, cache.global_layers, number, patch_entropy, first
        )
        vectors = self.decoder.split(patch)[:, 0]
        memory = [cross.keys_values(vectors) for cross in self.decoder.cross_attentions]  # pyright: ignore
        rows = ends.nonzero()[:, 0]
        slot = number[rows]
        pairs = zip((*cache.global_layers, *cache.memory), (*layers, *memory), strict=True)
        for room, made in pairs:
            for old, new in zip(room, made, strict=True):
                old[rows, slot] = new[rows]
        cache.global_calls.add_(1)

    def _newest(self, cache: BLTCache, newest: Tensor, first: Tensor | None) -> Caches:
        """Keys and values of the patch `newest` of each row, zeros if its segment has none yet."""
        rows = torch.arange(newest.shape[0], device=newest.device)
        found = (KeyValueCache(*(part[rows, newest] for part in pair)) for pair in cache.memory)
        if first is None:
            return tuple(found)
        # A segment that began past the budget has no patch of its own.
        past = (first >= cache.memory[0].keys.shape[1])[:, None, None, None]
        return tuple(KeyValueCache(*(part.masked_fill(past, 0) for part in pair)) for pair in found)

    def _in_patch(self, cache: BLTCache, number: Tensor, index: int) -> Bool[Tensor, "B L"]:
        """The positions up to `index` that belong to the patch `number` of each row."""
        positions = torch.arange(cache.states.shape[1], device=number.device)[None, :]
        return (cache.patches[:, :-1] == number[:, None]) & (positions <= index)

    def _histograms(
        self, shifted: Tensor, counted: Tensor, begins: Tensor | None
=======
    def histograms(
        self,
        shifted: Int[Tensor, "B T"],
        counted: Bool[Tensor, "B T"],
        begins: Int[Tensor, "B T"] | None,
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
    ) -> Int[Tensor, "B M"]:
        """`patching.histogram_entropy` of each position, 0 for padding; M = 0 if not read."""
        if not self.config.reads_histograms:
            return torch.zeros_like(shifted[:, :0])
        recent = patching.recent_bytes(shifted, self.config.vocab, patching.WINDOWS[-1], begins)
        return patching.histogram_entropy(recent).where(counted, 0)

<<<<<<< HEAD
    def _patch_entropy(
        self, histograms: Tensor, shifted: Tensor, plan: patching.PatchPlan, dtype: torch.dtype
=======
    def unrest(
        self,
        histograms: Int[Tensor, "B M"],
        shifted: Int[Tensor, "B T"],
        plan: patching.PatchPlan,
        dtype: torch.dtype,
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
    ) -> Float[Tensor, "B N"] | None:
        """Mean histogram entropy of each patch's bytes, as a part of the largest, log2 7."""
        if not self.config.entropy_attention:
            return None
        wide, count = torch.promote_types(dtype, torch.float32), plan.lengths.shape[1] - 1
        real = patching.to_bytes(shifted, self.config.vocab) >= 0
        both = torch.stack([histograms.to(wide), real.to(wide)], dim=-1)
        total = segment_sum(both, plan.patch_of, count)
        return total[..., 0] / (patching.MOST * total[..., 1].clamp(min=1))

<<<<<<< HEAD
    def _patch_entropy_of(
        self, cache: BLTCache, mask: Tensor, dtype: torch.dtype
    ) -> Float[Tensor, "B 1"] | None:
        """The same for one patch a row, whose bytes `mask` picks out of the cached ones."""
        if not self.config.entropy_attention:
            return None
        wide = torch.promote_types(dtype, torch.float32)
        ids = cache.ids[:, self._look_back() - 1 :]
        real = mask & (patching.to_bytes(ids, self.config.vocab) >= 0)
        total = cache.histograms.to(wide).where(mask, 0).sum(dim=1, keepdim=True)
        count = real.sum(dim=1, keepdim=True).clamp(min=1).to(wide)
        return total / (patching.MOST * count)

    def _look_back(self) -> int:
        """Ids that patcher and hashes need up to a byte, itself included."""
        windows = patching.WINDOWS if self.config.reads_histograms else ()
        return max((patching.CONTEXT, *windows, *self.config.ngram_sizes))

    def _embed(self, shifted: Tensor, begins: Tensor | None) -> Tensor:
        """[B, T] ids of s → [B, T, D]; no n-gram is looked up from the first pad on."""
=======
    def embed(
        self, shifted: Int[Tensor, "B T"], begins: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T D"]:
        """The encoder's input; no n-gram is looked up from the first pad on."""
>>>>>>> 807ef34 (Cached decoding of MEGABYTE and BLT stands beside the forward pass)
        x, c = self.encoder.embed(shifted), self.config
        positions = positions_in(shifted.shape[1], begins, x.device)
        if not c.ngram_tables:
            return self.add_positions(x, positions)
        back = range(max(c.ngram_sizes) - 1, -1, -1)
        grams = torch.stack([patching.shifted(shifted, n, 0, begins) for n in back], dim=-1)
        inside = patching.present(shifted, c.vocab, begins)[..., None]
        rows = ngram_rows(grams, c).where(inside, c.ngram_tables * c.ngram_rows)
        return self.add_positions(self.add_ngrams(x, rows), positions)

    def add_ngrams(
        self, x: Float[Tensor, "B T D"], rows: Int[Tensor, "B T E"]
    ) -> Float[Tensor, "B T D"]:
        """Byte embeddings and those of the n-grams, in these rows of the fused table."""
        total = x + self.encoder.ngrams(rows)
        mean = self.config.ngram_combine == "mean"
        return total / (self.config.ngram_tables + 1) if mean else total

    def add_positions(
        self, x: Float[Tensor, "B T D"], positions: Int[Tensor, "#B T"]
    ) -> Float[Tensor, "B T D"]:
        """Embeddings with their positions, where those are not rotations."""
        if self.config.positions == "rotary":
            return x
        return x + sinusoids(positions, x.shape[2], x.dtype)

    def widen(self, patches: Float[Tensor, "B N W"]) -> Float[Tensor, "B N D"]:
        """Pooled patches → the global width D."""
        wide = self.config.patch_queries * self.config.local_dim
        return patches if wide == self.config.global_dim else self.to_global(patches)
