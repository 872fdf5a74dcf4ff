"""Causal attention that never stores its scores, by JAX's Pallas kernel for TPUs.

Axes: B batch, T positions, H heads in G groups, K head width, J head width of queries and keys.
Head-major arrays are [B, H, T, K] and [B, G, T, K].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bytelm_jax.kernels.lookup import vary_like
from bytelm_jax.kernels.pallas import call_kernel
from bytelm_jax.kernels.partitioned import by_heads, is_partitioned
from bytelm_jax.kernels.rows import on_each_device

_LANES = 128
"""Positions of the smallest block."""

_BLOCKS = (512, 256, _LANES)

SHORTEST = 256
"""Positions from which on the kernel is used: the scores of fewer are small."""


def splash_attention(
    q: Float[Array, "B T H J"],
    k: Float[Array, "B T G J"],
    v: Float[Array, "B T G K"],
    window: int,
    interpret: bool = False,
) -> Float[Array, "B T H K"]:
    """Causal softmax attention; scale K^-0.5, scores and softmax in float32.

    Each position sees itself and the `window` − 1 positions before it, or with `window=0`
    everything before it. Any T: keys that fill up the last block stand after all queries that
    count. It has a gradient, but no forward mode. `interpret` runs the kernel on a CPU. Of devices
    that share layers each computes its own heads, with a key and value head that is the only one.
    """
    attend = partial(_attend, window if window < q.shape[1] else 0, interpret)
    if not is_partitioned():
        return on_each_device(lambda _, *rows: attend(*rows), (), q, k, v)
    if k.shape[2] > 1:
        return by_heads(lambda _, *rows: attend(*rows), (), q, k, v)
    return by_heads(lambda kv, q: attend(q, *(vary_like(x, q) for x in kv)), (k, v), q)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window: int, interpret: bool, q: Array, k: Array, v: Array) -> Array:
    return _forward(window, interpret, q, k, v)[0]


def _forward(window: int, interpret: bool, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    length, heads = q.shape[1:3]

    def run(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
        scaled = q * jnp.asarray(v.shape[-1] ** -0.5, q.dtype)
        inputs = map(_heads_first, (scaled, k, v))
        out, pull = jax.vjp(_kernel(window, interpret, heads, length + -length % _LANES), *inputs)
        return _heads_last(out, length), pull

    return call_kernel(run, q, q, k, v)


def _backward(window: int, interpret: bool, pull: Any, gradient: Array) -> tuple[Array, ...]:
    length, width = gradient.shape[1], gradient.shape[3]

    def run(pull: Any, gradient: Array) -> tuple[Array, ...]:
        to_q, *rest = (_heads_last(x, length) for x in pull(_heads_first(gradient)))
        return to_q * jnp.asarray(width**-0.5, to_q.dtype), *rest

    return call_kernel(run, gradient, pull, gradient)


_attend.defvjp(_forward, _backward)


def _heads_first(x: Array) -> Array:
    """[B, T, H, K] → [B, H, T, K], T filled up with zeros to a multiple of 128."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % _LANES), (0, 0)))


def _heads_last(x: Array, length: int) -> Array:
    return x[:, :, :length].swapaxes(1, 2)


def _kernel(window: int, interpret: bool, heads: int, length: int) -> Any:
    """The kernel for these sizes, over a batch."""
    # Imported here: a process that trains on a CPU or a GPU has no use for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    shape, block = (length, length), next(n for n in _BLOCKS if length % n == 0)
    one = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
        block_kv_dq=block,
    )  # fmt: skip
    attend = kernels.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return jax.vmap(attend)
