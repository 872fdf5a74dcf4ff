"""Which form of decoding a platform takes, and what it needs before the first byte."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from bytelm_jax.kernels.backend import backend

FEW_TEXTS = 1
"""Texts up to which a GPU decodes by sums. `scripts/bench/bench_decode.py` measured one."""

MOST_ROWS = 16
"""Rows, of all texts and positions together, up to which a product is one of a few rows."""

_chosen: ContextVar[str | None] = ContextVar("chosen", default=None)
_stored: ContextVar[Mapping[int, Any] | None] = ContextVar("stored", default=None)


def decode_form(texts: int) -> str:
    """How so many texts are decoded: "plain", as XLA has it, or by "sums" (`decode_sums`)."""
    return _chosen.get() or ("sums" if backend() == "gpu" and texts <= FEW_TEXTS else "plain")


@contextlib.contextmanager
def choose_form(form: str) -> Iterator[None]:
    """Within this context texts are decoded in `form`, for measurements and tests."""
    before = _chosen.set(form)
    try:
        yield
    finally:
        _chosen.reset(before)


@contextlib.contextmanager
def stored_weights(weights: Mapping[int, Any]) -> Iterator[None]:
    """Within this context the modules whose `id` is given find their weights by output."""
    before = _stored.set(weights)
    try:
        yield
    finally:
        _stored.reset(before)


def weights_of(module: Any, rows: Any) -> Any:
    """What was stored for this module, if so few rows are computed by it; otherwise None.

    An exported program, for which nothing is stored, may have any number of rows.
    """
    weights = _stored.get()
    return None if weights is None or rows > MOST_ROWS else weights.get(id(module))
