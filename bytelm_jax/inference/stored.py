"""Weights as decoding by sums reads them, written once before the first byte.

`kernels.decode_choice` says which platforms decode so, and how many texts.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from bytelm_jax.inference.compiled import CompiledModelKey
from bytelm_jax.kernels.decode_choice import decode_form
from bytelm_jax.kernels.decode_weights import LayerWeights


@runtime_checkable
class _Stores(Protocol):
    def decode_weights(self) -> Any:
        """The weights by output, or None if the module is not computed by sums."""
        ...


def weights_to_store(structure: CompiledModelKey, params: list[jax.Array], texts: int) -> list[Any]:
    """What the modules of a model store for so many texts; nothing where decoding is plain.

    That is also where one of its layers is not computed by sums, and in float64, in which results
    are compared.
    """
    if decode_form(texts) == "plain" or any(x.dtype == jnp.float64 for x in params):
        return []
    return _program(structure)(params)


@functools.lru_cache(maxsize=64)
def _program(structure: CompiledModelKey) -> Callable[[list[jax.Array]], list[Any]]:
    @jax.jit
    def store(params: list[jax.Array]) -> list[Any]:
        found = [module.decode_weights() for module in _modules(structure.model(params))]
        layers = any(isinstance(each, LayerWeights) for each in found)
        return found if layers and None not in found else []

    return store


def stored_by_module(model: Any, weights: list[Any]) -> dict[int, Any]:
    """What was stored for each module of `model`, by its `id`."""
    if not weights:
        return {}
    return dict(zip(map(id, _modules(model)), weights, strict=True))


def _modules(model: Any) -> list[_Stores]:
    """The modules that store something, in an order that is the same for every copy of a model."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, _Stores)]
