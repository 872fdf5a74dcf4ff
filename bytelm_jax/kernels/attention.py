"""Causal attention that never stores its scores: by cuDNN on NVIDIA GPUs, by Pallas on TPUs.

Axes: B batch, T positions, H heads in G groups, K head width, J head width of queries and keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm_jax.kernels.backend import backend, is_pretended, target
from bytelm_jax.kernels.dtypes import is_low_precision
from bytelm_jax.kernels.partitioned import is_partitioned
from bytelm_jax.kernels.splash_attention import SHORTEST, splash_attention


def has_fused_attention() -> bool:
    """Whether cuDNN's attention is available on the machine that layers are traced for.

    It is on NVIDIA GPUs from compute capability 8.0 on; AMD's platform is called "gpu" as well.
    """
    if backend() != "gpu" or is_pretended():
        return backend() == "gpu"
    capability = getattr(target(), "compute_capability", "")
    major, point, _ = capability.partition(".")  # "9.0", or AMD's "gfx942"
    return bool(point) and int(major) >= 8


@jax.custom_vjp
def traced_attention(
    q: Float[Array, "B T H J"], k: Float[Array, "B T G J"], v: Float[Array, "B T G K"]
) -> Float[Array, "B T H K"]:
    """Stands in for fused attention in a trace: its shapes and the residuals of its gradient."""
    return _traced_forward(q, k, v)[0]


def _traced_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    batch, length, heads, _ = q.shape
    out = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)
    statistics = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    results = jax.pure_callback(_refuse, (out, statistics), q, k, v)
    return results[0], (q, k, v, *results)


def _traced_backward(residuals: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals[:3])
    return jax.pure_callback(_refuse, shapes, *residuals, gradient)


traced_attention.defvjp(_traced_forward, _traced_backward)


def _refuse(*_: Array) -> None:
    raise RuntimeError("a program that was traced for another machine was run")


def fused_or_plain(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T G J"],
    v: Float[Array, "B T G K"],
    window: int,
    plain: Callable[[], Float[Array, "B T H K"]],
) -> Float[Array, "B T H K"]:
    """Causal softmax attention by `fused_attention`, or by `plain()` if that is not available."""
    out = fused_attention(q, k, v, window)
    return plain() if out is None else out


def fused_attention(
    q: Float[Array, "B T H J"], k: Float[Array, "B T G J"], v: Float[Array, "B T G K"], window: int
) -> Float[Array, "B T H K"] | None:
    """Causal attention that never stores the scores; None if it is not available.

    It is available for 16-bit dtypes on an NVIDIA GPU, for heads whose width is a multiple of 8 and
    at most 128, from 64 positions on; and on a TPU from 256 positions on. Each
    position sees itself and the `window` − 1 positions before it, or with `window=0` everything
    before it; scale K^-0.5.
    """
    width, length = q.shape[-1], q.shape[1]
    if backend() == "tpu":
        # The kernel is not divided by heads, as layers that devices share need it.
        if length < SHORTEST or not is_low_precision(q) or is_partitioned():
            return None
        return traced_attention(q, k, v) if is_pretended() else splash_attention(q, k, v, window)
    fits = is_low_precision(q) and width == v.shape[-1] and width % 8 == 0 and width <= 128
    if length < 64 or not fits or not has_fused_attention():
        return None
    if length % 2:
        # JAX has its gradient for even lengths only. One more key after all others is seen by one
        # more query only, whose output is dropped: nothing else changes.
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    if is_pretended():
        out = traced_attention(q, k, v)
    else:
        near = (window - 1, 0) if 0 < window < length else None
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=near, implementation="cudnn"
        )
    return out[:, :length] if length % 2 else out
