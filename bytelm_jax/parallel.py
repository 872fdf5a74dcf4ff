"""Devices: mesh, shardings, and the train step over them. The only file that names a mesh axis.

Models and losses run on one device unchanged. The step exists in two forms, equal to rounding:
`jit`, where the compiler places the collectives, and `shard_map`, where they are written out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Int

from bytelm_jax.config import TrainConfig
from bytelm_jax.loss import cross_entropy
from bytelm_jax.models import Params, cast_params
from bytelm_jax.optim import global_norm, without

DATA = "data"
"""The mesh axis along which the rows of a batch are spread."""


class TrainState(NamedTuple):
    """Everything that a step changes. `step` counts finished steps."""

    step: Array
    params: Params
    opt_state: Any


def make_mesh(devices: int = 0) -> Mesh:
    """A mesh over the first `devices` local devices; 0 means all."""
    local = jax.local_devices()
    if devices > len(local):
        raise ValueError(f"devices={devices}: this machine has {len(local)}; ask for at most that")
    chosen = local[: devices or len(local)]
    return jax.make_mesh((len(chosen),), (DATA,), axis_types=(AxisType.Auto,), devices=chosen)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters, optimizer state and scalars."""
    return NamedSharding(mesh, jax.P())


def by_row(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: rows over the devices."""
    return NamedSharding(mesh, jax.P(DATA))


def put_batch(mesh: Mesh, rows: np.ndarray) -> Array:
    """This process's rows of the global batch → the global array."""
    return jax.make_array_from_process_local_data(by_row(mesh), rows)


def check_batch(mesh: Mesh, train: TrainConfig) -> None:
    """Raises `ValueError` unless the batch divides evenly over devices and micro-batches."""
    parts = mesh.size * train.accumulation_steps
    if train.batch_size % parts:
        raise ValueError(
            f"batch_size={train.batch_size}: must be a multiple of {parts} ({mesh.size} devices "
            f"x {train.accumulation_steps} accumulation_steps); or ask for fewer devices"
        )


def compute_dtype(train: TrainConfig) -> jnp.dtype:
    """The dtype of products: what the config says, or what suits this machine."""
    name = train.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def init_state(mesh: Mesh, optimizer: optax.GradientTransformation, init: Callable) -> TrainState:
    """`init() -> params`, run once under jit so that every array is born where it belongs."""

    def make() -> TrainState:
        params = init()
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    # It runs once: on a CPU, compiling it with all optimisations takes longer than it could save.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(make, out_shardings=replicated(mesh), compiler_options=options)()


def abstract_state(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of `state`, for a restore."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _over_micro_batches(function: Callable, rows: Any, parts: int) -> Any:
    """The sum of `function` over `parts` micro-batches, one after another.

    Micro-batch i takes rows i, i + parts, …: each device cuts its own rows, nothing moves.
    """
    cut = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows
    )
    total = function(*jax.tree.map(lambda x: x[0], cut))
    if parts > 1:
        rest = jax.tree.map(lambda x: x[1:], cut)
        total, _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, function(*part)), None), total, rest
        )
    return total


def make_train_step(
    bind: Callable[[Params], Any],
    optimizer: optax.GradientTransformationExtraArgs,
    train: TrainConfig,
    pad_id: int,
    mesh: Mesh,
    frozen: tuple[str, ...] = (),
) -> Callable[[TrainState, Int[Array, "B T"]], tuple[TrainState, dict[str, Array]]]:
    """The compiled step `(state, ids) -> (state, metrics)`; `state` is donated.

    Metrics: `loss` (nats, mean over all counted ids of the global batch), `grad_norm`, and what
    the model reports, averaged over rows. Gradients of micro-batches are added before they are
    used, so `accumulation_steps` changes memory and nothing else. Parameters whose names begin with
    one of `frozen` have no gradient and leave the step as they came, bit for bit.
    """
    check_batch(mesh, train)
    manual = train.parallel == "shard_map"
    dtype, seed = compute_dtype(train), jax.random.key(train.seed)

    def over_devices(x: Any) -> Any:
        return jax.lax.psum(x, DATA) if manual else x

    def micro_loss(
        params: Params, fixed: Params, ids: Array, keys: Array, count: Array, total_rows: int
    ):
        output = bind(cast_params(params | fixed, dtype)).outputs(ids, keys, train.remat)
        nats, _ = cross_entropy(output.logits, ids, pad_id)
        # The sum over devices belongs inside the differentiated function: the gradient of a
        # replicated parameter is summed by shard_map itself, and averaging it once more outside
        # would be wrong by the number of devices, which AdamW would hide.
        nats, extra, metrics = over_devices(
            (nats, output.extra_loss.sum(), {k: v.sum() for k, v in output.metrics.items()})
        )
        return nats / count + extra / total_rows, (nats, metrics)

    def step(state: TrainState, ids: Array) -> tuple[TrainState, dict[str, Array]]:
        rows, micro = ids.shape[0], train.accumulation_steps
        first = jax.lax.axis_index(DATA) * rows if manual else 0
        total_rows = rows * mesh.size if manual else rows
        step_key = jax.random.fold_in(seed, state.step)
        keys = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(first + jnp.arange(rows))
        count = jnp.maximum(over_devices(jnp.sum(ids != pad_id)), 1)
        gradient = jax.value_and_grad(micro_loss, has_aux=True)
        moving = without(state.params, frozen)
        fixed = {k: v for k, v in state.params.items() if k not in moving}

        total = _over_micro_batches(
            lambda *part: gradient(moving, fixed, *part, count, total_rows), (ids, keys), micro
        )
        (loss, (nats, metrics)), gradients = total
        updates, opt_state = optimizer.update(gradients, state.opt_state, moving, value=loss)
        params = jax.tree.map(jnp.add, moving, updates) | fixed
        report = {k: v / total_rows for k, v in metrics.items()}
        report |= {"loss": nats / count, "grad_norm": global_norm(gradients)}
        return TrainState(state.step + 1, params, opt_state), report

    whole, split = replicated(mesh), by_row(mesh)
    if manual:
        step = jax.shard_map(step, mesh=mesh, in_specs=(jax.P(), jax.P(DATA)), out_specs=jax.P())
    return jax.jit(
        step, in_shardings=(whole, split), out_shardings=(whole, whole), donate_argnums=0
    )
