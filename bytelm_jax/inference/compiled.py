"""A model taken apart for compiled functions, without a walk through all of it at every call.

`nnx.split` takes about 20 ms for a dozen layers, as long as generating a hundred bytes.
"""

import functools
import operator
import weakref
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array


class CompiledModelKey:
    """A model but for its arrays: its classes and config. Equal for models of one config."""

    def __init__(self, graphdef: Any, treedef: Any):
        self._parts = (graphdef, treedef)
        self._hash = hash(self._parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompiledModelKey) and self._parts == other._parts

    def model(self, params: list[Array]) -> Any:
        """The model with these arrays, in the order of `split_cached`."""
        graphdef, treedef = self._parts
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, params))


class _Parts(NamedTuple):
    structure: CompiledModelKey
    variables: list[nnx.Variable]
    nodes: list[tuple[dict[str, Any], dict[str, Any]]]
    """The attributes of each module and what they were."""


_known: weakref.WeakKeyDictionary[nnx.Module, _Parts] = weakref.WeakKeyDictionary()


def split_cached(model: nnx.Module) -> tuple[CompiledModelKey, list[Array]]:
    """The structure and the arrays, as they are now.

    A plain list of arrays: JAX walks through a flax state in Python at every call.
    """
    parts = _known.get(model)
    if parts is None or not _as_before(parts):
        parts = _known[model] = _parts_of(model)
    return parts.structure, [variable.get_value() for variable in parts.variables]


def _as_before(parts: _Parts) -> bool:
    """Whether no attribute of any module has been set, added or deleted since."""
    return all(
        list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))
        for now, before in parts.nodes
    )


def _parts_of(model: nnx.Module) -> _Parts:
    graphdef, state = nnx.split(model)
    treedef = jax.tree.structure(state)
    modules, found = [], {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            found[path] = node
        elif isinstance(node, nnx.Pytree):
            modules.append((vars(node), dict(vars(node))))
    # A flat state and the leaves of its tree have one order: that of the sorted paths.
    variables = [found[path] for path, _ in nnx.to_flat_state(state)]
    return _Parts(_same(CompiledModelKey(graphdef, treedef)), variables, modules)


@functools.lru_cache(maxsize=64)
def _same(structure: CompiledModelKey) -> CompiledModelKey:
    """The first structure that equals this one, so that comparing ends at the identity."""
    return structure
