"""The entropy model: a plain causal byte transformer, by which BLT sets its patch boundaries.

Pagnoni et al. 2024 (arXiv 2412.09871), section 2.3. It is trained like every other model here, then
frozen inside the Byte Latent Transformer. Axes: B batch, T bytes, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from bytelm_jax.config import EntropyConfig
from bytelm_jax.layers.embedding import ByteEmbedding
from bytelm_jax.layers.initializers import fan_in_normal
from bytelm_jax.layers.norm import RMSNorm
from bytelm_jax.layers.transformer import Caches, Transformer
from bytelm_jax.models.interface import Choose, ModelOutput, check_ids


class EntropyModel(nnx.Module):
    """`logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`: the shift is inside."""

    def __init__(self, config: EntropyConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init = fan_in_normal(c.dim)
        self.embed = ByteEmbedding(c.vocab.size, c.dim, init, rngs=rngs)
        sizes = (c.dim, c.layers, c.heads, c.kv_heads, c.hidden_dim, c.window)
        self.transformer = Transformer(*sizes, c.rope_theta, c.dropout, rngs=rngs)
        self.norm = RMSNorm(c.dim)
        self.to_logits = nnx.Linear(
            c.dim, c.vocab.size, use_bias=False, kernel_init=init, rngs=rngs
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
    ) -> ModelOutput:
        """As `__call__`; the one metric is `entropy`, the mean over the row in nats."""
        check_ids(ids, self.config.vocab.size)
        logits = self.predict(shift_right(ids, self.config.vocab.bos_id), dropout_keys, remat)
        metrics = {"entropy": entropy(logits).sum(axis=1) / max(1, ids.shape[1])}
        return ModelOutput(logits, jnp.zeros((ids.shape[0],)), metrics)

    def predict(
        self,
        shifted: Int[Array, "B T"],
        dropout_keys: Key[Array, " B"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits of the byte behind each position of s = [BOS, ids[:, :-1]]."""
        x, _ = self.transformer(self.embed(shifted), dropout_keys, remat)
        return self.to_logits(self.norm(x))

    def predict_cached(self, shifted: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], Caches]:
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
        return self.transformer.empty_caches(batch, length, self.to_logits.kernel[...].dtype)

    def prefill(self, ids: Int[Array, "B T"], cache: Caches) -> Caches:
        """Writes a prompt into an empty cache in one pass.

        Rows past the true prompt may hold anything: a later round writes them before it reads.
        """
        _, written = self.predict_cached(shift_right(ids, self.config.vocab.bos_id))
        return write_prefix(cache, written)

    def decode_round(
        self,
        cache: Caches,
        previous: Int[Array, "B 1"],
        index: int | Int[Array, ""],
        choose: Choose,
    ) -> tuple[Caches, Int[Array, "B 1"]]:
        """Appends byte number `index`; `previous` is the byte before it (anything at first)."""
        index = jnp.asarray(index)
        logits, cache = self.extend(
            begin_with(previous, index, self.config.vocab.bos_id), cache, index
        )
        return cache, choose(logits, 0)[:, None]

    def extend(
        self, shifted: Int[Array, "B 1"], cache: Caches, index: Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], Caches]:
        """Logits of the byte behind position `index` of s, with the past taken from `cache`."""
        x, cache = self.transformer.extend(self.embed(shifted), cache, index)
        return self.to_logits(self.norm(x))[:, 0], cache


def entropy(logits: Float[Array, "*batch V"]) -> Float[Array, "*batch"]:
    """Entropy of softmax(logits) in nats, in at least float32."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    logs = jax.nn.log_softmax(wide, axis=-1)
    return -(jnp.exp(logs) * logs).sum(axis=-1)


def shift_right(ids: Int[Array, "B T"], bos_id: int) -> Int[Array, "B T"]:
    """s = [BOS, ids[:, :-1]]; empty stays empty."""
    return jnp.pad(ids, ((0, 0), (1, 0)), constant_values=bos_id)[:, : ids.shape[1]]


def begin_with(
    previous: Int[Array, "B 1"], index: Int[Array, ""], bos_id: int
) -> Int[Array, "B 1"]:
    """s_index: the byte before, BOS in the first round."""
    return jnp.where(index == 0, jnp.asarray(bos_id, previous.dtype), previous)


def write_prefix(caches: Caches, written: Caches) -> Caches:
    """`caches` with their first positions overwritten."""
    return jax.tree.map(
        lambda room, made: jax.lax.dynamic_update_slice_in_dim(room, made, 0, axis=1),
        caches,
        written,
    )
