"""Where a text starts anew: behind each newline, or behind each document.

To a model with `reset_on`, what lies between two resets is a text of its own: its logits are those
of that text alone. Axes: B batch, T bytes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from bytelm_jax.config import ByteVocab


def ends_segment(
    ids: Int[Array, "*batch"], vocab: ByteVocab, reset_on: str
) -> Bool[Array, "*batch"]:
    """Whether the text starts anew behind each id: a newline, or with "document" an `eos_id`."""
    match reset_on:
        case "newline":
            return ids == vocab.offset + ord("\n")
        case "document":
            return ids == vocab.eos_id
        case _:
            return jnp.zeros_like(ids, dtype=bool)


def segment_begins(ids: Int[Array, "B T"], vocab: ByteVocab, reset_on: str) -> Int[Array, "B T"]:
    """The position at which the segment of each position begins; the id that ends it belongs to it.

    `ids` are the ids to be predicted, unshifted; a position's own id does not decide about it.
    """
    length = ids.shape[1]
    behind = jnp.where(ends_segment(ids, vocab, reset_on), 1 + jnp.arange(length)[None, :], 0)
    begins = jnp.pad(behind, ((0, 0), (1, 0)))[:, :length].astype(jnp.int32)
    return jax.lax.cummax(begins, axis=1)
