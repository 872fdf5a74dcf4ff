"""The entropy model: a plain causal byte transformer from which BLT derives patch boundaries.

Pagnoni et al. 2024 (arXiv 2412.09871), section 2.3. It is trained like every other model here, then
frozen inside the Byte Latent Transformer. Axes: B batch, T bytes, D width, V vocabulary.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor, nn

from bytelm.config import EntropyConfig, ModelConfig
from bytelm_torch.layers.caches import Index, positions_from, write_at, write_heads_at
from bytelm_torch.layers.embedding import ByteEmbedding
from bytelm_torch.layers.ids import as_ids, check_ids
from bytelm_torch.layers.initializers import fan_in_normal
from bytelm_torch.layers.logits import LogitsLinear
from bytelm_torch.layers.norm import RMSNorm
from bytelm_torch.layers.resets import extend_segment_starts, find_segment_starts
from bytelm_torch.layers.transformer import Caches, Transformer
from bytelm_torch.models import patching
from bytelm_torch.models.interface import ByteModel, ModelOutput


class EntropyCache(NamedTuple):
    """The state of cached decoding, by position, so that a round can be repeated."""

    layers: Caches
    segment_starts: Int[Tensor, "B M"]
    """The first position of each position's segment, M = L; M = 0 if the row is one text."""


class EntropyModel(ByteModel, nn.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: EntropyConfig):
        super().__init__()
        c = self.config = config
        self.embed = ByteEmbedding(c.vocab.size, c.dim, fan_in_normal(c.dim))
        sizes = (c.dim, c.layers, c.heads, c.kv_heads, c.hidden_dim, c.window)
        self.transformer = Transformer(*sizes, c.rope_theta, c.dropout)
        self.norm = RMSNorm(c.dim)
        self.to_logits = LogitsLinear(c.dim, c.vocab.size, bias=False)
        fan_in_normal(c.dim)(self.to_logits.weight)

    def forward(self, ids: Integer[Tensor, "B T"], remat: bool = False) -> Float[Tensor, "B T V"]:
        """Logits in at least float32; the compute dtype is that of the parameters.

        `ids` may have any integer dtype; one outside the vocabulary raises `ValueError`. `remat`
        recomputes the layers in the backward pass.
        """
        return self.outputs(ids, remat).logits

    def outputs(self, ids: Integer[Tensor, "B T"], remat: bool = False) -> ModelOutput:
        """Logits as from `forward`, and the metric `entropy`, the mean over the row in nats."""
        ids = check_ids(ids, self.config.vocab.size)
        segment_starts = segment_starts_of(ids, self.config)
        shifted = shift_right(ids, self.config.vocab.bos_id, segment_starts)
        logits = self.predict(shifted, segment_starts, remat)
        metrics = {"entropy": entropy(logits.detach()).sum(dim=1) / max(1, ids.shape[1])}
        return ModelOutput(logits, logits.new_zeros(ids.shape[0]), metrics)

    def predict(
        self,
        shifted: Int[Tensor, "B T"],
        segment_starts: Int[Tensor, "B T"] | None = None,
        remat: bool = False,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the byte after each position of s (`shift_right`).

        `segment_starts` as from `segment_starts_of`.
        """
        x, _ = self.transformer(self.embed(shifted), remat, segment_starts=segment_starts)
        return self.to_logits(self.norm(x))

    def predict_cached(
        self, shifted: Int[Tensor, "B T"], segment_starts: Int[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T V"], Caches]:
        """Logits as from `predict`, and every layer's keys and values."""
        x, caches = self.transformer(self.embed(shifted), segment_starts=segment_starts)
        return self.to_logits(self.norm(x)), caches

    def patch_starts(self, ids: Integer[Tensor, "B T"]) -> Bool[Tensor, "B T"] | None:
        """Whether a patch starts at each byte, with the threshold it was calibrated for."""
        if self.patching is None:
            return None
        config = replace(self.config.patcher_config(), threshold=self.patching.threshold)
        segment_starts = segment_starts_of(ids, config)
        shifted = shift_right(ids, config.vocab.bos_id, segment_starts)
        entropies = entropy(self.predict(shifted, segment_starts))
        # s_0 is BOS and s_{t+1} is byte t.
        return patching.patch_starts(config, shifted, entropies, segment_starts)[:, 1:]

    # Cached decoding: one round is one byte.

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> EntropyCache:
        """An empty cache for sequences of up to `length` bytes."""
        weight = self.to_logits.weight
        layers = self.transformer.empty_caches(batch, length, weight.dtype)
        return EntropyCache(layers, empty_segment_starts(batch, length, self.config, weight.device))

    def prefill(self, ids: Integer[Tensor, "B T"], cache: EntropyCache) -> EntropyCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads them.
        """
        segment_starts = segment_starts_of(ids, self.config)
        shifted = shift_right(ids, self.config.vocab.bos_id, segment_starts)
        _, written = self.predict_cached(shifted, segment_starts)
        write_segment_starts(cache.segment_starts, segment_starts)
        write_prefix(cache.layers, written)
        return cache

    def extend(
        self, before: Integer[Tensor, "B T"], cache: EntropyCache, index: Index
    ) -> tuple[Float[Tensor, "B T V"], EntropyCache]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each (ignored before the first).
        """
        shifted, segment_starts = extend_shifted(before, index, cache.segment_starts, self.config)
        logits, _ = self.predict_next(shifted, cache.layers, index, segment_starts)
        return logits, cache

    def predict_next(
        self,
        shifted: Int[Tensor, "B T"],
        caches: Caches,
        index: Index,
        segment_starts: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T V"], Caches]:
        """Cached version of `predict` for T positions of each row of s, from `index` on."""
        x, caches = self.transformer.extend(self.embed(shifted), caches, index, segment_starts)
        return self.to_logits(self.norm(x)), caches


def entropy(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    """Entropy of softmax(logits) in nats, in at least float32."""
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


def shift_right(
    ids: Integer[Tensor, "B T"], bos_id: int, segment_starts: Int[Tensor, "B T"] | None = None
) -> Int[Tensor, "B T"]:
    """s = [BOS, ids[:, :-1]], with BOS also where a segment starts; empty stays empty."""
    shifted = F.pad(as_ids(ids), (1, 0), value=bos_id)[:, : ids.shape[1]]
    if segment_starts is None:
        return shifted
    return shifted.where(segment_starts != torch.arange(ids.shape[1], device=ids.device), bos_id)


def segment_starts_of(
    ids: Integer[Tensor, "B T"], config: ModelConfig
) -> Int[Tensor, "B T"] | None:
    """Where the segment of each position starts; None if the model does not reset."""
    if config.reset_on == "none":
        return None
    return find_segment_starts(ids, config.vocab, config.reset_on)


def empty_segment_starts(
    batch: int, length: int, config: ModelConfig, device: torch.device
) -> Int[Tensor, "B M"]:
    """An empty buffer for `segment_starts_of` in a cache."""
    size = 0 if config.reset_on == "none" else length
    return torch.zeros((batch, size), dtype=torch.int64, device=device)


def write_segment_starts(
    buffer: Int[Tensor, "B M"], segment_starts: Int[Tensor, "B T"] | None
) -> Int[Tensor, "B M"]:
    """`buffer` with its first positions overwritten, in place."""
    if segment_starts is not None:
        buffer[:, : segment_starts.shape[1]] = segment_starts
    return buffer


def extend_shifted(
    before: Integer[Tensor, "B T"],
    index: Index,
    buffer: Int[Tensor, "B M"],
    config: ModelConfig,
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"] | None]:
    """Cached version of `shift_right` for T positions of each row, from `index` on.

    Also gives the segment starts of the T positions, which are written to `buffer`; None if the
    model does not reset.
    """
    before = as_ids(before)
    positions, bos = positions_from(index, before.shape[1], before.device), config.vocab.bos_id
    if config.reset_on == "none":
        return before.masked_fill(positions == 0, bos), None
    starts = extend_segment_starts(before, index, buffer, config.vocab, config.reset_on)
    write_at(buffer, starts, index)
    return before.masked_fill(starts == positions, bos), starts


def write_prefix(caches: Caches, written: Caches) -> Caches:
    """`caches`, by head, with their first positions overwritten, in place."""
    return write_heads_at(caches, written, 0)
