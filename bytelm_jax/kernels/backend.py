"""Which kernels the layers choose: those of the machine, or those of one that a trace imitates.

Some layers compute the same in another way on a GPU or a TPU. What a program for such a machine
would keep in memory can be asked of a CPU as well, as long as nothing is computed.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_imitated: ContextVar[str] = ContextVar("imitated", default="")


def backend() -> str:
    """The kind of machine that layers should suit: "cpu", "gpu" or "tpu"."""
    return _imitated.get() or jax.default_backend()


@contextlib.contextmanager
def imitate(name: str) -> Iterator[None]:
    """Within, whatever is traced is traced for the machine `name`. For shapes alone: not to run."""
    before = _imitated.set(name)
    try:
        yield
    finally:
        _imitated.reset(before)


def is_imitated() -> bool:
    """Whether kernels of another machine are traced, which JAX may refuse to do here."""
    return bool(_imitated.get())
