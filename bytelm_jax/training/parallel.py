"""Devices: mesh, shardings, and the train step over them. The only file that names a mesh axis.

Models and losses run on one device unchanged. The rows of a batch are spread over all devices;
parameters and optimizer state are cut over the `fsdp` of them that make up a group and repeated
from group to group (Rajbhandari et al. 2020, stage 3; Zhao et al. 2023, "hybrid sharding"). The
step exists in two forms, equal to rounding: `jit`, where the compiler places the collectives, and
`shard_map`, where they are written out.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, Integer

from bytelm.config import TrainConfig
from bytelm_jax.layers.ids import as_ids
from bytelm_jax.models import Params, cast_params
from bytelm_jax.optimizers.build import global_norm, optimizer_metrics, without
from bytelm_jax.training.loss import cross_entropy

DATA = "data"
"""The mesh axis along which whole copies of the parameters are spread."""

FSDP = "fsdp"
"""The mesh axis along which one copy of the parameters is cut."""

_ROWS = (DATA, FSDP)
"""The rows of a batch are spread along both."""

_WHOLE_BELOW = 1024
"""Parameters with fewer elements, norms and biases mostly, are not worth a collective each."""

_SUMMED_WHOLE_BELOW = 1 << 20
"""Gradients with fewer elements may travel whole."""


class TrainState(NamedTuple):
    """Everything that a step changes. `step` counts finished steps."""

    step: Array
    params: Params
    opt_state: Any


def make_mesh(devices: int = 0, fsdp: int = 1) -> Mesh:
    """A mesh over the first `devices` devices (0: all, of all processes), in groups of `fsdp`."""
    known, processes = jax.devices(), jax.process_count()
    if devices > len(known):
        raise ValueError(f"devices={devices}: there are {len(known)}; ask for at most that")
    if processes > 1 and devices not in (0, len(known)):
        raise ValueError(
            f"devices={devices}: {processes} processes use all their {len(known)}; leave it out"
        )
    count = devices or len(known)
    if count % fsdp:
        raise ValueError(f"fsdp={fsdp}: must divide the number of devices, {count}")
    shape, kinds = (count // fsdp, fsdp), (AxisType.Auto,) * len(_ROWS)
    mesh = jax.make_mesh(shape, _ROWS, axis_types=kinds, devices=known[:count])
    if _own_rows(mesh) is None:  # an order that suits the wires better, but not our files
        mesh = Mesh(np.asarray(known[:count]).reshape(shape), _ROWS, axis_types=kinds)
    return mesh


def _own_rows(mesh: Mesh) -> int | None:
    """Which of the processes' equal, contiguous parts of every batch is this one's, if any."""
    places = by_row(mesh).addressable_devices_indices_map((mesh.size,)).values()
    rows = sorted(place[0].indices(mesh.size)[0] for place in places if place)
    contiguous = bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
    even = contiguous and mesh.size % len(rows) == 0 and rows[0] % len(rows) == 0
    return rows[0] // len(rows) if even else None


def own_part(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of the n equal parts that each batch is cut into."""
    index = _own_rows(mesh)
    assert index is not None  # made so by `make_mesh`
    return index, mesh.size // len(mesh.local_devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole: scalars and metrics."""
    return NamedSharding(mesh, jax.P())


def by_row(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: rows over the devices."""
    return NamedSharding(mesh, jax.P(_ROWS))


def _cut_axis(mesh: Mesh, shape: tuple[int, ...]) -> int | None:
    """The axis along which an array of the state is cut: the longest that divides evenly."""
    parts = mesh.shape[FSDP]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not axes or math.prod(shape) < _WHOLE_BELOW:
        return None
    return max(axes, key=lambda axis: shape[axis])


def _cut(mesh: Mesh, shape: tuple[int, ...]) -> jax.P:
    axis = _cut_axis(mesh, shape)
    return jax.P() if axis is None else jax.P(*(None,) * axis, FSDP)


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """The shardings of parameters and optimizer state, by one rule: a leaf's shape decides."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _cut(mesh, leaf.shape)), tree)


def place(mesh: Mesh, tree: Any) -> Any:
    """Arrays of this process, the same in every process, as part of the state."""
    return jax.device_put(tree, state_shardings(mesh, tree))


def fetch(mesh: Mesh, tree: Any) -> Any:
    """Arrays of the state, whole, as numpy arrays in every process."""
    return jax.device_get(jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree))


def gather(mesh: Mesh, params: Params) -> Params:
    """Parameters whole on every device, inside a jitted function; gradients come back cut."""
    if mesh.shape[FSDP] == 1:
        return params

    def constrain(tree: Params, shardings: Any) -> Params:
        return jax.lax.with_sharding_constraint(tree, shardings)

    @jax.custom_vjp
    def whole(tree: Params) -> Params:
        # Cut once more first: else the compiler may move the gathering before the cast that comes
        # before it, and twice the bytes would travel.
        return constrain(constrain(tree, state_shardings(mesh, tree)), replicated(mesh))

    def cut(gradients: Params) -> Params:
        # The gradient of a constraint is the same constraint: whole gradients on every device, of
        # which each needs its own part only. Small ones are summed whole all the same: the compiler
        # would rather gather all that an embedding's product reads.
        parts = state_shardings(mesh, gradients)
        first = {
            name: replicated(mesh) if leaf.size < _SUMMED_WHOLE_BELOW else parts[name]
            for name, leaf in gradients.items()
        }
        return constrain(constrain(gradients, first), parts)

    whole.defvjp(lambda tree: (whole(tree), None), lambda _, gradients: (cut(gradients),))
    return whole(params)


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
    return compile_init(optimizer, init, abstract_init(mesh, optimizer, init))()


def compile_init(
    optimizer: optax.GradientTransformation, init: Callable, like: TrainState
) -> Callable[[], TrainState]:
    """What makes the state in `init_state`, compiled; `like` is what `abstract_init` gives."""
    # It runs once: on a CPU, compiling it with all optimisations takes longer than it could save.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    shardings = jax.tree.map(lambda x: x.sharding, like)
    make = _initialiser(optimizer, init)
    return jax.jit(make, out_shardings=shardings, compiler_options=options).lower().compile()


def abstract_init(
    mesh: Mesh, optimizer: optax.GradientTransformation, init: Callable
) -> TrainState:
    """Shapes, dtypes and shardings of what `init_state` makes."""
    shapes = jax.eval_shape(_initialiser(optimizer, init))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        state_shardings(mesh, shapes),
    )


def _initialiser(
    optimizer: optax.GradientTransformation, init: Callable
) -> Callable[[], TrainState]:
    def make() -> TrainState:
        params = init()
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return make


@contextlib.contextmanager
def compiling(step: Any, state: TrainState, shape: tuple[int, int], mesh: Mesh) -> Iterator[None]:
    """Within, a CPU compiles `step` beside whatever else is done; a later call finds it compiled.

    `state` is abstract, `shape` that of the ids. A GPU measures kernels while it compiles, and
    nothing else may run beside that.
    """
    if jax.default_backend() != "cpu":
        yield
        return
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row(mesh))
    lowered = step.lower(state, ids)
    with ThreadPoolExecutor(1) as side:
        side.submit(lowered.compile)
        yield


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
    dtype: jnp.dtype | None = None,
) -> Callable[[TrainState, Integer[Array, "B T"]], tuple[TrainState, dict[str, Array]]]:
    """The compiled step `(state, ids) -> (state, metrics)`; `state` is donated.

    `dtype` is that of products, by default `compute_dtype(train)`.

    Metrics: `loss` (nats, mean over all counted ids of the global batch), `grad_norm`, what the
    model reports, averaged over rows, and what the optimizer reports. Gradients of micro-batches
    are added before they are used, so `accumulation_steps` changes memory and nothing else.
    A step whose loss or gradient norm is not a finite number changes nothing but the count of
    steps (an optimizer with an agent has its own rule for it). Parameters whose names begin with
    one of `frozen` have no gradient and leave the step as they came, bit for bit.
    """
    check_batch(mesh, train)
    dtype = compute_dtype(train) if dtype is None else dtype
    find = _make_gradients(bind, train, pad_id, mesh, dtype)

    def step(state: TrainState, ids: Array) -> tuple[TrainState, dict[str, Array]]:
        moving = without(state.params, frozen)
        fixed = {k: v for k, v in state.params.items() if k not in moving}
        (loss, report), gradients = find(state.step, moving, fixed, as_ids(ids))
        norm = global_norm(gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, moving, value=loss)
        params = jax.tree.map(jnp.add, moving, updates) | fixed
        told = optimizer_metrics(opt_state)
        if "skipped_steps" not in told:
            sound = jnp.isfinite(loss) & jnp.isfinite(norm)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(sound, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        state = TrainState(state.step + 1, params, opt_state)
        state = jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))
        report = report | {"grad_norm": norm} | told
        return state, jax.lax.with_sharding_constraint(report, replicated(mesh))

    # Products that share an input are not to be merged: each step would copy their kernels together
    # first, 3 % of a step of `blt_767m` on an H100.
    on_gpu = jax.default_backend() == "gpu"
    options = {"xla_gpu_dot_merger_threshold_mb": 0} if on_gpu else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def _make_gradients(
    bind: Callable[[Params], Any],
    train: TrainConfig,
    pad_id: int,
    mesh: Mesh,
    dtype: jnp.dtype,
) -> Callable[[Array, Params, Params, Array], tuple[tuple[Array, dict[str, Array]], Params]]:
    """`(step, moving, fixed, ids) -> ((loss, report), gradients of moving)`, in the form asked for.

    Summed over all devices; gradients come cut as the parameters are.
    """
    manual = train.parallel == "shard_map"
    seed = jax.random.key(train.seed)

    def over_devices(x: Any) -> Any:
        return jax.lax.psum(x, _ROWS) if manual else x

    def gradients(axes: dict[str, int | None], step: Array, moving: Any, fixed: Any, ids: Array):
        def whole(params: Params) -> Params:
            # Cast before they travel: half the bytes.
            params = cast_params(params, dtype)
            return _gather_parts(params, axes) if manual else gather(mesh, params)

        def micro_loss(params: Params, ids: Array, keys: Array):
            output = bind(whole(params | fixed)).outputs(ids, keys, train.remat)
            nats, _ = cross_entropy(output.logits, ids, pad_id)
            # The sum over devices belongs inside the differentiated function: the gradient of a
            # replicated parameter is summed by shard_map itself, and averaging it once more outside
            # would be wrong by the number of devices, which AdamW would hide.
            nats, extra, metrics = over_devices(
                (nats, output.extra_loss.sum(), {k: v.sum() for k, v in output.metrics.items()})
            )
            return nats / count + extra / total_rows, (nats, metrics)

        rows = ids.shape[0]
        first = jax.lax.axis_index(_ROWS) * rows if manual else 0
        total_rows = rows * mesh.size if manual else rows
        step_key = jax.random.fold_in(seed, step)
        keys = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(first + jnp.arange(rows))
        count = jnp.maximum(over_devices(jnp.sum(ids != pad_id)), 1)
        differentiate = jax.value_and_grad(micro_loss, has_aux=True)
        (loss, (nats, metrics)), found = _over_micro_batches(
            lambda *part: differentiate(moving, *part), (ids, keys), train.accumulation_steps
        )
        report = {k: v / total_rows for k, v in metrics.items()} | {"loss": nats / count}
        return (loss, report), found

    def find(step: Array, moving: Params, fixed: Params, ids: Array):
        axes = {name: _cut_axis(mesh, leaf.shape) for name, leaf in (moving | fixed).items()}
        if not manual:
            return gradients(axes, step, moving, fixed, ids)
        cut = {name: _cut(mesh, leaf.shape) for name, leaf in (moving | fixed).items()}
        own = {name: cut[name] for name in moving}
        over_shards = jax.shard_map(
            lambda *args: gradients(axes, *args),
            mesh=mesh,
            in_specs=(jax.P(), own, {name: cut[name] for name in fixed}, jax.P(_ROWS)),
            out_specs=(jax.P(), own),
        )
        return over_shards(step, moving, fixed, ids)

    return find


def _gather_parts(params: Params, axes: dict[str, int | None]) -> Params:
    """`gather` inside `shard_map`, where each device sees its own parts."""

    def whole(part: Array, axis: int) -> Array:
        # Said to vary over the groups before it is gathered, not after: its gradient is then summed
        # within the group first, and what is summed from group to group is a device's part.
        varying = jax.lax.pcast(part, DATA, to="varying")
        return jax.lax.all_gather(varying, FSDP, axis=axis, tiled=True)

    cut = ((name, part, axes[name]) for name, part in params.items())
    return {name: part if axis is None else whole(part, axis) for name, part, axis in cut}
