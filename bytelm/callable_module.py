"""Callable modules, for packages that have a function and a module of the same name."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Makes the imported module called `name` callable as `function`.

    A package has one attribute for both `package.verb`, the function, and `package/verb.py`, the
    module, so that whichever is imported last would hide the other. A callable module is both, in
    any order of imports.
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    module = sys.modules[name]
    module.__class__ = CallableModule
    vars(module)["__wrapped__"] = function  # for `inspect.signature`
