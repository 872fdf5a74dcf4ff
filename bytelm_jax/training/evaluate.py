"""Exact bits per byte: the code length of every byte, each counted once."""

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer

from bytelm_jax.layers.ids import as_ids
from bytelm_jax.models import Params, cast_params
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training.loss import bits_per_byte, token_nats


class Evaluation(NamedTuple):
    """Summed nats and how many ids they cover (bytes, and end-of-document ids where asked)."""

    nats: float
    count: int

    @property
    def bits_per_byte(self) -> float:
        """Mean code length in bits."""
        return bits_per_byte(self.nats, self.count)


RowNats = Callable[[Params, Integer[Array, "B T"]], tuple[Float[Array, " B"], Int[Array, " B"]]]


def make_row_nats(
    bind: Callable[[Params], Any],
    pad_id: int,
    mesh: Mesh,
    dtype: jnp.dtype,
    end_id: int | None = None,
) -> RowNats:
    """The compiled function from ids to each row's summed nats and count of ids, pads left out.

    `end_id` is left out, too: the ends of documents, where the model reads them and bytes count.
    """

    def row_nats(params: Params, ids: Integer[Array, "B T"]) -> tuple[Array, Array]:
        ids = as_ids(ids)
        logits = bind(meshes.gather(mesh, cast_params(params, dtype)))(ids)
        counted = ids != pad_id if end_id is None else (ids != pad_id) & (ids != end_id)
        nats = jnp.where(counted, token_nats(logits, ids), 0.0).sum(axis=1)
        return nats, counted.sum(axis=1)

    return jax.jit(row_nats, out_shardings=meshes.replicated(mesh))


def evaluate(
    row_nats: RowNats, params: Params, batches: Iterable[np.ndarray], mesh: Mesh
) -> Evaluation:
    """Sums over `batches` of ids int[B, T], this process's rows of them; added exactly (`fsum`)."""
    waiting: deque[tuple[Array, Array]] = deque()
    nats: list[float] = []
    count = 0

    def drain(keep: int) -> None:
        nonlocal count
        while len(waiting) > keep:
            rows, counts = jax.device_get(waiting.popleft())
            nats.extend(rows.tolist())
            count += int(counts.sum())

    for ids in batches:
        waiting.append(row_nats(params, meshes.put_batch(mesh, ids)))
        drain(4)  # more steps in flight can deadlock simulated devices on few cores
    drain(0)
    return Evaluation(math.fsum(nats), count)
