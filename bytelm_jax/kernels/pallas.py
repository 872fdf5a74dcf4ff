"""Pallas kernels of JAX inside programs that are divided over devices.

Two obstacles stand before a kernel that is no XLA operation. The compiler does not divide it:
`rows.on_each_device` does. And within `shard_map` the kernels that JAX ships do not say over which
devices their results vary, which its check demands.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def _varying(like: Array) -> tuple[str, ...]:
    return tuple(sorted(jax.typeof(like).manual_axis_type.varying))


def call_kernel(kernel: Callable[..., Any], like: Array, *arguments: Any) -> Any:
    """`kernel(*arguments)`; inside `shard_map` the results vary as `like` does.

    What they vary over is not checked within the kernel, so it cannot be differentiated from
    outside: its gradient is another kernel (`custom_vjp`).
    """
    axes = _varying(like)
    if not axes:
        return kernel(*arguments)

    def unmarked(*arguments: Any) -> Any:
        # Where nothing is checked, an operation's result is not marked as varying. A kernel's own
        # loops (in the interpreter) demand that their arguments are not, either.
        return kernel(*jax.tree.map(lambda x: jax.lax.squeeze(x[None], (0,)), arguments))

    unchecked = jax.shard_map(unmarked, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), unchecked(*arguments))
