"""Byte Latent Transformer: a latent transformer over patches of bytes whose length varies.

Pagnoni et al. 2024 (arXiv 2412.09871). Axes: B batch, T bytes, N patches, M vectors a patch (W
together), G key heads, K head width, D width, V vocabulary.
The mirror of `bytelm_jax/models/blt.py`, which says where this differs from the published form.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from bytelm.config import BLTConfig
from bytelm_torch.layers.attention import KeyValueCache
from bytelm_torch.layers.embedding import sinusoids
from bytelm_torch.layers.ids import as_ids, check_ids
from bytelm_torch.layers.logits import LogitsLinear
from bytelm_torch.layers.ngram import ngram_rows
from bytelm_torch.layers.segments import segment_sum
from bytelm_torch.layers.transformer import Caches, Transformer, position_in, positions_in
from bytelm_torch.models import patching
from bytelm_torch.models.blt_local import Decoder, Encoder, bias_free
from bytelm_torch.models.entropy import (
    EntropyModel,
    begin_with,
    begins_of,
    empty_begins,
    entropy,
    shift_right,
    write_begins,
    write_prefix,
)
from bytelm_torch.models.interface import Choose, ModelOutput


class BLTCache(NamedTuple):
    """What cached decoding keeps, by position in s or by patch, so that a round may be run again.

    L positions, N patches. Whatever a prefill wrote past the true prompt is written once more by
    the round of its position, or of its patch, before anything reads it. The tensors are written
    in place.
    """

    ids: Int[Tensor, "B L"]
    """s behind as many −1 as the longest look back needs."""
    begins: Int[Tensor, "B M"]
    """The first position of each position's segment, M = L; M = 0 where all is one text."""
    patches: Int[Tensor, "B L+1"]
    """The patch of each position, known before its byte is, unless that begins a segment."""
    histograms: Int[Tensor, "B M"]
    """`patching.histogram_entropy` of each position, M = L where the model reads it, else 0."""
    patcher: Caches
    encoder: Caches
    states: Float[Tensor, "B L D"]
    """The encoder's byte states, of which a complete patch takes the maximum."""
    pooled: KeyValueCache
    """Keys and values of those states for pooling, [B, L, G, K]."""
    global_layers: Caches
    memory: Caches
    """Keys and values of each patch's vectors for every layer of the decoder, [B, N, M, G, K]."""
    decoder: Caches
    global_calls: Int[Tensor, ""]
    """Rounds in which the global transformer ran."""


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

        states, _ = self.encoder.transformer(self._embed(shifted, begins), remat, begins=begins)
        patches, _ = self.encoder.pool(states, plan.patch_of, plan.lengths.shape[1] - 1)
        histograms = self._histograms(shifted, counted, begins)
        patch_entropy = self._patch_entropy(histograms, shifted, plan, patches.dtype)
        patches, _ = self.global_transformer(
            self._widen(patches), remat, patch_entropy, plan.begins
        )
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

    # Cached decoding: one round is one byte, the global transformer runs where a patch ends.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return 1

    def init_cache(self, batch: int, length: int) -> BLTCache:
        """An empty cache for sequences of up to `length` bytes."""
        c, weight = self.config, self.to_logits.weight
        local, patches = self.encoder.transformer, c.budget(length)
        head = (c.encoder_kv_heads or c.encoder_heads, c.local_dim // c.encoder_heads)
        read = (c.decoder_kv_heads or c.decoder_heads, c.local_dim // c.decoder_heads)

        def empty(*shape: int) -> KeyValueCache:
            return KeyValueCache(weight.new_zeros(shape), weight.new_zeros(shape))

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=weight.device)

        memory = (empty(batch, patches, c.patch_queries, *read) for _ in range(c.decoder_layers))
        return BLTCache(
            ids=integers(batch, self._look_back() - 1 + length).fill_(patching.NO_BYTE),
            begins=empty_begins(batch, length, c, weight.device),
            patches=integers(batch, length + 1),
            histograms=integers(batch, length if c.reads_histograms else 0),
            patcher=self.patcher.init_cache(batch, length).layers if c.patcher == "entropy" else (),
            encoder=local.empty_caches(batch, length, weight.dtype),
            states=weight.new_zeros((batch, length, c.local_dim)),
            pooled=empty(batch, length, *head),
            global_layers=self.global_transformer.empty_caches(batch, patches, weight.dtype),
            memory=tuple(memory),
            decoder=self.decoder.transformer.empty_caches(batch, length, weight.dtype),
            global_calls=integers(),
        )

    def prefill(self, ids: Integer[Tensor, "B T"], cache: BLTCache) -> BLTCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
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

    def decode_round(
        self, cache: BLTCache, previous: Integer[Tensor, "B 1"], index: int, choose: Choose
    ) -> tuple[BLTCache, Int[Tensor, "B 1"]]:
        """Appends byte number `index`; `previous` is the byte before it (anything at first).

        `choose(logits [B, V], 0)` gives its ids [B].
        """
        byte, begin = begin_with(previous, index, cache.begins, self.config)
        recent = self._remember(cache, byte, index, begin)
        ends, number, first = self._mark(cache, byte, recent, index, begin)

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
    ) -> Int[Tensor, "B M"]:
        """`patching.histogram_entropy` of each position, 0 for padding; empty if not read."""
        if not self.config.reads_histograms:
            return torch.zeros_like(shifted[:, :0])
        recent = patching.recent_bytes(shifted, self.config.vocab, patching.WINDOWS[-1], begins)
        return patching.histogram_entropy(recent).where(counted, 0)

    def _patch_entropy(
        self, histograms: Tensor, shifted: Tensor, plan: patching.PatchPlan, dtype: torch.dtype
    ) -> Float[Tensor, "B N"] | None:
        """Mean histogram entropy of each patch's bytes, as a part of the largest, log2 7."""
        if not self.config.entropy_attention:
            return None
        wide, count = torch.promote_types(dtype, torch.float32), plan.lengths.shape[1] - 1
        real = patching.to_bytes(shifted, self.config.vocab) >= 0
        both = torch.stack([histograms.to(wide), real.to(wide)], dim=-1)
        total = segment_sum(both, plan.patch_of, count)
        return total[..., 0] / (patching.MOST * total[..., 1].clamp(min=1))

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
        x, c = self.encoder.embed(shifted), self.config
        positions = positions_in(shifted.shape[1], begins, x.device)
        if not c.ngram_tables:
            return self._place(x, positions)
        back = range(max(c.ngram_sizes) - 1, -1, -1)
        grams = torch.stack([patching.shifted(shifted, n, 0, begins) for n in back], dim=-1)
        inside = patching.present(shifted, c.vocab, begins)[..., None]
        rows = ngram_rows(grams, c).where(inside, c.ngram_tables * c.ngram_rows)
        return self._place(self._combine(x, rows), positions)

    def _combine(self, x: Tensor, rows: Tensor) -> Tensor:
        """Byte embeddings and those of the n-grams."""
        total = x + self.encoder.ngrams(rows)
        mean = self.config.ngram_combine == "mean"
        return total / (self.config.ngram_tables + 1) if mean else total

    def _place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings with their positions, where those are not rotations."""
        if self.config.positions == "rotary":
            return x
        return x + sinusoids(positions, x.shape[2], x.dtype)

    def _embed_recent(
        self, byte: Tensor, recent: Tensor, index: int, begin: Tensor | None
    ) -> Tensor:
        """The same for one position, given the ids that end there, −1 before the first."""
        x, c = self.encoder.embed(byte), self.config
        position = position_in(index, begin, x.device)
        if not c.ngram_tables:
            return self._place(x, position)
        grams = recent.clamp(min=0)[:, None, -max(c.ngram_sizes) :]
        inside = (byte != c.vocab.pad_id)[..., None]
        rows = ngram_rows(grams, c).where(inside, c.ngram_tables * c.ngram_rows)
        return self._place(self._combine(x, rows), position)

    def _widen(self, patches: Tensor) -> Tensor:
        """Pooled patches → the global width."""
        wide = self.config.patch_queries * self.config.local_dim
        return patches if wide == self.config.global_dim else self.to_global(patches)
