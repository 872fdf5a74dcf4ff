"""What training and generation need from every architecture, and helpers shared by them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from bytelm.config import PatchingContract
from bytelm_jax.layers.caches import Index, in_each_row, positions_from, take_at, write_at
from bytelm_jax.layers.ids import as_ids

Choose = Callable[[Array, int], Array]
"""`choose(logits [B, V], i) -> ids [B]`: chooses byte number i of the current round."""


class ModelOutput(NamedTuple):
    """The result of `model.outputs(ids, dropout_keys, remat)`; `model(...)` gives only its logits.

    Everything but the logits is one value per row, so that data parallelism averages it exactly.
    """

    logits: Float[Array, "B T V"]
    extra_loss: Float[Array, " B"]
    """Averaged over the rows and added to the mean cross-entropy: nats, coefficient included."""
    metrics: dict[str, Float[Array, " B"]]
    """Statistics for the training log, averaged over the rows."""


class ByteModel:
    """What every model has unless it says otherwise: no patches, and decoding without a cache.

    Its decoding (see `Decoder`) takes a full forward pass for every byte, so that a causal model
    generates before it has cached decoding. What it passes on as a cache are a pad and the ids.
    """

    config: Any
    patching: PatchingContract | None = None
    """The contract of the run that the model comes from, if there is one."""
    training_length: int = 0
    """The bytes of the windows on which the model was trained; 0 if that is not known."""

    def patch_starts(self, ids: Integer[Array | np.ndarray, "B T"]) -> Bool[Array, "B T"] | None:
        """Whether a patch starts at each byte; None for a model without patches."""
        return None

    @property
    def has_cached_decoding(self) -> bool:
        """Whether the model decodes from a cache of its own."""
        return type(self).extend is not ByteModel.extend

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        return 1

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> Any:
        """Room for the ids of sequences of up to `length` bytes."""
        return jnp.full((batch, 1 + length), self.config.vocab.pad_id, jnp.int32)

    def prefill(self, ids: Integer[Array | np.ndarray, "B T"], cache: Any) -> Any:
        """Writes a prompt, which may be padded: later rounds overwrite the padding."""
        return write_at(cache, jnp.asarray(ids, cache.dtype), 1)

    @property
    def prefills_in_parts(self) -> bool:
        """Whether `prefill_further` takes less work than `prefill` of everything again."""
        return True

    def prefill_further(
        self, previous: Integer[Array | np.ndarray, "B T"], cache: Any, index: Index
    ) -> Any:
        """Writes T more bytes of a prompt; `previous` holds the byte before each of them."""
        if not self.has_cached_decoding:
            return write_at(cache, jnp.asarray(previous, cache.dtype), index)
        return self.extend(previous, cache, index)[1]

    def extend(
        self, before: Integer[Array | np.ndarray, "B T"], cache: Any, index: Index
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Logits of T bytes of each row, which no id from there on changes, and the new cache."""
        before = as_ids(before)
        index = in_each_row(index, before.shape[0])
        cache = write_at(cache, before.astype(cache.dtype), index)
        model: Any = self
        return take_at(model(cache[:, 1:]), positions_from(index, before.shape[1])), cache

    def verify(
        self, before: Integer[Array | np.ndarray, "B T"], cache: Any, index: Index
    ) -> tuple[Float[Array, "B T V"], Any, Int[Array, " B"]]:
        """`extend` for drafts; also gives how many of each row's logits hold, at least 1."""
        model: Any = self
        logits, cache = model.extend(before, cache, index)
        return logits, cache, jnp.full(before.shape[0], before.shape[1], jnp.int32)

    def decode_round(
        self,
        cache: Any,
        previous: Integer[Array | np.ndarray, "B P"],
        index: Index,
        choose: Choose,
    ) -> tuple[Any, Int[Array, "B P"]]:
        """Appends byte number `index`, of all rows or of each; `previous` is the byte before it.

        `choose(logits [B, V], 0)` gives its ids [B].
        """
        logits, cache = self.extend(previous, cache, index)
        return cache, as_ids(choose(logits[:, 0], 0))[:, None]

    def start_round(
        self, cache: Any, previous: Integer[Array | np.ndarray, "B P"], index: Any
    ) -> tuple[Any, Any, Int[Array, " B"]]:
        """The part of `decode_round` before its first byte: the cache, the round, a first `before`.

        `round_logits` takes the round byte by byte, for callers that choose outside of a program.
        """
        heard: list[Array] = []
        before = as_ids(previous)[:, -1]

        def choose(logits: Array, i: int) -> Array:
            heard.append(logits)
            return before

        cache, _ = self.decode_round(cache, previous, index, choose)
        if len(heard) != 1:
            raise NotImplementedError(f"{type(self).__name__}.start_round: rounds of several bytes")
        return cache, heard[0], before

    def round_logits(
        self, state: Any, before: Int[Array, " B"], i: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], Any]:
        """The logits of a round's byte number i, and the round with `before`, the byte before it.

        For i = 0, `before` is the one that `start_round` gave.
        """
        return state, state


class Decoder(Protocol):
    """Cached decoding. A round appends `round_length` bytes; caches are passed in and returned."""

    @property
    def round_length(self) -> int:
        """Bytes that one call of `decode_round` appends."""
        ...

    def init_cache(self, batch: int, length: int, by_byte: bool = False) -> Any:
        """An empty cache for sequences of up to `length` bytes.

        Only one made `by_byte` serves `extend` where a round is several bytes.
        """
        ...

    @property
    def prefills_in_parts(self) -> bool:
        """Whether `prefill_further` takes less work than `prefill` of everything again."""
        ...

    def prefill(self, ids: Integer[Array | np.ndarray, "B T"], cache: Any) -> Any:
        """Writes a prompt, T a multiple of `round_length`, into an empty cache in one pass.

        The prompt may be padded, and decoding continue from its true end: a cache keeps its state
        by position, and later rounds overwrite what the padding left.
        """
        ...

    def prefill_further(
        self, previous: Integer[Array | np.ndarray, "B T"], cache: Any, index: Index
    ) -> Any:
        """Writes more of a prompt, from round number `index` on, of all rows or of each.

        `previous` holds the T bytes that lie a round before them (pads at first); T is a multiple
        of `round_length`. What follows the prompt's true end is overwritten later, as in `prefill`.
        """
        ...

    def decode_round(
        self,
        cache: Any,
        previous: Integer[Array | np.ndarray, "B P"],
        index: Index,
        choose: Choose,
    ) -> tuple[Any, Int[Array, "B P"]]:
        """Appends round number `index`, of all rows or of each.

        `previous` holds the round before it (pads at first).
        """
        ...

    def extend(
        self, before: Integer[Array | np.ndarray, "B T"], cache: Any, index: Index
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Logits of T bytes of each row, from byte number `index` on; also gives the new cache.

        `before` holds the byte before each of them (anything before the first). All that is
        kept by position, so a caller may go back to an earlier index: what was written from there
        on is overwritten before it is read.
        """
        ...

    def verify(
        self, before: Integer[Array | np.ndarray, "B T"], cache: Any, index: Index
    ) -> tuple[Float[Array, "B T V"], Any, Int[Array, " B"]]:
        """`extend` for drafts; also gives how many of each row's logits hold, at least 1.

        A model may stop where more bytes would cost more than they are worth.
        """
        ...

    def start_round(
        self, cache: Any, previous: Integer[Array | np.ndarray, "B P"], index: Any
    ) -> tuple[Any, Any, Int[Array, " B"]]:
        """The part of `decode_round` before its first byte: the cache, the round, a first `before`.

        `ByteModel` has it for rounds of one byte.
        """
        ...

    def round_logits(
        self, state: Any, before: Int[Array, " B"], i: int | Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], Any]:
        """The logits of a round's byte number i, after the byte `before`, and the round with it."""
        ...


def pack(caches: Any, lead: int) -> Shaped[Array, "*lead F"]:
    """The arrays of a tree concatenated into one, with all axes after the first `lead` flattened.

    One write then serves many layers: when decoding one text from a cache, time depends on the
    number of kernels and hardly on their size.
    """
    flat = [leaf.reshape(*leaf.shape[:lead], -1) for leaf in jax.tree.leaves(caches)]
    return jnp.concatenate(flat, axis=-1)


def unpack(packed: Shaped[Array, "*lead F"], template: Any) -> Any:
    """Undoes `pack`; `template` has the tree's structure and, after those axes, its shapes."""
    lead, leaves, start = packed.ndim - 1, [], 0
    for leaf in jax.tree.leaves(template):
        end = start + math.prod(leaf.shape[lead:])
        part = jax.lax.slice_in_dim(packed, start, end, axis=lead)
        leaves.append(part.reshape(*packed.shape[:lead], *leaf.shape[lead:]))
        start = end
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def pack_heads(caches: Any, axis: int) -> Shaped[Array, "B _ _ J"]:
    """Keys and values of several layers in one array; `axis` is that of their heads, 1 or 2.

    Serves as `pack`, but that each layer's heads stay together; zeros fill the narrower ones.
    """
    leaves = jax.tree.leaves(caches)
    widest = max(leaf.shape[-1] for leaf in leaves)

    def wide(leaf: Array) -> Array:
        return jnp.pad(leaf, ((0, 0),) * 3 + ((0, widest - leaf.shape[-1]),))

    return jnp.concatenate([wide(leaf) for leaf in leaves], axis=axis)


def unpack_heads(packed: Shaped[Array, "B _ _ J"], template: Any, axis: int) -> Any:
    """Undoes `pack_heads`; `template` has the tree's structure, heads and widths."""
    leaves, start = [], 0
    for leaf in jax.tree.leaves(template):
        end = start + leaf.shape[axis]
        part = jax.lax.slice_in_dim(packed, start, end, axis=axis)
        leaves.append(part[..., : leaf.shape[-1]])
        start = end
    return jax.tree.unflatten(jax.tree.structure(template), leaves)
