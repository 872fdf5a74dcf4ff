"""The checker of annotations that conftest.py hooks into every import: beartype, once a signature.

A function inside another is defined at every call, and making its checks takes beartype
longer than most of our functions run. What is made depends on nothing but the signature, and is
made at the first call: a process of tests calls less than half of what it imports.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_checked_functions: dict[Any, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which does nothing but have a signature (jaxtyping makes it), with its checks."""
    checks = None

    @functools.wraps(function)
    def check(*arguments: Any, **options: Any) -> Any:
        nonlocal checks
        if checks is None:
            checks = _checks(function)
        return checks(*arguments, **options)

    return check


def _checks(function: Callable[..., Any]) -> Callable[..., Any]:
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
