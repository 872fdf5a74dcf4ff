"""Modules that can be called, where a package has a function and a module of one name."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Lets the imported module called `name` be called as `function`.

    A package has one attribute for `package.verb`, the function, and for `package/verb.py`, the
    module, so that the one imported last would hide the other. A module that can be called is both,
    in whatever order they are imported.
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    module = sys.modules[name]
    module.__class__ = CallableModule
    module.__wrapped__ = function  # for `inspect.signature`, and so for editors and notebooks
