"""The train step over all devices.

It exists in two forms, equal up to rounding: `jit`, where the compiler inserts the collectives, and
`shard_map`, where they are explicit.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from bytelm.config import TrainConfig
from bytelm.trainable import EVERYTHING, Trainable
from bytelm_jax.kernels.backend import compiling_for
from bytelm_jax.layers.ids import as_ids
from bytelm_jax.models import Params, cast_params
from bytelm_jax.optimizers.build import global_norm, optimizer_metrics, without
from bytelm_jax.training.loss import counted_ids, cross_entropy, row_nats, source_sums
from bytelm_jax.training.mesh import (
    ROWS,
    batch_sharding,
    check_batch,
    gather,
    gather_parts,
    gathered_axes,
    layers_on,
    partition,
    parts_on,
    replicated,
    row_shifts,
    state_shardings,
)


class TrainState(NamedTuple):
    """Everything that a step changes. `step` counts finished steps."""

    step: Array
    params: Params
    opt_state: Any
    average: Params | None = None
    """The average over steps of the parameters that train, if the run keeps one."""

    @property
    def weights(self) -> Params:
        """The parameters to evaluate: their average, if there is one."""
        return self.params | (self.average or {})

    def next_average(self, params: Params, decay: float) -> Any:
        """The average after a step that has led to `params`, if one is kept."""
        if self.average is None:
            return None
        return optax.incremental_update(
            {name: params[name] for name in self.average}, self.average, 1 - decay
        )

    def begin_with(self, params: Params) -> "TrainState":
        """The state with these parameters, at which an average begins, too."""
        average = self.average and {name: jnp.copy(params[name]) for name in self.average}
        return self._replace(params=params, average=average)


def platform_of(mesh: Mesh) -> str:
    """The platform that programs over `mesh` are compiled for: "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def compute_dtype(train: TrainConfig, mesh: Mesh | None = None) -> jnp.dtype:
    """The dtype of products: as configured, or what suits the devices of `mesh`.

    Without a mesh: what suits this machine's devices.
    """
    name = train.compute_dtype
    if name == "auto":
        platform = jax.default_backend() if mesh is None else platform_of(mesh)
        name = "float32" if platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def cast_for(mesh: Mesh, params: Params, dtype: jnp.dtype) -> Params:
    """The parameters as the model of a step over `mesh` computes with them.

    On several devices all are cast before the transfer, which halves the bytes. On one, a table of
    n-grams is not: a step reads few of its rows, and would copy all of them and their gradient.
    """
    return cast_params(params, dtype, tables=mesh.size > 1)


def init_state(mesh: Mesh, optimizer: optax.GradientTransformation, init: Callable) -> TrainState:
    """`init() -> params`, run once under jit so that every array is created with its sharding."""
    return compile_init(optimizer, init, abstract_init(mesh, optimizer, jax.eval_shape(init)))()


def averaged(train: TrainConfig, parts: Trainable) -> Trainable | None:
    """Of which parameters a run keeps an average: those that train; None if it keeps none."""
    return parts if train.average_decay else None


def compile_init(
    optimizer: optax.GradientTransformation,
    init: Callable,
    template: TrainState,
    given: Params | None = None,
) -> Callable[[], TrainState]:
    """The compiled function that creates the state of `init_state`.

    `template` is the result of `abstract_init`. Parameters that are `given`, which are placed like
    those of `template`, are not drawn.
    """
    # It runs once: on a CPU, compiling it with all optimisations would take longer than it saves.
    shardings = jax.tree.map(lambda x: x.sharding, template)
    on_cpu = all(each.platform == "cpu" for each in template.step.sharding.device_set)
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    given = given or {}

    def make(given: Params) -> TrainState:
        return _first_state(optimizer, template.average, init() | given)

    jitted = jax.jit(make, out_shardings=shardings, compiler_options=options)
    return partial(jitted.lower(given).compile(), given)


def abstract_init(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    params: Any,
    average: Trainable | None = None,
) -> TrainState:
    """Shapes, dtypes and shardings of the result of `init_state`.

    `params` are abstract, as `jax.eval_shape(init)` gives them; `average` is the result of
    `averaged`.
    """
    kept = None if average is None else without(params, average.frozen)
    shapes = jax.eval_shape(lambda params: _first_state(optimizer, kept, params), params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def _first_state(
    optimizer: optax.GradientTransformation, average: Any, params: Params
) -> TrainState:
    """`average`, if not None, has a key for each parameter of which an average is kept."""
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)
    return state.begin_with(params)


@contextlib.contextmanager
def compiling(
    step: Any,
    state: TrainState,
    shape: tuple[int, int],
    mesh: Mesh,
    by_source: bool = False,
    masked: bool = False,
) -> Iterator[None]:
    """Within this context a CPU compiles `step` in the background; a later call finds it compiled.

    `state` is abstract, `shape` that of the ids; `by_source` says that rows come with sources, and
    `masked` that ids come with which are counted. A GPU measures kernels while it compiles, and
    nothing else may run meanwhile.
    """
    if platform_of(mesh) != "cpu":
        yield
        return
    like = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    rest = {"sources": like(shape[:1], jnp.int32)} if by_source else {}
    rest |= {"counted": like(shape, jnp.bool_)} if masked else {}
    lowered = step.lower(state, like(shape, jnp.int32), **rest)
    with ThreadPoolExecutor(1) as side:
        side.submit(lowered.compile)
        yield


def _over_micro_batches(function: Callable, rows: Any, parts: int) -> Any:
    """The sum of `function` over `parts` micro-batches, one after another.

    Micro-batch i takes rows i, i + parts, …: each device slices its own rows, nothing moves.
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
    parts: Trainable = EVERYTHING,
    dtype: jnp.dtype | None = None,
    names: tuple[str, ...] = (),
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The compiled step `(state, ids) -> (state, metrics)`; `state` is donated.

    `ids` are integers [B, T]. `dtype` is that of products, by default
    `compute_dtype(train, mesh)`. With `names` of sources the step takes a keyword `sources`, int32
    [B], the index of each row's name, and metrics have a `loss/NAME` for each; NaN for one that has
    no rows. A keyword `counted`, bool [B, T], leaves ids out of the loss that the model
    nevertheless reads.

    Metrics: `loss` (nats, mean over all counted ids of the global batch), `grad_norm`, the model's
    metrics, averaged over rows, and the optimizer's. Gradients of micro-batches are added before
    they are used, so `accumulation_steps` changes memory and nothing else. A step whose loss or
    gradient norm is not finite changes nothing but the step count (an optimizer with an agent has
    its own rule). Parameters that `parts` freezes have no gradient and leave the step unchanged,
    bit for bit; `optimizer` was built for the same `parts`.
    """
    check_batch(mesh, train)
    dtype = compute_dtype(train, mesh) if dtype is None else dtype
    find = _compiled_for(mesh, _make_gradients(bind, train, pad_id, mesh, dtype, names))

    def step(
        state: TrainState, ids: Array, sources: Array | None = None, counted: Array | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        moving = without(state.params, parts.frozen)
        fixed = {k: v for k, v in state.params.items() if k not in moving}
        rows = {"fixed": fixed, "batch": _Rows(as_ids(ids), sources, counted)}
        (loss, report), gradients = find(state.step, moving, **rows)
        norm = global_norm(gradients)
        loss_at = partial(find, state.step, **rows, differentiate=False)
        updates, opt_state = optimizer.update(
            gradients, state.opt_state, moving, value=loss, value_fn=loss_at
        )
        params = jax.tree.map(jnp.add, moving, updates) | fixed
        optimizer_report = optimizer_metrics(opt_state)
        if "skipped_steps" not in optimizer_report:
            sound = jnp.isfinite(loss) & jnp.isfinite(norm)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(sound, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        average = state.next_average(params, train.average_decay)
        state = TrainState(state.step + 1, params, opt_state, average)
        state = jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))
        report = report | {"grad_norm": norm} | optimizer_report
        return state, jax.lax.with_sharding_constraint(report, replicated(mesh))

    # Products that share an input must not be merged: each step would first copy their kernels
    # together, which takes 3 % of a step of `blt_767m` on an H100.
    options = {"xla_gpu_dot_merger_threshold_mb": 0} if platform_of(mesh) == "gpu" else None
    return jax.jit(step, donate_argnums=0, compiler_options=options)


class _Rows(NamedTuple):
    """Rows of ids, and the source of each and which ids are counted, if that is given."""

    ids: Array
    sources: Array | None
    counted: Array | None


class _Form(NamedTuple):
    """What differs between the two forms of the step, inside the compiled program."""

    over_devices: Callable[[Any], Any]
    cast: Callable[[Params, jnp.dtype], Params]
    gather: Callable[[Params], Params]
    """Parameters gathered on every device; their gradients come back partitioned."""
    first_row: Any
    """The number, in the global batch, of the first row that this program sees; or one for each
    row, by how much its number exceeds its place among those that the program sees."""
    total_rows: int
    layers: Callable[[], contextlib.AbstractContextManager[None]]
    """The context in which layers are traced."""


def _compiled_for(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, traced for the devices of `mesh`."""

    def traced(*arguments: Any, **named: Any) -> Any:
        with compiling_for(mesh.devices.flat[0]):
            return function(*arguments, **named)

    return traced


def _make_gradients(
    bind: Callable[[Params], Any],
    train: TrainConfig,
    pad_id: int,
    mesh: Mesh,
    dtype: jnp.dtype,
    names: tuple[str, ...],
) -> Callable[..., Any]:
    """`(step, moving, fixed, batch) -> ((loss, report), gradients of moving)`, as jit or shard_map.

    Summed over all devices; gradients are partitioned as parameters. The loss alone with a keyword
    `differentiate=False`.
    """
    parts = (bind, train, pad_id, dtype, jax.random.key(train.seed), names)
    cast = partial(cast_for, mesh)

    def in_jit(
        step: Array, moving: Params, fixed: Params, batch: _Rows, differentiate: bool = True
    ):
        rows = batch.ids.shape[0]
        shifts = row_shifts(mesh, rows)
        first_row = 0 if shifts is None else np.repeat(shifts, rows // len(shifts))
        layers = partial(layers_on, mesh)
        form = _Form(lambda x: x, cast, partial(gather, mesh), first_row, rows, layers)
        return _gradients(*parts, differentiate, form, step, moving, fixed, batch)

    def in_shard_map(
        step: Array, moving: Params, fixed: Params, batch: _Rows, differentiate: bool = True
    ):
        axes = gathered_axes(mesh, moving | fixed)

        def on_device(step: Array, moving: Params, fixed: Params, batch: _Rows):
            rows, position = batch.ids.shape[0], jax.lax.axis_index(ROWS)
            shifts = row_shifts(mesh, rows * mesh.size)
            first_row = position * rows
            if shifts is not None:
                first_row += jnp.asarray(shifts)[position]
            form = _Form(
                lambda x: jax.lax.psum(x, ROWS),
                cast,
                lambda params: gather_parts(params, axes),
                first_row,
                rows * mesh.size,
                partial(parts_on, mesh),
            )
            return _gradients(*parts, differentiate, form, step, moving, fixed, batch)

        specs = {k: partition(mesh, leaf.shape, k) for k, leaf in (moving | fixed).items()}
        of_moving = {name: specs[name] for name in moving}
        of_fixed = {name: specs[name] for name in fixed}
        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(jax.P(), of_moving, of_fixed, jax.P(ROWS)),
            out_specs=(jax.P(), of_moving) if differentiate else jax.P(),
        )(step, moving, fixed, batch)

    return in_shard_map if train.parallel == "shard_map" else in_jit


def _gradients(
    bind: Callable[[Params], Any],
    train: TrainConfig,
    pad_id: int,
    dtype: jnp.dtype,
    seed: Array,
    names: tuple[str, ...],
    differentiate: bool,
    form: _Form,
    step: Array,
    moving: Params,
    fixed: Params,
    batch: _Rows,
) -> Any:
    """Loss, report and gradients, or the loss alone, of these rows, summed over all devices."""

    def mean_loss(params: Params, batch: _Rows, keys: Array):
        whole = form.gather(form.cast(params | fixed, dtype))
        with form.layers():
            output = bind(whole).outputs(batch.ids, keys, train.remat)
        by_source = None
        if batch.sources is not None:
            each = row_nats(output.logits, batch.ids, pad_id, batch.counted)
            nats, by_source = each.sum(), source_sums(each, batch.sources, len(names))
        else:
            nats, _ = cross_entropy(output.logits, batch.ids, pad_id, batch.counted)
        # The sum over devices belongs inside the differentiated function: shard_map itself sums the
        # gradient of a replicated parameter, and averaging it again outside would be wrong by the
        # number of devices, which AdamW would hide.
        nats, extra, metrics, by_source = form.over_devices(
            (
                nats,
                output.extra_loss.sum(),
                {k: v.sum() for k, v in output.metrics.items()},
                by_source,
            )
        )
        return nats / count + extra / form.total_rows, (nats, metrics, by_source)

    step_key = jax.random.fold_in(seed, step)
    rows = form.first_row + jnp.arange(batch.ids.shape[0])
    keys = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(rows)
    counted = counted_ids(batch.ids, pad_id, batch.counted)
    count = jnp.maximum(form.over_devices(jnp.sum(counted)), 1)
    parts = train.accumulation_steps
    if not differentiate:
        return _over_micro_batches(lambda *part: mean_loss(moving, *part)[0], (batch, keys), parts)
    with_gradients = jax.value_and_grad(mean_loss, has_aux=True)
    (loss, (nats, metrics, by_source)), gradients = _over_micro_batches(
        lambda *part: with_gradients(moving, *part), (batch, keys), parts
    )
    report = {k: v / form.total_rows for k, v in metrics.items()} | {"loss": nats / count}
    if batch.sources is not None:
        counts = source_sums(counted.sum(axis=1), batch.sources, len(names))
        each = by_source / form.over_devices(counts)
        report |= {f"loss/{name}": each[index] for index, name in enumerate(names)}
    return (loss, report), gradients
