"""Causal attention that never stores its scores: by cuDNN on NVIDIA GPUs, by Pallas on TPUs.

Axes: B batch, T positions, H heads in G groups, K head width, J head width of queries and keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bytelm_jax.kernels.backend import backend, is_pretended, target
from bytelm_jax.kernels.dtypes import is_low_precision
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
    slopes: Float[np.ndarray, " H"] | None = None,
) -> Float[Array, "B T H K"]:
    """Causal softmax attention by `fused_attention`, or by `plain()` if that is not available."""
    out = fused_attention(q, k, v, window, slopes)
    return plain() if out is None else out


def fused_attention(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T G J"],
    v: Float[Array, "B T G K"],
    window: int,
    slopes: Float[np.ndarray, " H"] | None = None,
) -> Float[Array, "B T H K"] | None:
    """Causal attention that never stores the scores; None if it is not available.

    It is available for 16-bit dtypes on an NVIDIA GPU, for heads whose width is a multiple of 8 and
    at most 128, from 64 positions on; and on a TPU from 256 positions on, without `slopes`. Each
    position sees itself and the `window` − 1 positions before it, or with `window=0` everything
    before it; scale K^-0.5. `slopes` add slope_h · j to the scores of key j (ALiBi); they take 8 of
    the 128. J, not below K, is what counts.
    """
    width, length = q.shape[-1] + (slopes is not None) * _ALIBI_FEATURES, q.shape[1]
    if backend() == "tpu":
        if slopes is not None:
            return None
        if length < SHORTEST or not is_low_precision(q):
            return None
        return splash_attention(q, k, v, window)
    fits = is_low_precision(q) and width % 8 == 0 and width <= 128
    if length < 64 or not fits or not has_fused_attention():
        return None
    if slopes is not None:
        q, k = with_alibi(q, k, slopes)
    # cuDNN's backward pass wants values as wide as queries; a layer cuts off what zeros give.
    values, v = v.shape[-1], jnp.pad(v, ((0, 0),) * 3 + ((0, width - v.shape[-1]),))
    if length % 2:
        # JAX has its gradient for even lengths only. One more key after all others is seen by one
        # more query only, whose output is dropped: nothing else changes.
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    if is_pretended():
        out = traced_attention(q, k, v)
    else:
        near = (window - 1, 0) if 0 < window < length else None
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=near, scale=values**-0.5,
            implementation="cudnn",
        )  # fmt: skip
    return out[:, :length, :, :values]


_ALIBI_FEATURES = 8
"""Features by which `with_alibi` widens queries and keys: six, and two that keep multiples of 8."""


def with_alibi(
    q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], slopes: Float[np.ndarray, " H"]
) -> tuple[Float[Array, "B T H J"], Float[Array, "B T G J"]]:
    """Queries and keys whose scores are q_i·k_j / √K + slope_h · j, in any floating-point dtype.

    Below 65,536 positions nothing of the slopes' float32 is lost in 16-bit dtypes: √K times a slope
    is the sum of three numbers of 8 digits, and j of a multiple of 256 and a rest. Their products
    are exact where they are added up in float32, as in every product of matrices.
    """
    position = np.arange(k.shape[1])
    rest, parts = slopes.astype(np.float64) * q.shape[-1] ** 0.5, []
    for _ in range(3):
        parts.append(rest.astype(q.dtype))
        rest = rest - parts[-1].astype(np.float64)
    low = position % 256
    more = [jnp.stack([x for part in parts for x in (part, part)], axis=-1)[None, None]]
    more.append(jnp.asarray(np.stack([position - low, low] * 3, axis=-1), k.dtype)[None, :, None])
    wider = []
    for x, features in zip((q, k), more, strict=True):
        features = jnp.broadcast_to(features, (*x.shape[:-1], features.shape[-1]))
        empty = ((0, 0),) * 3 + ((0, _ALIBI_FEATURES - features.shape[-1]),)
        wider.append(jnp.concatenate([x, jnp.pad(features, empty)], axis=-1))
    return wider[0], wider[1]
