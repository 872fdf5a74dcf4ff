"""The entropy model: a plain causal byte transformer, by which BLT sets its patch boundaries.

Pagnoni et al. 2024 (arXiv 2412.09871), section 2.3. It is trained like every other model here, then
frozen inside the Byte Latent Transformer. Axes: B batch, T bytes, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm_torch.config import EntropyConfig
from bytelm_torch.layers.embedding import ByteEmbedding
from bytelm_torch.layers.initializers import fan_in_normal
from bytelm_torch.layers.norm import RMSNorm
from bytelm_torch.layers.transformer import Caches, Transformer
from bytelm_torch.models.interface import Choose, ModelOutput, check_ids


class EntropyModel(nn.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: EntropyConfig):
        super().__init__()
        c = self.config = config
        self.embed = ByteEmbedding(c.vocab.size, c.dim, fan_in_normal(c.dim))
        sizes = (c.dim, c.layers, c.heads, c.kv_heads, c.hidden_dim, c.window)
        self.transformer = Transformer(*sizes, c.rope_theta, c.dropout)
        self.norm = RMSNorm(c.dim)
        self.to_logits = nn.Linear(c.dim, c.vocab.size, bias=False)
        fan_in_normal(c.dim)(self.to_logits.weight)

    def forward(self, ids: Int[Tensor, "B T"], remat: bool = False) -> Float[Tensor, "B T V"]:
        """Logits in the compute dtype, which is that of the parameters.

        `remat` recomputes the layers in the backward pass. Ids outside the vocabulary raise
        `ValueError`.
        """
        return self.outputs(ids, remat).logits

    def outputs(self, ids: Int[Tensor, "B T"], remat: bool = False) -> ModelOutput:
        """As `forward`; the one metric is `entropy`, the mean over the row in nats."""
        check_ids(ids, self.config.vocab.size)
        logits = self.predict(shift_right(ids, self.config.vocab.bos_id), remat)
        metrics = {"entropy": entropy(logits.detach()).sum(dim=1) / max(1, ids.shape[1])}
        return ModelOutput(logits, logits.new_zeros(ids.shape[0]), metrics)

    def predict(self, shifted: Int[Tensor, "B T"], remat: bool = False) -> Float[Tensor, "B T V"]:
        """Logits of the byte behind each position of s = [BOS, ids[:, :-1]]."""
        x, _ = self.transformer(self.embed(shifted), remat)
        return self.to_logits(self.norm(x))

    def predict_cached(self, shifted: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B T V"], Caches]:
        """The same and every layer's keys and values."""
        x, caches = self.transformer(self.embed(shifted))
        return self.to_logits(self.norm(x)), caches

    # Cached decoding: one round is one byte.

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return 1

    def init_cache(self, batch: int, length: int) -> Caches:
        """An empty cache for sequences of up to `length` bytes."""
        return self.transformer.empty_caches(batch, length, self.to_logits.weight.dtype)

    def prefill(self, ids: Int[Tensor, "B T"], cache: Caches) -> Caches:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
        _, written = self.predict_cached(shift_right(ids, self.config.vocab.bos_id))
        return write_prefix(cache, written)

    def decode_round(
        self, cache: Caches, previous: Int[Tensor, "B 1"], index: int, choose: Choose
    ) -> tuple[Caches, Int[Tensor, "B 1"]]:
        """Appends byte number `index`; `previous` is the byte before it (anything at first)."""
        shifted = begin_with(previous, index, self.config.vocab.bos_id)
        logits, cache = self.extend(shifted, cache, index)
        return cache, choose(logits, 0)[:, None]

    def extend(
        self, shifted: Int[Tensor, "B 1"], cache: Caches, index: int
    ) -> tuple[Float[Tensor, "B V"], Caches]:
        """Logits of the byte behind position `index` of s, with the past taken from `cache`."""
        x, cache = self.transformer.extend(self.embed(shifted), cache, index)
        return self.to_logits(self.norm(x))[:, 0], cache


def entropy(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    """Entropy of softmax(logits) in nats, in at least float32."""
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1)


def shift_right(ids: Int[Tensor, "B T"], bos_id: int) -> Int[Tensor, "B T"]:
    """s = [BOS, ids[:, :-1]]; empty stays empty."""
    return F.pad(ids, (1, 0), value=bos_id)[:, : ids.shape[1]]


def begin_with(previous: Int[Tensor, "B 1"], index: int, bos_id: int) -> Int[Tensor, "B 1"]:
    """s_index: the byte before, BOS in the first round."""
    return torch.full_like(previous, bos_id) if index == 0 else previous


def write_prefix(caches: Caches, written: Caches) -> Caches:
    """`caches` with their first positions overwritten, in place."""
    for room, made in zip(caches, written, strict=True):
        for old, new in zip(room, made, strict=True):
            old[:, : new.shape[1]] = new
    return caches
