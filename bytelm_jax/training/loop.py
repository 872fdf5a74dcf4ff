"""The whole training story, top to bottom: setup, data, model, state, restore, step, loop."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bytelm.chips import unknown_peak
from bytelm.config import (
    Recipe,
    TrainConfig,
    require_document_ends,
    require_length,
)
from bytelm.config.lfbyte import require_prediction
from bytelm.data import Mixture, Windows, evaluation_batches
from bytelm.goodput import WallClock
from bytelm.metrics import MetricsLog, validation_record
from bytelm.patience import Patience, require_validation
from bytelm.remote.run import RemoteRun
from bytelm.run_data import RunData, first_lines, open_windows
from bytelm.runs import (
    Outcome,
    RunLock,
    keep_rules,
    not_saved,
    open_run,
    prepare_run_dir,
    require_ahead,
    require_lock,
    require_same_data,
    start_notes,
    what_a_run_is,
)
from bytelm.schedules import jumps, too_long
from bytelm.starting import ANEW, keep_source
from bytelm.tracking import check_trackers, open_trackers
from bytelm.trainable import Trainable, trainable
from bytelm_jax.models import adapters_of, define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.training import checkpoint, processes, starting
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import (
    patch_calibration as patch_contract,
)
from bytelm_jax.training import step as steps
from bytelm_jax.training.batches import order_digest, training_batches
from bytelm_jax.training.display import Display
from bytelm_jax.training.evaluate import evaluate_batches, make_row_nats
from bytelm_jax.training.remote import remote_of, require_one_process
from bytelm_jax.training.reporter import StepReporter
from bytelm_jax.training.tracing import Tracing

_IN_FLIGHT = 4
"""Steps queued on the devices: simulated CPU devices deadlock if many are not awaited."""

_HOW = {True: "resuming", False: "training"}

Holder = RunLock | RemoteRun
"""What keeps a second run out of a folder, on a disk or at an address."""


def agree_on_patches(
    recipe: Recipe, state: steps.TrainState, mesh: Any, windows: Windows | Mixture, resumed: bool
) -> Recipe:
    """`recipe` with its patching contract; warns if these data break the one it already has."""
    model, known = recipe.model, recipe.patching
    frozen = {k: v for k, v in state.params.items() if k.startswith(model.frozen_prefixes)}
    # On one device of this process: every process measures for itself.
    whole = {name: jnp.asarray(value) for name, value in meshes.fetch(mesh, frozen).items()}
    contract = patch_contract.measure(model, whole, windows)
    wrong = patch_contract.outside(known, contract) if known else None
    if wrong and processes.is_first():
        print(f"bytelm train: warning: data.paths: {wrong}", file=sys.stderr, flush=True)
    return recipe if resumed and known else replace(recipe, patching=contract)


def open_log(recipe: Recipe, run_dir: Path, start: int) -> MetricsLog:
    """The log of the first process, including trackers; the other processes write nowhere."""
    if not processes.is_first():
        return MetricsLog(Path(os.devnull), start)
    return MetricsLog(run_dir / "metrics.jsonl", start, open_trackers(recipe, run_dir, start))


def take_folder(lock: Holder, run_dir: Path, recipe: Recipe) -> None:
    """Raises `ValueError`, in every process, unless this run holds its folder from now on."""
    looking = -1
    while True:  # no process waits in a collective for longer than a look takes
        taken = lock.look(run_dir) if processes.is_first() else None
        [answer] = processes.from_first([2 if taken is None else int(taken)], 1)
        looking += 1
        if answer != 2:
            break
    require_lock(answer == 1, lock.name)
    if looking:  # another process had it, and may have begun a run
        prepare_run_dir(run_dir, recipe)


def check_folder(lock: Holder) -> None:
    """Raises `ValueError`, in every process, unless the folder is still as this run left it."""
    with processes.agreement():
        if processes.is_first():
            lock.check()


def frozen_sizes(params: Any, parts: Trainable) -> dict[str, int]:
    """The parameters that do not train, and their numbers of elements."""
    return {name: params[name].size for name in parts.frozen}


def what_it_is(
    recipe: Recipe, data: RunData, params: Any, parts: Trainable, mesh: Any
) -> list[str]:
    """The first lines of a run; `params` may be abstract."""
    sizes = {name: leaf.size for name, leaf in params.items()}
    frozen = sum(frozen_sizes(params, parts).values())
    machine = f"{meshes.in_words(mesh)}, {steps.compute_dtype(recipe.train, mesh)}"
    lines = first_lines(recipe, data, sum(sizes.values()), machine, frozen)
    return lines + unknown_peak(mesh.devices.flat[0].device_kind)


@contextmanager
def checkpoints_of(lock: Holder, run: TrainConfig) -> Iterator[Any]:
    """The run's checkpoints; an error that ends the block is not hidden by a late one of a save."""
    manager = checkpoint.open_checkpoints(lock.local, run, remote_of(lock))
    try:
        yield manager
    except BaseException:
        with suppress(Exception):
            manager.close()
        raise
    manager.close()


def is_due(last: int, step: int, every: int) -> bool:
    """Whether what happens at every so many steps (0: never), and at the `last`, happens at one."""
    return step == last or bool(every and step % every == 0)


def train(recipe: Recipe, run_dir: Path, locked: bool = True) -> Outcome:
    """Trains `recipe` in `run_dir`, from its latest undamaged checkpoint if there is one.

    `run_dir` may be an address (`gs://`, `s3://`). Nothing keeps a second run out if not `locked`.

    Raises `ValueError` for settings, data or checkpoints that do not fit, before anything is
    overwritten. Raises `DivergedError` if the loss was not finite at `max_bad_steps` steps in a
    row, each of which was skipped, or at the last steps, and if weights are not finite; such
    weights are neither evaluated nor saved. All processes call it alike. SIGINT and SIGTERM end it
    with everything saved, see `processes.StopSignal`.
    """
    run = recipe.train
    holder = open_run(run_dir, recipe.data.cache_dir, locked, run.track, run.profile_steps)
    with processes.StopSignal() as stop, holder as lock:
        return _train(recipe, lock, stop, WallClock())


def _train(recipe: Recipe, lock: Holder, stop: processes.StopSignal, clock: WallClock) -> Outcome:
    run_dir = lock.local
    # ---- setup and data, the same in every process ----
    with processes.agreement() as found:
        require_prediction(recipe.model)
        require_document_ends(recipe)
        require_length(recipe)
        check_trackers(recipe.train.track)
        recipe = keep_source(keep_rules(run_dir, recipe), run_dir)
        recipe = patch_contract.adopt(recipe, run_dir)
        mesh = meshes.make_mesh(recipe.train.devices, recipe.train.fsdp, recipe.train.tensor)
        meshes.check_batch(mesh, recipe.train)
        bind, init = define_model(recipe.model, adapters_of(recipe))
        init_params = partial(init, recipe.train.seed)
        parts = trainable(recipe, params := jax.eval_shape(init_params))
        windows, validation, identity = found_data = open_windows(recipe)
        require_validation(recipe, bool(validation))
        fresh, trained = not lock.steps(), {}
        if fresh:
            recipe, trained = starting.load_start(recipe)
        found |= processes.installation() | what_a_run_is(recipe)
        require_one_process(lock)
        found |= {"run_dir": lock.name, "data": identity, "mesh": meshes.describe(mesh)}
        found["rows"] = order_digest(windows, recipe.data.shuffle_seed, recipe.data.order)
    run, vocab = recipe.train, recipe.model.vocab
    part, first = meshes.process_slice(mesh), processes.is_first()

    # ---- model and step ----
    prepare_run_dir(run_dir, recipe)
    take_folder(lock, run_dir, recipe)
    optimizer = build_optimizer(recipe.optimizer, run.steps, run.seed, parts)
    step_function = steps.make_train_step(
        bind, optimizer, run, vocab.pad_id, mesh, parts, names=found_data.names
    )
    template = steps.abstract_init(mesh, optimizer, params, steps.averaged(run, parts))

    # ---- state, restored or born sharded ----
    arrays = (template.params, template.opt_state)
    resumed = begun = checkpoint.recover(run_dir, *arrays, remote_of(lock), template.average)
    if not resumed:
        recipe, begun = starting.load_branch(recipe, template)
    start = begun.step if begun else 0
    require_ahead(recipe, start, lock.name)
    if resumed:
        require_same_data(resumed.metadata["data"], identity, lock.name)
    piece = recipe.data.length_at(start)
    shape = (run.batch_size * recipe.data.sequence_length // piece, piece)
    ahead = steps.compiling(
        step_function, template, shape, mesh, bool(found_data.names), windows.is_masked
    )
    with clock.leaving(ahead, "compile") if start < run.steps else nullcontext():
        if not resumed and not fresh:  # no checkpoint could be read
            recipe, trained = starting.load_start(recipe)
        compile_init = partial(steps.compile_init, optimizer, init_params, template)
        state = starting.make_state(recipe, compile_init, template, mesh, begun, trained)
        anew = begun is not None and begun.opt_state is None
        del trained, begun  # whole copies of the weights, and the run is long
        if recipe.model.has_patching_contract:
            recipe = agree_on_patches(recipe, state, mesh, windows, bool(start))
    row_nats = make_row_nats(bind, vocab.pad_id, mesh, steps.compute_dtype(run, mesh))

    # ---- what is open for the length of the run ----
    order = (recipe.data.shuffle_seed, start, *part, recipe.data.order)
    batches = training_batches(windows, run.batch_size, *order)
    step, piece = start, 0
    notes = jumps(run_dir, recipe, start) + too_long(recipe) + [ANEW] * anew
    notes += [] if start else start_notes(recipe)
    check_folder(lock)  # compiling has taken its time
    with ExitStack() as stack:
        manager = stack.enter_context(checkpoints_of(lock, run))
        log = stack.enter_context(closing(open_log(recipe, run_dir, start)))
        if first:  # nothing is refused any more
            lock.save_recipe(recipe)
        display = stack.enter_context(Display(recipe.name, start, run.steps, first))
        watchdog = stack.enter_context(processes.Watchdog(run_dir / "progress", run.step_timeout))
        shown = (log, display, watchdog, manager, clock, frozen_sizes(template.params, parts))
        reporter = StepReporter(recipe, start, mesh.size, *shown)
        batches = clock.batches(batches, reporter.is_idle)
        traced = stack.enter_context(Tracing(step_function, run, start, run_dir, display.say))
        patience = Patience(run.patience, log.records, processes.as_first_says, display.say)
        display.say(f"{_HOW[bool(resumed)]} {recipe.name} in {lock.name}, step {start}")
        for line in what_it_is(recipe, found_data, template.params, parts, mesh) + notes:
            display.say(line)

        @clock.phase("evaluation")
        def validate(step: int, state: steps.TrainState) -> dict[str, float] | None:
            if not validation:
                return None
            checkpoint.check_finite({"params": state.weights})
            results = {}
            for name, windows in validation.items():
                batches = evaluation_batches(windows, run.batch_size, run.eval_windows, *part)
                watched = watchdog.over(batches, f"the evaluation of step {step}")
                results[name] = evaluate_batches(row_nats, state.weights, stop.until(watched), mesh)
            if stop:
                return None
            record = validation_record(results)
            reporter.evaluated(step, record)
            patience.look(step, record)
            return record

        @clock.phase("checkpoint")
        def save(step: int, state: steps.TrainState, record: dict[str, float] | None) -> None:
            watchdog.progress(f"the checkpoint of step {step}")
            check_folder(lock)
            checkpoint.save(manager, step, *state[1:3], recipe, identity, record, state.average)
            reporter.saved = step

        due = partial(is_due, run.steps)

        # ---- loop ----
        if start and not resumed:
            save(start, state, None)  # a branch needs its source no more
        if resumed and not resumed.metadata["metrics"] and due(start, run.eval_every):
            validate(start, state)  # cut short by a signal
        while step < run.steps and not patience.over and not stop.agreed():
            lock.stop_if_lost()
            before, piece = piece, recipe.data.length_at(step)
            if piece != before:
                reporter.drain(0)
            batch = jax.tree.map(partial(meshes.put_batch, mesh), next(batches).cut(piece))
            state, report = traced(state, batch.ids, **batch.rest())
            step += 1
            reporter.add(step, report)
            if piece != before:  # compiled
                reporter.exclude_from_rates(step, piece)
            reporter.drain(_IN_FLIGHT)

            evaluates, saves = due(step, run.eval_every), due(step, run.checkpoint_every)
            if evaluates or saves:
                reporter.drain(0)
                with reporter.stopping_on_non_finite(step):
                    record = validate(step, state) if evaluates else None
                    saves |= patience.over
                    # While steps are being skipped, or where a validation is not finite, the
                    # checkpoint from before stays the newest; at the end validation decides alone.
                    good = not reporter.bad_in_a_row
                    if record is not None:
                        good = checkpoint.score(record) is not None and (good or step == run.steps)
                    if saves and good:
                        save(step, state, record)
                reporter.exclude_from_rates(step)
        reporter.drain(0)
        if step > reporter.saved:
            if not stop:
                raise reporter.diverged(step, not_saved(reporter.bad_in_a_row))
            with reporter.stopping_on_non_finite(step):
                save(step, state, None)
        reporter.finish(step)
    return Outcome(step, bool(stop) and step < run.steps)
