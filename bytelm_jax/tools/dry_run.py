"""`bytelm train --dry-run`: a run on any number of devices, estimated or compiled on one CPU.

The sharded step is compiled for simulated devices, which shows its collectives. Memory is estimated
for the accelerator, not the CPU: parameters, gradients and optimizer state by their shapes and
shardings, activations by what the backward pass needs (`memory.py`) when the model is traced for
that accelerator. With a target (`--compile-for`) its own compiler takes the simulated devices'
place, and its figures stand beside the estimate. Nothing is computed, read or written.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bytelm.chips import find_chip
from bytelm.config import Recipe, training_flops_per_byte
from bytelm.config.models import executed_training_flops_per_byte
from bytelm.memory import require_host_memory
from bytelm.trainable import trainable
from bytelm_jax.kernels.backend import (
    has_preallocation,
    pretend_platform,
    simulate_devices,
)
from bytelm_jax.kernels.dtypes import array_bytes
from bytelm_jax.kernels.rows import one_part_of
from bytelm_jax.models import adapters_of, define_model
from bytelm_jax.optimizers.build import build_optimizer, without
from bytelm_jax.tools.collectives import Collective, read_collectives
from bytelm_jax.tools.compiled import (
    Compiled,
    compile_lowered,
    has_compiler,
    topology_mesh,
)
from bytelm_jax.tools.fusion import least_tile_bytes, written_bytes
from bytelm_jax.tools.machine import Machine
from bytelm_jax.tools.memory import Held, device_limit, saved_for_backward, total
from bytelm_jax.tools.seen import Deviation, seen
from bytelm_jax.tools.targets import Target
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps
from bytelm_jax.training.loss import cross_entropy

_TOO_HIGH = 0.2
"""The fraction by which the estimate of a peak may be too high: the most observed was 19 %."""

_QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""The compiled program never runs."""


_MOST_SIMULATED = 2048
"""CPU devices that JAX gives to one process; those beyond it belong to other ones."""


class Memory(NamedTuple):
    """Bytes on each device."""

    parameters: int
    copies: int
    """The parameters in the compute dtype, and unsharded ones if they are cut over `fsdp`."""
    gradients: int
    optimizer_state: int
    activations: int
    logits: int
    peak: int
    """The most in use at once; gradients and activations are never all in use together."""
    least: int
    """The peak if the compiler keeps no more than the backward pass needs.

    On a TPU it does so only where memory is short (`fusion.py`); on a GPU it is the peak.
    """


class Estimate(NamedTuple):
    """The result of a dry run. Times are seconds per step."""

    devices: int
    fsdp: int
    tensor: int
    form: str
    compute_dtype: str
    rows: int
    """Rows of a micro-batch on each device."""
    bytes_per_step: int
    trained: int
    """Parameters that the run trains."""
    frozen: int
    """Parameters that it does not: they have no gradient and no optimizer state."""
    memory: Memory
    collectives: list[Collective]
    machine: Machine
    compute_seconds: float
    collective_seconds: float
    flops: float
    """Operations of a step on each device by the model's own count, without recomputation."""
    executed_flops: float
    """The same with what is computed for patches that a batch does not have."""
    target: str = ""
    """What was asked for by `--compile-for`."""
    compiled: Compiled | None = None
    """The figures of the target's compiler, if it was asked."""
    seen: Deviation | None = None
    """How far the estimate of memory was off for models like this one, if that is known."""

    @property
    def collective_share(self) -> float:
        """Fraction of a step, if nothing is computed while collectives are in progress."""
        return self.collective_seconds / (self.collective_seconds + self.compute_seconds)


def require_devices(count: int) -> None:
    """Raises `ValueError` if this process cannot have `count` simulated CPU devices."""
    if count < 1:
        raise ValueError("devices=0: a dry run needs their number; write --devices 256")
    if count > _MOST_SIMULATED:
        raise ValueError(f"devices={count}: a dry run simulates at most {_MOST_SIMULATED}")
    if not simulate_devices(count):
        raise ValueError(
            f"devices={count}: this process started with {len(jax.devices())}; ask for at most "
            "that, or start another one"
        )


class Fitting(NamedTuple):
    """The largest batch that fits."""

    recipe: Recipe
    """The recipe with that batch."""
    needed: int
    """Bytes of a device."""
    compiled: Compiled | None
    """The step, if the target's compiler was asked."""


def dry_run(
    recipe: Recipe,
    machine: Machine,
    target: Target | None = None,
    compiled: Compiled | None = None,
) -> Estimate:
    """Compiles the step of `recipe` for its `train.devices` and estimates memory and time.

    With a `target` it is compiled for that, if its compiler is installed: in a process that has the
    environment `compiled.ENVIRONMENT`. `compiled` is the same step, if it was compiled before.
    `compute_dtype="auto"` is bfloat16, as on an accelerator.
    Raises `ValueError` for settings that do not fit together, and for a step that its compiler says
    does not fit the device's memory.
    """
    recipe, mesh = _prepare(recipe, machine, target)
    run = recipe.train
    meshes.check_batch(mesh, run)
    state = abstract_state(recipe, mesh)
    count = run.batch_size * recipe.data.sequence_length
    sizes = {name: math.prod(leaf.shape) for name, leaf in state.params.items()}
    still = {name: sizes[name] for name in trainable(recipe, sizes).frozen}
    frozen = sum(still.values())
    flops, executed = (
        work(recipe.model, recipe.data.sequence_length, still) * count / mesh.size
        for work in (training_flops_per_byte, executed_training_flops_per_byte)
    )
    if can_compile(target):
        compiled = compiled or compile_lowered(lower_step(recipe, mesh, state), mesh.size)
        if compiled is None or compiled.peak > find_chip(machine.chip).memory:
            raise ValueError(
                f"batch_size={run.batch_size}: a step does not fit the memory of a "
                f"{machine.chip}, as its compiler says; lower it, add --remat or --fsdp, or --fit"
            )
        collectives = compiled.collectives
    else:
        collectives = read_collectives(compile_step(recipe, mesh, state), mesh.size)
    return Estimate(
        devices=mesh.size,
        fsdp=run.fsdp,
        tensor=run.tensor,
        form=run.parallel,
        compute_dtype=run.compute_dtype,
        rows=_rows(recipe, mesh),
        bytes_per_step=count,
        trained=sum(sizes.values()) - frozen,
        frozen=frozen,
        memory=estimate_memory(recipe, mesh, state, find_chip(machine.chip).platform),
        collectives=collectives,
        machine=machine,
        compute_seconds=flops / (find_chip(machine.chip).peak * machine.mfu),
        collective_seconds=sum(each.seconds(1e9 * machine.link_gbytes) for each in collectives),
        flops=flops,
        executed_flops=executed,
        target=target.name if target else "",
        compiled=compiled,
        seen=seen(recipe.model, find_chip(machine.chip).platform),
    )


def can_compile(target: Target | None) -> bool:
    """Whether the target's own compiler is here; otherwise a dry run is an estimate."""
    return target is not None and has_compiler(target.chip.platform)


def _prepare(recipe: Recipe, machine: Machine, target: Target | None) -> tuple[Recipe, Mesh]:
    """The recipe with its devices and dtype, and their mesh."""
    machine.check()
    run = recipe.train
    if run.compute_dtype == "auto":
        run = replace(run, compute_dtype="bfloat16")
    if target is not None:
        if run.devices not in (0, target.devices):
            raise ValueError(
                f"devices={run.devices}: {target.name} has {target.devices}; leave it out"
            )
        run = replace(run, devices=target.devices)
    recipe = replace(recipe, train=run)
    if target is not None and can_compile(target):
        return recipe, topology_mesh(target, run.fsdp, run.tensor)
    require_devices(run.devices)
    return recipe, meshes.make_mesh(run.devices, run.fsdp, run.tensor)


def largest_batch(recipe: Recipe, machine: Machine, target: Target | None = None) -> Fitting:
    """The recipe with the largest batch whose step fits the chip's memory, and that step's bytes.

    Batches are multiples of the devices and of `accumulation_steps`, and the largest is found as
    `largest_fitting` says. The bytes are the compiler's, or the estimate's, as in `dry_run`.
    Raises `ValueError` if no batch fits.
    """
    recipe, mesh = _prepare(recipe, machine, target)
    places = meshes.row_places(mesh)
    chip, unit = find_chip(machine.chip), places * recipe.train.accumulation_steps
    state = abstract_state(recipe, mesh)

    fitting: dict[int, Compiled] = {}  # of the largest so far

    def sized(rows: int) -> Recipe:
        return replace(recipe, train=replace(recipe.train, batch_size=rows * unit))

    def peak(rows: int) -> int | None:
        if not can_compile(target):
            needed = estimate_memory(sized(rows), mesh, state, chip.platform).peak
        else:
            compiled = compile_lowered(lower_step(sized(rows), mesh, state), mesh.size)
            needed = math.inf if compiled is None else compiled.peak
            if compiled is not None and needed <= chip.memory:
                fitting.clear()
                fitting[rows] = compiled
        return int(needed) if needed <= chip.memory else None

    start = max(1, recipe.train.batch_size // unit)
    rows, needed = largest_fitting(peak, start, chip.memory)
    if not rows:
        raise ValueError(
            f"model: a step of one row on each device does not fit the memory of a {machine.chip}; "
            "take larger devices, a larger fsdp, or add --remat"
        )
    return Fitting(sized(rows), needed, fitting.get(rows))


def largest_fitting(peak: Callable[[int], int | None], start: int, limit: int) -> tuple[int, int]:
    """(the largest number n >= 1 that fits `limit`, its bytes), (0, 0) if 1 does not.

    `peak(n)` is the bytes of n, or None if n does not fit; they grow with n. As n takes minutes to
    compile, it is not asked of every number: from `start` on in proportion to what is left, then by
    bisection, and above 32 a thirty-second part more may fit.
    """
    low, needed, high, now = 0, 0, 0, start
    while not high or high - low > 1 + low // 32:
        found = peak(now)
        if found is None:
            high = now
        else:
            low, needed = now, found
        # Part of the bytes does not grow: what is in proportion to n is seldom too much.
        more = max(low + 1 + low // 32, int(low * limit / max(needed, 1)))
        now = (low + high) // 2 if high else more
    return low, needed


def abstract_state(recipe: Recipe, mesh: Mesh) -> steps.TrainState:
    """Shapes, dtypes and shardings of the result of `steps.init_state`."""
    run = recipe.train
    _, init = define_model(recipe.model, adapters_of(recipe))
    params = jax.eval_shape(lambda: init(run.seed))
    parts = trainable(recipe, params)
    optimizer = build_optimizer(recipe.optimizer, run.steps, run.seed, parts)
    return steps.abstract_init(mesh, optimizer, params, steps.averaged(run, parts))


def compile_step(recipe: Recipe, mesh: Mesh, state: steps.TrainState) -> str:
    """The text of the step compiled for simulated devices."""
    # A CPU's compiler widens bfloat16, including in collectives, but not float16, which has as many
    # bytes.
    dtype = steps.compute_dtype(recipe.train, mesh)
    dtype = jnp.dtype(jnp.float16) if dtype == jnp.bfloat16 else dtype
    return lower_step(recipe, mesh, state, dtype).compile(compiler_options=_QUICKLY).as_text()


def lower_step(
    recipe: Recipe, mesh: Mesh, state: steps.TrainState, dtype: jnp.dtype | None = None
) -> Any:
    """The lowered step, for the devices of `mesh`; products in `dtype`, by default the recipe's."""
    run, parts = recipe.train, trainable(recipe, state.params)
    bind, _ = define_model(recipe.model, adapters_of(recipe))
    optimizer = build_optimizer(recipe.optimizer, run.steps, run.seed, parts)
    step = steps.make_train_step(
        bind, optimizer, run, recipe.model.vocab.pad_id, mesh, parts, dtype
    )
    shape = (run.batch_size, recipe.data.sequence_length)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=meshes.batch_sharding(mesh))
    return step.lower(state, ids)  # pyright: ignore[reportFunctionMemberAccess]


def estimate_memory(
    recipe: Recipe, mesh: Mesh, state: steps.TrainState, platform: str = "gpu"
) -> Memory:
    """The bytes of a step on each device, by kind, and the peak."""
    memory = least_memory(recipe, mesh, state, platform)
    if platform not in _PEAKS:
        return memory
    peak = _PEAKS[platform](recipe, mesh, state)
    return memory._replace(peak=peak, least=min(memory.least, peak))


def least_memory(
    recipe: Recipe, mesh: Mesh, state: steps.TrainState, platform: str = "gpu"
) -> Memory:
    """The same if the compiler keeps no more than the backward pass needs."""
    run = recipe.train
    moving = without(state.params, trainable(recipe, state.params).frozen)
    parameters, gradients = _part(state.params), _part(moving)
    optimizer_state = _part((state.opt_state, state.average))
    dtype = steps.compute_dtype(run, mesh)
    working, traced = _layers(recipe, mesh, state)
    # Without sharding, arrays that need no cast are their own copies.
    copies = sum(
        _whole(leaf)
        for name, leaf in working.items()
        if run.fsdp > 1 or leaf.dtype != state.params[name].dtype
    )
    saved = residuals(recipe, mesh, traced, platform)
    shape = _rows(recipe, mesh) * recipe.data.sequence_length, _logit_width(recipe)
    about_logits = [x for x in saved if x.shape[-1:] == shape[1:] and _count(x) == math.prod(shape)]
    rest = [x for x in saved if x not in about_logits]
    # The gradient of an array exists before the residuals kept for it are released.
    logits = total(about_logits) + array_bytes(shape, dtype)
    largest = max((x.bytes for x in rest), default=0)
    activations = total(rest)
    sums = gradients if run.accumulation_steps > 1 else 0
    passes = sums + copies + activations + max(logits, largest)
    peak = parameters + optimizer_state + max(passes, gradients + sums)
    return Memory(
        parameters, copies, gradients, optimizer_state, activations + largest, logits, peak, peak
    )


def _layers(recipe: Recipe, mesh: Mesh, state: steps.TrainState) -> tuple[Any, Any]:
    """The parameters as products of one device read them, and as its layers are traced with them.

    What it holds and computes follows from the shapes of its parts.
    """
    dtype = steps.compute_dtype(recipe.train, mesh)
    cast = partial(jax.eval_shape, lambda params: steps.cast_for(mesh, params, dtype))
    layers = meshes.layer_shapes(mesh, state.params)
    return cast(layers), cast(meshes.layer_shapes(mesh, state.params, traced=True))


_OPERATION = 65_000
"""Bytes of a TPU's program per operation that writes much: 33,000 to 93,000 for twelve recipes."""


def tpu_peak(recipe: Recipe, mesh: Mesh, state: steps.TrainState) -> int:
    """Bytes of a TPU's memory for the state, the passes of a micro-batch and the program.

    While it has memory to spare, its compiler keeps more than the backward pass needs.
    """
    working, traced = _layers(recipe, mesh, state)
    moving = sorted(without(traced, trainable(recipe, traced).frozen))
    names = [*moving, *sorted(traced.keys() - set(moving))]
    nats, arguments = _loss(recipe, mesh, traced)
    with _as_on(recipe, mesh, "tpu"):
        passes, operations = written_bytes(
            nats,
            *arguments,
            held=[*(_whole(working[name]) for name in names), 0, 0],
            # Gradients are cut as their parameters are, and in the dtype of products.
            results=[_part(state.params[name], traced[name].dtype) for name in moving],
            gathered=recipe.train.fsdp > 1,
            cut={traced[n].shape: traced[n].size // working[n].size for n in names},
        )
    kept = jax.tree.leaves((state.params, state.opt_state, state.average))
    if recipe.train.accumulation_steps > 1:
        kept += [state.params[name] for name in moving]  # the sums of gradients
    shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in kept]
    state_bytes = sum(least_tile_bytes(shape, array_bytes((), dtype)) for shape, dtype in shapes)
    return state_bytes + passes + _OPERATION * operations


_PEAKS = {"tpu": tpu_peak}
"""Platform → what estimates the peak there, if it is not the least."""


def can_fit(peak: int, limit: int) -> bool:
    """Whether a step with this estimated peak can run in `limit` bytes, if the estimate is high."""
    return (1 - _TOO_HIGH) * peak <= limit


def require_memory(recipe: Recipe) -> None:
    """Raises `ValueError` if a step surely needs more memory than this process's devices have.

    Allocates nothing. On devices that do not report their memory, such as CPUs, only what surely
    exceeds the host's memory is refused.
    """
    device, run = jax.local_devices()[0], recipe.train
    limit = device_limit(device)
    if limit is None:
        require_host_memory(recipe)
        return
    mesh = meshes.make_mesh(run.devices, run.fsdp, run.tensor)
    meshes.check_batch(mesh, run)
    needed = least_memory(recipe, mesh, abstract_state(recipe, mesh), device.platform)
    if can_fit(needed.peak, limit):
        return
    there = f"GiB of each device, of which JAX has {limit / 2**30:.1f}"
    if has_preallocation(device):
        there += " (more than its usual 75 % with XLA_CLIENT_MEM_FRACTION=0.95)"
    state = needed.parameters + needed.gradients + needed.optimizer_state
    if state > limit:
        raise ValueError(
            "model: parameters, gradients and optimizer state take "
            f"{state / 2**30:.1f} {there}; take larger devices, or more of them and a larger fsdp"
        )
    raise ValueError(
        f"batch_size={run.batch_size}: a step takes about {needed.peak / 2**30:.1f} {there}; lower "
        "it, raise accumulation_steps or fsdp, or add --remat"
    )


def residuals(recipe: Recipe, mesh: Mesh, working: Any, platform: str) -> list[Held]:
    """The arrays that one device keeps for the backward pass of a micro-batch.

    `platform` is the device's, "gpu" or "tpu".
    """
    nats, arguments = _loss(recipe, mesh, working)
    with _as_on(recipe, mesh, platform):
        return saved_for_backward(nats, *arguments)


@contextlib.contextmanager
def _as_on(recipe: Recipe, mesh: Mesh, platform: str) -> Iterator[None]:
    """Within this context, one device's part is traced as in the program for `platform`."""
    parts = meshes.row_places(mesh) if recipe.train.parallel == "jit" else 1
    with pretend_platform(platform), one_part_of(parts):
        yield


def _loss(recipe: Recipe, mesh: Mesh, working: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The loss of one device's rows, and its arguments: what is trained, what is not, ids, keys."""
    bind, _ = define_model(recipe.model, adapters_of(recipe))
    rows, pad_id = _rows(recipe, mesh), recipe.model.vocab.pad_id
    moving = without(working, trainable(recipe, working).frozen)
    fixed = {name: leaf for name, leaf in working.items() if name not in moving}
    ids = jax.ShapeDtypeStruct((rows, recipe.data.sequence_length), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))

    def nats(moving: Any, fixed: Any, ids: Any, keys: Any) -> Any:
        output = bind(moving | fixed).outputs(ids, keys, recipe.train.remat)
        total, _ = cross_entropy(output.logits, ids, pad_id)
        return total + output.extra_loss.sum()

    return nats, (moving, fixed, ids, keys)


def _rows(recipe: Recipe, mesh: Mesh) -> int:
    places = meshes.row_places(mesh)
    return recipe.train.batch_size // (places * recipe.train.accumulation_steps)


def _logit_width(recipe: Recipe) -> int:
    return recipe.model.logit_width


def _count(array: Held) -> int:
    return math.prod(array.shape)


def _whole(leaf: Any) -> int:
    return array_bytes(leaf.shape, leaf.dtype)


def _part(tree: Any, dtype: Any = None) -> int:
    """Bytes of one device's part of sharded arrays, if they had this dtype."""
    return sum(
        array_bytes(leaf.sharding.shard_shape(leaf.shape), dtype or leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )
