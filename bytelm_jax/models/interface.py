"""What training and generation ask of every architecture, with what they share."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Shaped

Choose = Callable[[Array, int], Array]
"""`choose(logits [B, V], i) -> ids [B]`: picks the byte number i of the current round."""


class ModelOutput(NamedTuple):
    """What `model.outputs(ids, dropout_keys, remat)` gives; `model(...)` gives its logits alone.

    Everything but the logits is one value a row, so that data parallelism averages it exactly.
    """

    logits: Float[Array, "B T V"]
    extra_loss: Float[Array, " B"]
    """Added, averaged over the rows, to the mean cross-entropy: nats, coefficient included."""
    metrics: dict[str, Float[Array, " B"]]
    """Statistics for the training log, averaged over the rows."""


class Decoder(Protocol):
    """Cached decoding. A round appends `round_length` bytes; caches are passed in and returned."""

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        ...

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache for sequences of up to `length` bytes."""
        ...

    def prefill(self, ids: Integer[Array | np.ndarray, "B T"], cache: Any) -> Any:
        """Writes a prompt, T a multiple of `round_length`, into an empty cache in one pass."""
        ...

    def decode_round(
        self,
        cache: Any,
        previous: Integer[Array | np.ndarray, "B P"],
        index: Any,
        choose: Choose,
    ) -> tuple[Any, Int[Array, "B P"]]:
        """Appends round number `index`; `previous` holds the round before it (pads at first)."""
        ...


def write_at(buffers: Any, values: Any, index: int | Int[Array, ""]) -> Any:
    """The arrays of a tree of caches, overwritten by `values` from position `index` of axis 1
    on."""
    return jax.tree.map(
        lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(buffer, new, index, axis=1),
        buffers,
        values,
    )


def pack(caches: Any, lead: int) -> Shaped[Array, "*lead F"]:
    """The arrays of a tree side by side in one, all axes behind the first `lead` laid flat.

    So that one write serves many layers: in cached decoding of one text, time goes by the number of
    kernels and hardly by their size.
    """
    flat = [leaf.reshape(*leaf.shape[:lead], -1) for leaf in jax.tree.leaves(caches)]
    return jnp.concatenate(flat, axis=-1)


def unpack(packed: Shaped[Array, "*lead F"], template: Any) -> Any:
    """The tree that was packed; `template` has its structure and, behind the same axes, its
    shapes."""
    lead, leaves, start = packed.ndim - 1, [], 0
    for leaf in jax.tree.leaves(template):
        end = start + math.prod(leaf.shape[lead:])
        part = jax.lax.slice_in_dim(packed, start, end, axis=lead)
        leaves.append(part.reshape(*packed.shape[:lead], *leaf.shape[lead:]))
        start = end
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
