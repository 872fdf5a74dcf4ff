"""Teaching a byte encoder to make of each patch what a token model's embeddings say of its tokens.

The first stage of making a byte model out of a token model (`docs/donors.md`): of the parameters of
a BLT only the byte encoder's are trained, and the global transformer, which they will feed, takes
no part. The text comes with the token that ends at each byte (`bytelm/alignment.py`).

Axes: B batch, T bytes, N patches, D global width, E rows of the embeddings.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from bytelm.alignment import (
    Aligned,
    alignment_parts,
    check_stage,
    require_finite,
    step_line,
    validation_record,
)
from bytelm.config import Recipe, require
from bytelm.metrics import MetricsLog
from bytelm.runs import (
    Outcome,
    RunLock,
    prepare_run_dir,
    require_ahead,
    require_lock,
    require_same_data,
    saved_steps,
)
from bytelm.trainable import Trainable
from bytelm_jax.kernels.segment_sum import segment_sum
from bytelm_jax.models import Params, cast_params, define_model
from bytelm_jax.optimizers.build import (
    build_optimizer,
    global_norm,
    learning_rate_schedule,
    optimizer_metrics,
    without,
)
from bytelm_jax.training import checkpoint, processes
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import step as steps


def alignment_loss(
    model: Any,
    ids: Int[Array, "B T"],
    token: Int[Array, "B T"],
    embeddings: Float[Array, "E D"],
    begin: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean squared error of patches, and the mean cosine between them and what they should be.

    A patch should be the mean of the embeddings of the tokens that end in it: row `token` − 1 for
    the token that ends at a byte, none for 0. Patches in which no token ends do not count. BOS is a
    patch of its own, for which row `begin` − 1 stands, if any. The error is relative to the mean
    square of the embeddings: 1 is what vectors of zeros have.
    """
    encoded = model.encode(ids)
    patches = model.widen(encoded.pooled)
    wide = jnp.promote_types(patches.dtype, jnp.float32)
    embeddings = embeddings.astype(wide)
    # s is BOS and then the bytes.
    ends = jnp.concatenate([jnp.full_like(token[:, :1], begin), token[:, :-1]], axis=1)
    is_end = (ends > 0).astype(wide)[:, :, None]
    rows = embeddings[jnp.maximum(ends - 1, 0)] * is_end
    both = segment_sum(
        jnp.concatenate([rows, is_end], axis=-1), encoded.plan.patch_of, encoded.plan.budget
    )
    count = both[:, :, -1]
    target = both[:, :, :-1] / jnp.maximum(count, 1)[:, :, None]
    weight = (count > 0).astype(wide)
    total = jnp.maximum(weight.sum(), 1)
    patches = patches.astype(wide)
    error = jnp.square(patches - target).mean(axis=-1)
    size = jnp.sqrt(jnp.square(patches).sum(axis=-1) * jnp.square(target).sum(axis=-1))
    cosine = (patches * target).sum(axis=-1) / jnp.maximum(size, 1e-30)
    power = jnp.square(embeddings).mean()
    return (weight * error).sum() / total / power, (weight * cosine).sum() / total


def align(recipe: Recipe, data: Aligned, run_dir: Path, params: Callable[[], Params]) -> Outcome:
    """Trains the byte encoder of `recipe` in `run_dir`, from its latest checkpoint if there is one.

    `params` reads those of the run's beginning. Writes what `train` does, and to `metrics.jsonl`
    `alignment_loss`, `alignment_cosine`, `seconds` since the first step of this process and, of
    windows that are held out, loss and cosine with `validation_`. Raises `ValueError` for data,
    settings or checkpoints that do not fit. SIGINT and SIGTERM end it with everything saved.
    """
    with processes.StopSignal() as stop, RunLock(run_dir) as lock:
        return Stage(recipe, data).run(run_dir, stop, lock, params)


class Stage:
    """What the stage trains, on what, and how: `step` and `validate` are all of it.

    `dtype` is that of products, by default what the recipe says.
    """

    def __init__(self, recipe: Recipe, data: Aligned, dtype: Any = None) -> None:
        require(jax.process_count() == 1, "bytelm align: runs in one process; start one")
        check_stage(recipe, data)
        self.recipe, self.data = recipe, data
        self.length = recipe.data.sequence_length
        self.mesh = meshes.make_mesh(recipe.train.devices, recipe.train.fsdp)
        meshes.check_batch(self.mesh, recipe.train)
        bind, self.init = define_model(recipe.model)
        abstract = jax.eval_shape(partial(self.init, recipe.train.seed))
        self.parts = alignment_parts(abstract)
        run = recipe.train
        self.optimizer = build_optimizer(recipe.optimizer, run.steps, run.seed, self.parts)
        self.template = steps.abstract_init(self.mesh, self.optimizer, abstract)
        self.embeddings = jax.device_put(data.embeddings, meshes.replicated(self.mesh))
        dtype = steps.compute_dtype(run, self.mesh) if dtype is None else dtype

        def loss(moving: Params, fixed: Params, ids: Array, token: Array, table: Array) -> Any:
            whole = cast_params(meshes.gather(self.mesh, moving | fixed), dtype)
            with meshes.layers_on(self.mesh):
                return alignment_loss(bind(whole), ids, token, table, data.begin)

        self._compiled = jax.jit(partial(_step, loss, self.optimizer, self.parts), donate_argnums=0)
        self._look = jax.jit(loss)

    def batch(self, windows: list[int]) -> tuple[Array, ...]:
        """The arrays of these windows, on the devices."""
        rows = self.data.rows(windows, self.length, self.recipe.model.vocab.offset)
        return (*(meshes.put_batch(self.mesh, each) for each in rows), self.embeddings)

    def validate(self, params: Params) -> dict[str, float]:
        """Loss and cosine of windows that are held out, as a record of metrics."""
        found = []
        for windows in self.data.held_out(self.recipe.train.batch_size, self.length):
            each = jax.device_get(self._look(params, {}, *self.batch(windows)))
            found.append((float(each[0]), float(each[1])))
        return validation_record(found)

    def step(
        self, state: steps.TrainState, count: int
    ) -> tuple[steps.TrainState, dict[str, Array]]:
        """The step after `count` steps, and its report; `state` is donated."""
        run = self.recipe.train
        return self._compiled(
            state, *self.batch(self.data.batch(count, run.batch_size, self.length, run.seed))
        )

    def run(self, run_dir: Path, stop: Any, lock: RunLock, params: Callable[[], Params]) -> Outcome:
        """See `align`."""
        run, template = self.recipe.train, self.template
        given = None if saved_steps(run_dir) else params()  # damaged ones leave no folder behind
        prepare_run_dir(run_dir, self.recipe, branches=False)
        require_lock(lock.take(run_dir), str(run_dir))
        found = checkpoint.recover(run_dir, template.params, template.opt_state)
        start = found.step if found else 0
        require_ahead(self.recipe, start, run_dir)
        if found:
            require_same_data(found.metadata["data"], self.data.identity, run_dir)
            at = jax.device_put(start, template.step.sharding).astype(template.step.dtype)
            state = steps.TrainState(at, found.params, found.opt_state)
        else:
            placed = meshes.place(self.mesh, params() if given is None else given)
            init = partial(self.init, run.seed)
            state = steps.compile_init(self.optimizer, init, template, placed)()
        schedule = learning_rate_schedule(self.recipe.optimizer, run.steps)
        log, saved, step = MetricsLog(run_dir / "metrics.jsonl", start), start, start
        begun = time.monotonic()
        manager = checkpoint.open_checkpoints(run_dir, run)
        lock.save_recipe(self.recipe)
        how = "resuming" if found else "aligning"
        print(f"{how} {self.recipe.name} in {run_dir}, step {start}", flush=True)
        try:
            while step < run.steps and not stop.agreed():
                state, report = self.step(state, step)
                step += 1
                if step == start + 1:  # compiled
                    jax.block_until_ready(state)
                    begun = time.monotonic()
                last = step == run.steps
                if last or step % run.log_every == 0:
                    values = {name: float(v) for name, v in jax.device_get(report).items()}
                    require_finite(step, values["alignment_loss"])
                    values["learning_rate"] = float(schedule(jnp.asarray(step - 1)))
                    values["seconds"] = time.monotonic() - begun
                    log.write({"step": step, **values})
                    print(step_line(step, run.steps, values), flush=True)
                if last or (run.eval_every and step % run.eval_every == 0):
                    record = self.validate(state.params)
                    log.write({"step": step, **record})
                    loss = record["validation_alignment_loss"]
                    print(f"step {step}: validation {loss:.4f}", flush=True)
                if last or (run.checkpoint_every and step % run.checkpoint_every == 0):
                    lock.check()
                    self._save(manager, step, state)
                    saved = step
            if step > saved:
                lock.check()
                self._save(manager, step, state)
            checkpoint.finish(manager)
        finally:
            log.close()
            manager.close()
        return Outcome(step, bool(stop) and step < run.steps)

    def _save(self, manager: Any, step: int, state: Any) -> None:
        identity = self.data.identity
        checkpoint.save(manager, step, state.params, state.opt_state, self.recipe, identity, None)


def _step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformationExtraArgs,
    parts: Trainable,
    state: steps.TrainState,
    *batch: Array,
) -> tuple[steps.TrainState, dict[str, Array]]:
    """One step; one whose loss or gradient norm is not finite changes nothing but the count.

    An optimizer with an agent has its own rule.
    """
    moving = without(state.params, parts.frozen)
    fixed = {name: value for name, value in state.params.items() if name not in moving}
    differentiate = jax.value_and_grad(loss, has_aux=True)
    (value, cosine), gradients = differentiate(moving, fixed, *batch)
    norm = global_norm(gradients)
    updates, opt_state = optimizer.update(
        gradients,
        state.opt_state,
        moving,
        value=value,
        value_fn=lambda params: loss(params, fixed, *batch)[0],
    )
    params = jax.tree.map(jnp.add, moving, updates) | fixed
    if "skipped_steps" not in optimizer_metrics(opt_state):
        sound = jnp.isfinite(value) & jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(sound, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
    report = {"alignment_loss": value, "alignment_cosine": cosine, "grad_norm": norm}
    return steps.TrainState(state.step + 1, params, opt_state), report
