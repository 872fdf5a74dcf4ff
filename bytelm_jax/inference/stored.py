"""Weights as decoding kernels read them, written once before the first byte.

`kernels.decode_choice` says on which platforms, if any, there are such kernels.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from bytelm_jax.inference.compiled import CompiledModelKey
from bytelm_jax.kernels.decode_choice import FEW_TEXTS, DecodeForm


@runtime_checkable
class _Stores(Protocol):
    def decode_weights(self) -> Any:
        """The weights by output, or None if no kernel computes the module."""
        ...


def weights_to_store(
    structure: CompiledModelKey, form: DecodeForm, batch: int
) -> Callable[[list[jax.Array]], list[Any]]:
    """A function from a model's parameters to what its modules store; nothing for many texts."""
    if form.layers == "plain" or batch > FEW_TEXTS:
        return lambda params: []
    return _program(structure)


@functools.lru_cache(maxsize=64)
def _program(structure: CompiledModelKey) -> Callable[[list[jax.Array]], list[Any]]:
    @jax.jit
    def store(params: list[jax.Array]) -> list[Any]:
        return [module.decode_weights() for module in _modules(structure.model(params))]

    # There are no kernels for float64.
    return lambda params: [] if any(x.dtype == jnp.float64 for x in params) else store(params)


def stored_by_module(model: Any, weights: list[Any]) -> dict[int, Any]:
    """What was stored for each module of `model`, by its `id`."""
    if not weights:
        return {}
    return dict(zip(map(id, _modules(model)), weights, strict=True))


def _modules(model: Any) -> list[_Stores]:
    """The modules that store something, in an order that is the same for every copy of a model."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, _Stores)]
