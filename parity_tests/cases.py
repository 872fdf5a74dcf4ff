"""Which cases of a test run every time, and which with `scripts/test -m slow` alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def quick(names: Iterable[Any], *always: Any) -> list[Any]:
    """All of `names`: those of `always` run every time, and the rest are marked as slow.

    For a claim whose cases differ little in what they could find. Raises `ValueError` for one of
    `always` that is no name.
    """
    names = list(names)
    if missing := [name for name in always if name not in names]:
        raise ValueError(f"there is no case {missing[0]!r}: choose from {names}")
    slow = [name if isinstance(name, tuple) else (name,) for name in names]
    return [
        name if name in always else pytest.param(*values, marks=pytest.mark.slow)
        for name, values in zip(names, slow, strict=True)
    ]
