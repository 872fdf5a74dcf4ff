"""Masked cross-entropy as (sum of nats, count of predicted ids)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from bytelm_jax.layers.ids import as_ids


def cross_entropy(
    logits: Float[Array, "B T V"],
    ids: Integer[Array | np.ndarray, "B T"],
    pad_id: int,
    counted: Bool[Array | np.ndarray, "B T"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed nats of `ids` under `logits`, and the number of counted ids: all but pads.

    `counted` says which of them are; it leaves out bytes that are read and not learned.

    Computed in at least float32. The mean is left to the caller, because devices and micro-batches
    must add nats and counts before they divide.
    """
    ids = as_ids(ids)
    counted = counted_ids(ids, pad_id, counted)
    nats = jnp.where(counted, token_nats(logits, ids), 0.0)
    return nats.sum(), counted.sum()


def counted_ids(
    ids: Integer[Array, "B T"], pad_id: int, counted: Bool[Array | np.ndarray, "B T"] | None
) -> Bool[Array, "B T"]:
    """Which ids are counted: all but pads, and only those that `counted` says, if it is given."""
    return ids != pad_id if counted is None else (ids != pad_id) & jnp.asarray(counted)


def row_nats(
    logits: Float[Array, "B T V"],
    ids: Integer[Array | np.ndarray, "B T"],
    pad_id: int,
    counted: Bool[Array | np.ndarray, "B T"] | None = None,
) -> Float[Array, " B"]:
    """`cross_entropy`'s nats, summed over each row alone."""
    ids = as_ids(ids)
    nats = token_nats(logits, ids)
    return jnp.where(counted_ids(ids, pad_id, counted), nats, 0.0).sum(axis=1)


def source_sums(
    values: Shaped[Array, " B"], sources: Int[Array, " B"], count: int
) -> Shaped[Array, " sources"]:
    """Sums of the rows' values over the rows of each of `count` sources."""
    theirs = sources[:, None] == jnp.arange(count)[None]
    return jnp.where(theirs, values[:, None], 0).sum(axis=0)


def token_nats(
    logits: Float[Array, "*batch V"], ids: Integer[Array | np.ndarray, "*batch"]
) -> Float[Array, "*batch"]:
    """Surprise of each id in nats, in at least float32."""
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A comparison instead of a gather: its gradient fuses with the softmax, whereas a gather's is a
    # scatter-add over [B, T, V].
    hit = jax.nn.one_hot(as_ids(ids), wide.shape[-1], dtype=jnp.bool_)
    picked = jnp.where(hit, wide, 0.0).sum(axis=-1)
    return jax.nn.logsumexp(wide, axis=-1) - picked
