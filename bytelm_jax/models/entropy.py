"""The entropy model: a plain causal byte transformer from which BLT derives patch boundaries.

Pagnoni et al. 2024 (arXiv 2412.09871), section 2.3. It is trained like every other model here, then
frozen inside the Byte Latent Transformer. Axes: B batch, T bytes, D width, V vocabulary.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from bytelm.config import EntropyConfig, ModelConfig
from bytelm_jax.layers.caches import (
    Index,
    in_each_row,
    positions_from,
    write_at,
    write_heads_at,
)
from bytelm_jax.layers.embedding import ByteEmbedding
from bytelm_jax.layers.ids import as_ids, check_ids
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.logits import LogitsLinear
from bytelm_jax.layers.norm import RMSNorm
from bytelm_jax.layers.resets import extend_segment_starts, find_segment_starts
from bytelm_jax.layers.transformer import Caches, Transformer
from bytelm_jax.models import patching
from bytelm_jax.models.interface import ByteModel, ModelOutput


class EntropyCache(NamedTuple):
    """The state of cached decoding, by position, so that a round can be repeated."""

    layers: Caches
    segment_starts: Int[Array, "B M"]
    """The first position of each position's segment, M = L; M = 0 if the row is one text."""


class EntropyModel(ByteModel, nnx.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: EntropyConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init = fan_in_normal(c.dim)
        self.embed = ByteEmbedding(c.vocab.size, c.dim, init, rngs=rngs)
        sizes = (c.dim, c.layers, c.heads, c.kv_heads, c.hidden_dim, c.window)
        self.transformer = Transformer(*sizes, c.rope_theta, c.dropout, rngs=rngs)
        self.norm = RMSNorm(c.dim)
        self.to_logits = LogitsLinear(
            c.dim, c.vocab.size, use_bias=False, kernel_init=init, rngs=rngs
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
    ) -> ModelOutput:
        """Logits as from `__call__`, and the metric `entropy`, the mean over the row in nats."""
        ids = check_ids(ids, self.config.vocab.size)
        segment_starts = segment_starts_of(ids, self.config)
        shifted = shift_right(ids, self.config.vocab.bos_id, segment_starts)
        logits = self.predict(shifted, segment_starts, dropout_keys, remat)
        metrics = {"entropy": entropy(logits).sum(axis=1) / max(1, ids.shape[1])}
        return ModelOutput(logits, jnp.zeros((ids.shape[0],)), metrics)

    def predict(
        self,
        shifted: Int[Array, "B T"],
        segment_starts: Int[Array, "B T"] | None = None,
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits of the byte after each position of s (`shift_right`).

        `segment_starts` as from `segment_starts_of`.
        """
        x, _ = self.transformer(
            self.embed(shifted), dropout_keys, remat, segment_starts=segment_starts
        )
        return self.to_logits(self.norm(x))

    def predict_cached(
        self, shifted: Int[Array, "B T"], segment_starts: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T V"], Caches]:
        """Logits as from `predict`, and every layer's keys and values."""
        x, caches = self.transformer(self.embed(shifted), segment_starts=segment_starts)
        return self.to_logits(self.norm(x)), caches

    def patch_starts(self, ids: Integer[Array | np.ndarray, "B T"]) -> Bool[Array, "B T"] | None:
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
        dtype = self.to_logits.kernel[...].dtype
        layers = self.transformer.empty_caches(batch, length, dtype)
        return EntropyCache(layers, empty_segment_starts(batch, length, self.config))

    def prefill(self, ids: Integer[Array | np.ndarray, "B T"], cache: EntropyCache) -> EntropyCache:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads them.
        """
        segment_starts = segment_starts_of(ids, self.config)
        shifted = shift_right(ids, self.config.vocab.bos_id, segment_starts)
        _, written = self.predict_cached(shifted, segment_starts)
        return EntropyCache(
            write_prefix(cache.layers, written),
            write_segment_starts(cache.segment_starts, segment_starts),
        )

    def extend(
        self,
        before: Integer[Array | np.ndarray, "B T"],
        cache: EntropyCache,
        index: Index,
    ) -> tuple[Float[Array, "B T V"], EntropyCache]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each (ignored before the first).
        """
        index = in_each_row(index, before.shape[0])
        shifted, written, segment_starts = extend_shifted(
            before, index, cache.segment_starts, self.config
        )
        logits, layers = self.predict_next(shifted, cache.layers, index, segment_starts)
        return logits, EntropyCache(layers, written)

    def predict_next(
        self,
        shifted: Int[Array, "B T"],
        caches: Caches,
        index: Int[Array, " B"],
        segment_starts: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], Caches]:
        """Cached version of `predict` for T positions of each row of s, from `index` on."""
        x, caches = self.transformer.extend(self.embed(shifted), caches, index, segment_starts)
        return self.to_logits(self.norm(x)), caches


def entropy(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Entropy of softmax(logits) in nats, in at least float32."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logs = jax.nn.log_softmax(wide, axis=-1)
    return -(jnp.exp(logs) * logs).sum(axis=-1)


def shift_right(
    ids: Integer[Array | np.ndarray, "B T"],
    bos_id: int,
    segment_starts: Int[Array, "B T"] | None = None,
) -> Int[Array, "B T"]:
    """s = [BOS, ids[:, :-1]], with BOS also where a segment starts; empty stays empty."""
    shifted = jnp.pad(as_ids(ids), ((0, 0), (1, 0)), constant_values=bos_id)[:, : ids.shape[1]]
    if segment_starts is None:
        return shifted
    return jnp.where(segment_starts == jnp.arange(ids.shape[1])[None, :], bos_id, shifted)


def segment_starts_of(
    ids: Integer[Array | np.ndarray, "B T"], config: ModelConfig
) -> Int[Array, "B T"] | None:
    """Where the segment of each position starts; None if the model does not reset."""
    if config.reset_on == "none":
        return None
    return find_segment_starts(ids, config.vocab, config.reset_on)


def empty_segment_starts(batch: int, length: int, config: ModelConfig) -> Int[Array, "B M"]:
    """An empty buffer for `segment_starts_of` in a cache."""
    return jnp.zeros((batch, 0 if config.reset_on == "none" else length), jnp.int32)


def write_segment_starts(
    buffer: Int[Array, "B M"], segment_starts: Int[Array, "B T"] | None
) -> Int[Array, "B M"]:
    """`buffer` with its first positions overwritten."""
    return (
        buffer
        if segment_starts is None
        else buffer.at[:, : segment_starts.shape[1]].set(segment_starts)
    )


def extend_shifted(
    before: Integer[Array | np.ndarray, "B T"],
    index: Int[Array, " B"],
    buffer: Int[Array, "B M"],
    config: ModelConfig,
) -> tuple[Int[Array, "B T"], Int[Array, "B M"], Int[Array, "B T"] | None]:
    """Cached version of `shift_right` for T positions of each row, from `index` on.

    Also gives the updated buffer of segment starts and those of the T positions, None if the model
    does not reset.
    """
    before, positions = as_ids(before), positions_from(index, before.shape[1])
    bos = jnp.asarray(config.vocab.bos_id, before.dtype)
    if config.reset_on == "none":
        return jnp.where(positions == 0, bos, before), buffer, None
    starts = extend_segment_starts(before, index, buffer, config.vocab, config.reset_on)
    return jnp.where(starts == positions, bos, before), write_at(buffer, starts, index), starts


def write_prefix(caches: Caches, written: Caches) -> Caches:
    """`caches`, by head, with their first positions overwritten."""
    return write_heads_at(caches, written, 0)
