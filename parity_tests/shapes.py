"""What conftest.py hooks into every import: annotations are enforced by beartype, shapes included.

A call is checked unless the same function has been called with arguments of the same shapes before:
in PyTorch, which runs every call again, checks would take three quarters of the tests' time. And a
function inside another is defined at every call: what it has been called with is known by its code,
its annotations and what it takes from around it.
"""

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

_checked_functions: dict[Any, Callable[..., Any]] = {}
_passed: dict[Any, set[Any]] = defaultdict(set)
_jaxtyped = jaxtyping.jaxtyped
_PLAIN = (type(None), bool, int, float, str, bytes)
_MOST = 256
"""Shapes of one function that are kept, and entries of a container that are looked at."""


def install() -> None:
    """From here on `jaxtyping.jaxtyped`, which its import hook asks for, is `once_a_shape`."""
    jaxtyping.jaxtyped = once_a_shape


def once_a_shape(function: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyped`, which lets a call pass if one with arguments of the same shapes has passed."""
    if function is None:
        return functools.partial(once_a_shape, typechecker=typechecker)
    if not inspect.isfunction(function) or inspect.isgeneratorfunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    annotations = tuple(map(str, function.__annotations__.values()))
    # A size in braces is computed from arguments: `{count}`, `{self.dim}`.
    values = any("{" in each for each in annotations)
    full: Any = None
    around: Any = None

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal full, around
        try:
            if around is None:
                cells = (cell.cell_contents for cell in function.__closure__ or ())
                around = function.__code__, annotations, _shapes(tuple(cells), True, False)
            passed = _passed[around]
            key = _shapes((arguments, options) if options else arguments, values, values)
            if key in passed:
                return function(*arguments, **options)
        except (TypeError, RecursionError):  # a size without a value, many entries, or deep ones
            passed, key = set(), None
        if full is None:
            full = _jaxtyped(function, typechecker=typechecker)
        result = full(*arguments, **options)
        if len(passed) < _MOST:
            passed.add(key)
        return result

    return call


def _shapes(value: Any, values: bool, objects: bool) -> Any:
    """What checks depend on: the shape and dtype of arrays, and the kind of everything.

    Of what is no array also the value, with `values`, or which one it is, with `objects`.
    """
    kind = type(value)
    if kind in _PLAIN:
        return (kind, value) if values else kind
    if isinstance(value, tuple | list | dict):
        if len(value) > _MOST:
            raise TypeError("too many entries")
        parts = value.items() if isinstance(value, dict) else value
        return kind, tuple(_shapes(part, values, objects) for part in parts)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return kind, tuple(value.shape), value.dtype
    return (kind, id(value)) if objects else kind


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which does nothing but have a signature (jaxtyping makes it), with its checks."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    key = (
        (function.__module__, function.__qualname__, signature.return_annotation),
        # Defaults too, which beartype may look at; True is 1, but not of its type.
        tuple((p.name, p.kind, p.annotation, type(p.default), p.default) for p in parameters),
    )
    try:
        known = _checked_functions.get(key)
    except TypeError:  # an array, or whatever else has no hash
        return beartype(function)
    if known is None:
        known = _checked_functions[key] = beartype(function)
    return known
