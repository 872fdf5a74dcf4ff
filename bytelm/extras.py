"""Packages that only some of the work needs, and that pip installs as extras of this one."""

import importlib
from typing import Any


def import_extra(name: str, extra: str) -> Any:
    """A module that the extra installs.

    Raises `ValueError`, in one line, if its package is not installed, or lacks one of its own.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package, install = name.partition(".")[0], f"pip install 'bytelm[{extra}]'"
        why = "is not installed"
        if isinstance(error, ModuleNotFoundError) and error.name not in (package, name):
            why = f"cannot be imported without {error.name}, which is not installed"
        elif not isinstance(error, ModuleNotFoundError):
            why = f"cannot be imported ({error})"
        raise ValueError(f"{package}: {why}; {install}") from None
