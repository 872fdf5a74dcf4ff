"""Which kernels the layers choose: those of the machine, or those of one that a trace imitates.

Some layers compute the same in another way on a GPU or a TPU. What a program for such a machine
would keep in memory can be asked of a CPU as well, as long as nothing is computed.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def has_fused_attention() -> bool:
    """Whether cuDNN's attention runs on the machine that layers should suit.

    It does on NVIDIA's GPUs, from compute capability 8.0 on; AMD's are called "gpu" as well.
    """
    if backend() != "gpu" or is_imitated():
        return backend() == "gpu"
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    major, point, _ = capability.partition(".")  # "9.0", or AMD's "gfx942"
    return bool(point) and int(major) >= 8


def is_imitated() -> bool:
    """Whether kernels of another machine are traced, which JAX may refuse to do here."""
    return bool(_imitated.get())


@jax.custom_vjp
def traced_attention(
    q: Float[Array, "B T H J"], k: Float[Array, "B T G J"], v: Float[Array, "B T G K"]
) -> Float[Array, "B T H K"]:
    """Stands for cuDNN's attention in a trace: its shapes, and what it keeps for its gradient."""
    return _traced_forward(q, k, v)[0]


def _traced_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    batch, length, heads, _ = q.shape
    out = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)
    statistics = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    made = jax.pure_callback(_refuse, (out, statistics), q, k, v)
    return made[0], (q, k, v, *made)


def _traced_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept[:3])
    return jax.pure_callback(_refuse, shapes, *kept, gradient)


traced_attention.defvjp(_traced_forward, _traced_backward)


def _refuse(*_: Array) -> None:
    raise RuntimeError("a program traced for another machine was run")
