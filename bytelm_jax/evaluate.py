"""Exact bits per byte: the code length of every byte, each counted once."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from bytelm_jax import parallel
from bytelm_jax.loss import bits_per_byte, token_nats
from bytelm_jax.models import Params, cast_params


class Evaluation(NamedTuple):
    """Summed nats and how many ids they cover (bytes, and end-of-document ids where asked)."""

    nats: float
    count: int

    @property
    def bits_per_byte(self) -> float:
        """Mean code length in bits."""
        return bits_per_byte(self.nats, self.count)


RowNats = Callable[[Params, Int[Array, "B T"]], Float[Array, " B"]]


def make_row_nats(
    bind: Callable[[Params], Any],
    pad_id: int,
    mesh: Mesh,
    dtype: jnp.dtype,
    end_id: int | None = None,
) -> RowNats:
    """The compiled function from ids to the summed nats of each row, pads left out.

    `end_id` is left out, too: the ends of documents, where the model reads them and bytes count.
    """

    def row_nats(params: Params, ids: Int[Array, "B T"]) -> Float[Array, " B"]:
        logits = bind(cast_params(params, dtype))(ids)
        counted = ids != pad_id if end_id is None else (ids != pad_id) & (ids != end_id)
        return jnp.where(counted, token_nats(logits, ids), 0.0).sum(axis=1)

    whole, split = parallel.replicated(mesh), parallel.by_row(mesh)
    return jax.jit(row_nats, in_shardings=(whole, split), out_shardings=whole)


def evaluate(
    row_nats: RowNats,
    params: Params,
    batches: Iterable[np.ndarray],
    pad_id: int,
    mesh: Mesh,
    end_id: int | None = None,
) -> Evaluation:
    """Sums over `batches` of ids int[B, T]; rows are added exactly (`math.fsum`).

    Pads are left out, and `end_id` as in `make_row_nats`.
    """
    waiting: deque[Array] = deque()
    nats: list[float] = []
    count = 0
    for ids in batches:
        count += int(((ids != pad_id) & (ids != (pad_id if end_id is None else end_id))).sum())
        waiting.append(row_nats(params, parallel.put_batch(mesh, ids)))
        if len(waiting) > 4:  # more steps in flight can deadlock simulated devices on few cores
            nats.extend(np.asarray(waiting.popleft()).tolist())
    for rows in waiting:
        nats.extend(np.asarray(rows).tolist())
    return Evaluation(math.fsum(nats), count)
