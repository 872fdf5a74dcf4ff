"""A model as the predictor of `bytelm.compression`: compiled steps of cached decoding, one shape.

A distribution's last bits depend on the program that computes it and on the shape. So there are two
small programs, one that begins a round and predicts its first byte and one for its other bytes, and
encoder and decoder call the same two.

Axes: S streams, P bytes per round, V vocabulary, W bytes per window.
"""

import functools
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from bytelm.compression.codec import Place, check_model
from bytelm.compression.coder import ONE
from bytelm.compression.container import DIGEST_BYTES
from bytelm.config import ByteVocab, to_dict
from bytelm.export import sum_of_json
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.kernels.reproducible import describe_machine, pinned_options


def compression_place(model: Any) -> Place:
    """Where this process compresses with `model`; raises `ValueError` if it cannot predict."""
    check_model(model.config)
    return Place(describe_machine, functools.partial(JaxPredictor, model))


class JaxPredictor:
    """`bytelm.compression.codec.Predictor` of a model, for S streams of windows of W bytes."""

    def __init__(self, model: Any, streams: int, window: int) -> None:
        check_model(model.config, window)
        self._structure, self._params = split_cached(model)
        self._vocab, self._patch = model.config.vocab, model.round_length
        self._shape = (streams, window)
        self._programs = _compile(self._structure)
        self._model = model
        self._cache: Any = None
        self._round: Any = None
        self._previous = np.zeros((streams, self._patch), np.int32)
        self._position = 0

    @property
    def model_digest(self) -> bytes:
        """Of the configuration and of every parameter's bits."""
        digest = blake2b(
            sum_of_json(to_dict(self._model.config)).encode(), digest_size=DIGEST_BYTES
        )
        for value in self._params:
            array = np.ascontiguousarray(jax.device_get(value))
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.digest()

    def restart(self) -> None:
        """Begins a new window in every stream."""
        self._cache = self._programs.empty(self._params, *self._shape)
        self._previous = np.full((self._shape[0], self._patch), self._vocab.pad_id, np.int32)
        self._position = 0

    def advance(self, before: np.ndarray) -> Array:
        """Cumulative counts uint32[S, 256] of the next byte; `before` uint8[S] is the last one."""
        index, i = divmod(self._position, self._patch)
        ids = before.astype(np.int32) + np.int32(self._vocab.offset)
        if self._position:
            # A copy: the array before it may still be on its way to the device.
            self._previous = self._previous.copy()
            self._previous[:, i - 1] = ids
        self._position += 1
        if i == 0:
            self._cache, self._round, table = self._programs.first(
                self._params, self._cache, self._previous, np.int32(index)
            )
        else:
            self._round, table = self._programs.other(self._params, self._round, ids, np.int32(i))
        return table


class _Programs(NamedTuple):
    """`empty` makes a cache, `first` begins a round, `other` goes on in it."""

    empty: Callable[..., Any]
    first: Callable[..., Any]
    other: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def _compile(structure: CompiledModelKey) -> _Programs:
    jit = functools.partial(jax.jit, compiler_options=pinned_options())

    def empty(params: list[Array], streams: int, window: int) -> Any:
        return structure.model(params).init_cache(streams, window)

    def first(params: list[Array], cache: Any, previous: Array, index: Array) -> Any:
        model = structure.model(params)
        cache, state, before = model.start_round(cache, previous, index)
        logits, state = model.round_logits(state, before, 0)
        return cache, state if model.round_length > 1 else (), _counts(logits, model.config.vocab)

    def other(params: list[Array], state: Any, before: Array, i: Array) -> Any:
        model = structure.model(params)
        logits, state = model.round_logits(state, before, i)
        return state, _counts(logits, model.config.vocab)

    return _Programs(
        jit(empty, static_argnums=(1, 2)),
        jit(first, donate_argnums=1),
        jit(other, donate_argnums=1),
    )


def _counts(logits: Float[Array, "S V"], vocab: ByteVocab) -> UInt32[Array, "S 256"]:
    """Cumulative integer frequencies of the 256 bytes, each at least 1; zeros if not finite."""
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    shares = shares[:, vocab.offset : vocab.offset + 256]
    counts = jnp.floor(shares * np.float32(ONE)).astype(jnp.uint32) + np.uint32(1)
    finite = jnp.isfinite(shares).all(axis=-1, keepdims=True)
    return jnp.where(finite, jnp.cumsum(counts, axis=-1, dtype=jnp.uint32), np.uint32(0))
