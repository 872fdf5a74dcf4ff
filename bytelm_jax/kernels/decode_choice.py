"""Which kernels decode a few rows on each platform, and what they need before the first byte.

Written for GPUs and not chosen anywhere yet: `scripts/bench/bench_decode.py` measures them.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from bytelm_jax.kernels.backend import backend


class DecodeForm(NamedTuple):
    """How a round of a few rows is computed; the default is by XLA's own operations alone."""

    layers: str = "plain"
    """"plain", as XLA has it; "sums" of XLA alone (`decode_sums`); by Pallas "five" kernels a
    layer, or "three" where a layer is small and five elsewhere."""
    draws: bool = False
    """Whether one kernel draws a byte from its logits."""
    min_rows: int = 2
    """The smallest batch: with one row XLA's own products are slower, these kernels are not."""
    attention: str = ""
    """"sums" or "kernel"; by default that of the layers."""
    options: tuple[tuple[str, str | int], ...] = ()
    """Options of XLA's compiler for the loop over rounds."""

    @property
    def attends_by_kernel(self) -> bool:
        """Whether attention is Pallas' (`decode_attention`) and not a softmax between sums."""
        return (self.attention or ("sums" if self.layers == "sums" else "kernel")) == "kernel"


_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"

WHOLE_LOOP = (("xla_gpu_enable_command_buffer", _COMMANDS), ("xla_gpu_graph_min_graph_size", 1))
"""CUDA graphs hold loops and conditionals too: otherwise the host waits for their decisions."""

ONE_BY_ONE = (("xla_gpu_graph_min_graph_size", 1_000_000),)
"""No CUDA graphs: a profile shows each kernel."""

_FORMS: dict[str, DecodeForm] = {"gpu": DecodeForm()}
"""What each platform takes; others take the default with one row."""

MOST_ROWS = 16
"""Rows, of all texts and positions together, up to which a product is one of a few rows."""

FEW_TEXTS = 4
"""Texts up to which these kernels are used, and weights stored for them."""

_chosen: ContextVar[DecodeForm | None] = ContextVar("chosen", default=None)
_interpreted: ContextVar[bool] = ContextVar("interpreted", default=False)
_stored: ContextVar[Mapping[int, Any] | None] = ContextVar("stored", default=None)


def decode_form() -> DecodeForm:
    """The form of the platform that programs are traced for, or the one that was chosen."""
    return _chosen.get() or _FORMS.get(backend(), DecodeForm(min_rows=1))


def interpreted() -> bool:
    """Whether kernels run in Pallas' interpreter, which a CPU can do."""
    return _interpreted.get()


@contextlib.contextmanager
def choose_form(form: DecodeForm, interpret: bool = False) -> Iterator[None]:
    """Within this context programs are traced with `form`, for measurements and tests.

    Programs that were compiled before are not compiled again: their caches ask for `decode_form`.
    """
    before, mode = _chosen.set(form), _interpreted.set(interpret)
    try:
        yield
    finally:
        _chosen.reset(before)
        _interpreted.reset(mode)


@contextlib.contextmanager
def stored_weights(weights: Mapping[int, Any]) -> Iterator[None]:
    """Within this context the modules whose `id` is given find their weights by output."""
    before = _stored.set(weights)
    try:
        yield
    finally:
        _stored.reset(before)


def weights_of(module: Any, rows: int) -> Any:
    """What was stored for this module, if so few rows are computed by it; otherwise None."""
    weights = _stored.get()
    return None if weights is None or rows > MOST_ROWS else weights.get(id(module))


def draws_by_kernel(mode: str, rows: int) -> bool:
    """Whether `decode_draw.draw` draws in this mode of the sampler, for so few rows."""
    few = rows <= MOST_ROWS and bool(_stored.get())
    return few and decode_form().draws and mode in ("greedy", "plain")
