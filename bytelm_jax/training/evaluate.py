"""Exact bits per byte: the code length of every byte, each counted once."""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Integer

from bytelm.config import default_length
from bytelm.config.lfbyte import require_prediction
from bytelm.data import Batch, Corpus, evaluation_batches, scored_windows
from bytelm.metrics import Evaluation
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.kernels.backend import compiling_for
from bytelm_jax.layers.ids import as_ids
from bytelm_jax.models import cast_params
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training.loss import counted_ids, token_nats


def evaluate(
    model: Any,
    data: bytes | Sequence[bytes] | Corpus,
    length: int | None = None,
    batch_size: int = 16,
    stride: int = 0,
) -> Evaluation:
    """The exact code length of `data` under `model`: every byte counted once, dropout off.

    `data` is a document, several, or a corpus (`bytelm.data.open_corpus`). They are joined and cut
    into windows of `length` bytes, each of which the model sees alone. By default they have the
    training length, or if the model does not know it, 512 bytes or the model's longest input if
    that is less. With a `stride` below the length windows overlap, and each byte is counted where
    it has most before it. `batch_size` windows are computed at once, spread over all devices.
    Arithmetic is in the dtype of the parameters. Raises `ValueError` for data without bytes, for
    windows that are too long, and for a model whose logits depend on the bytes they should predict.
    """
    require_prediction(model.config)
    length = default_length(model.config, model.training_length) if length is None else length
    windows, end_id = scored_windows(model.config, data, length, stride)
    mesh = meshes.make_mesh()
    part = meshes.process_slice(mesh)
    rows = -(-min(batch_size, len(windows)) // mesh.size) * mesh.size
    batches = evaluation_batches(windows, rows, None, *part)
    structure, params = split_cached(model)
    row_nats = _model_row_nats(structure, windows.vocab.pad_id, mesh, end_id)
    return evaluate_batches(row_nats, meshes.place(mesh, params), batches, mesh)


RowNats = Callable[..., tuple[Float[Array, " B"], Int[Array, " B"]]]


ByteNats = Callable[..., tuple[Float[Array, "B T"], Bool[Array, "B T"]]]


def make_byte_nats(
    bind: Callable[[Any], Any],
    pad_id: int,
    mesh: Mesh,
    dtype: jnp.dtype | None,
    end_id: int | None = None,
) -> ByteNats:
    """As `make_row_nats`, but for each id: its nats, 0 where it is not counted, and if it is."""

    def byte_nats(
        params: Any, ids: Integer[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Array, Array]:
        return _byte_nats(bind, pad_id, mesh, dtype, end_id, params, ids, mask)

    return jax.jit(byte_nats, out_shardings=meshes.replicated(mesh))


def make_row_nats(
    bind: Callable[[Any], Any],
    pad_id: int,
    mesh: Mesh,
    dtype: jnp.dtype | None,
    end_id: int | None = None,
) -> RowNats:
    """The compiled function from parameters and ids to each row's summed nats and count of ids.

    A third argument, bool[B, T], says which ids are counted. Pads are excluded, and so is `end_id`:
    the ends of documents, for models that read them where only bytes count. Parameters, `Params` or
    whatever `bind` takes, are cast to `dtype`, or unchanged if it is None.
    """

    def row_nats(
        params: Any, ids: Integer[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> tuple[Array, Array]:
        nats, counted = _byte_nats(bind, pad_id, mesh, dtype, end_id, params, ids, mask)
        return nats.sum(axis=1), counted.sum(axis=1)

    return jax.jit(row_nats, out_shardings=meshes.replicated(mesh))


def _byte_nats(
    bind: Callable[[Any], Any],
    pad_id: int,
    mesh: Mesh,
    dtype: jnp.dtype | None,
    end_id: int | None,
    params: Any,
    ids: Array,
    mask: Array | None,
) -> tuple[Array, Array]:
    ids = as_ids(ids)
    cast = params if dtype is None else cast_params(params, dtype)
    with compiling_for(mesh.devices.flat[0]), meshes.layers_on(mesh):
        logits = bind(meshes.gather(mesh, cast))(ids)
    counted = counted_ids(ids, pad_id, mask)
    counted = counted if end_id is None else counted & (ids != end_id)
    return jnp.where(counted, token_nats(logits, ids), 0.0), counted


@functools.lru_cache(maxsize=8)
def _model_row_nats(
    structure: CompiledModelKey, pad_id: int, mesh: Mesh, end_id: int | None
) -> RowNats:
    return make_row_nats(structure.model, pad_id, mesh, None, end_id)


def evaluate_batches(
    row_nats: RowNats, params: Any, batches: Iterable[Batch], mesh: Mesh
) -> Evaluation:
    """Sums over `batches`, this process's rows of them; added exactly (`fsum`)."""
    nats: list[float] = []
    count = 0
    for rows, counts in evaluated_batches(row_nats, params, batches, mesh):
        nats.extend(rows.tolist())
        count += int(counts.sum())
    return Evaluation(math.fsum(nats), count)


def evaluated_batches(
    function: RowNats | ByteNats, params: Any, batches: Iterable[Batch], mesh: Mesh
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the function gives for each batch, in order, on the host."""
    waiting: deque[tuple[Array, Array]] = deque()
    for batch in batches:
        mask = () if batch.counted is None else (meshes.put_batch(mesh, batch.counted),)
        waiting.append(function(params, meshes.put_batch(mesh, batch.ids), *mask))
        if len(waiting) > 4:  # more steps in flight can deadlock simulated devices on few cores
            yield jax.device_get(waiting.popleft())
    while waiting:
        yield jax.device_get(waiting.popleft())
