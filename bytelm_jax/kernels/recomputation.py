"""What a backward pass computes again from what was kept, in place of keeping more.

A compiler sees that the backward pass repeats expressions of the forward pass, computes them once
and keeps the results, in float32 where they are wide: a GELU that keeps only its 16-bit input kept
four times its bytes beside it.
"""

import jax
from jaxtyping import Array


def computed_again(*values: Array) -> tuple[Array, ...]:
    """The values, in a form of which no compiler knows that it has computed with them before."""
    return jax.lax.optimization_barrier(values)
