"""The whole training story, top to bottom: setup, data, model, restore, step, loop.

The same recipe trains on the same windows in the same order as `bytelm train`.
"""

import os
from contextlib import closing
from functools import partial
from pathlib import Path

from torch import nn

from bytelm.chips import unknown_peak
from bytelm.config import (
    Recipe,
    require,
    require_document_ends,
    require_length,
)
from bytelm.config.lfbyte import require_prediction
from bytelm.data import evaluation_batches
from bytelm.goodput import WallClock
from bytelm.memory import require_host_memory
from bytelm.metrics import MetricsLog, validation_record
from bytelm.patience import Patience, require_validation
from bytelm.progress import ProgressLines, StopSignal
from bytelm.run_data import first_lines, open_windows
from bytelm.runs import (
    Outcome,
    RunLock,
    keep_rules,
    not_saved,
    prepare_run_dir,
    require_ahead,
    require_lock,
    start_notes,
    what_a_run_is,
)
from bytelm.schedules import jumps, learning_rate_schedule, too_long
from bytelm.starting import (
    keep_source,
)
from bytelm.storage.stores import require_local
from bytelm.tracking import check_trackers, open_trackers
from bytelm_torch.models import parameter_paths
from bytelm_torch.optimizers.build import build_optimizer
from bytelm_torch.training import checkpoint, parallel, starting
from bytelm_torch.training.average import Average
from bytelm_torch.training.batches import training_batches
from bytelm_torch.training.evaluate import evaluate_batches, make_row_nats
from bytelm_torch.training.reporter import StepReporter
from bytelm_torch.training.tracing import Tracing

_IN_FLIGHT = 4
"""Steps queued on the device before their metrics are looked at."""


def train(recipe: Recipe, run_dir: Path, compiled: bool = False) -> Outcome:
    """Trains `recipe` in `run_dir`, continuing from its latest checkpoint if there is one.

    `compiled` has `torch.compile` make one graph of model and loss.

    Raises `ValueError` for settings, data, weights or checkpoints that do not fit. Raises
    `DivergedError` if the loss was not finite at `max_bad_steps` steps in a row, each of which was
    skipped, or at the last steps, and if weights are not finite; such weights are neither evaluated
    nor saved.
    """
    require_local(run_dir, "run_dir")
    with parallel.join_group(timeout=recipe.train.step_timeout) as group, RunLock() as lock:
        return _train(recipe, run_dir, group, lock, WallClock(), compiled)


def _check(recipe: Recipe, run_dir: Path, group: parallel.Group) -> None:
    """Raises `ValueError` for a recipe that this package cannot train."""
    require_prediction(recipe.model)
    require_document_ends(recipe)
    require_length(recipe)
    check_trackers(recipe.train.track)
    parallel.check_batch(group, recipe.train)
    if group.device.type == "cpu":
        require_host_memory(recipe)
    model, source = recipe.model, recipe.train.entropy_from
    if checkpoint.saved_steps(run_dir):
        return
    starting.check_start(recipe)
    if recipe.train.init_from or recipe.train.branch_from:
        return
    require(
        not source,
        f"train.entropy_from={source}: this trainer takes no entropy model out of a run; train "
        "with `bytelm train`, or start from an export of the whole model by train.init_from",
    )
    require(
        not model.needs_entropy_model,
        "model.patcher='entropy': needs a trained entropy model; start from an export of the whole "
        "model by train.init_from, or take model.patcher=space",
    )


def _frozen_sizes(model: nn.Module) -> dict[str, int]:
    """The parameters that do not train, by the names of `parameter_paths`, and their elements."""
    paths, named = parameter_paths(model), model.named_parameters()
    return {paths[name]: each.numel() for name, each in named if not each.requires_grad}


def _train(
    recipe: Recipe,
    run_dir: Path,
    group: parallel.Group,
    lock: RunLock,
    clock: WallClock,
    compiled: bool,
) -> Outcome:
    if compiled:
        parallel.require_compilable(recipe.model)
    recipe = keep_source(keep_rules(run_dir, recipe), run_dir)
    run, vocab, first = recipe.train, recipe.model.vocab, group.rank == 0
    _check(recipe, run_dir, group)

    lora, parts = starting.parts_of(recipe)

    # ---- data ----
    length = recipe.data.sequence_length
    found_data = open_windows(recipe)
    windows, validation, identity = found_data
    require_validation(recipe, bool(validation))
    found = what_a_run_is(recipe) | {"run_dir": str(run_dir), "data": identity}
    parallel.require_agreement(group, found)

    # ---- model and optimizer ----
    recipe, model = starting.open_model(recipe, run_dir, group.device, lora)
    if first:
        prepare_run_dir(run_dir, recipe)
        require_lock(lock.take(run_dir), run_dir)
    model.train()
    optimizer = build_optimizer(recipe.optimizer, model, run.seed, parts)

    # ---- restore ----
    parallel.wait_for_all(group)
    average, resumes = Average(model, run.average_decay), bool(checkpoint.saved_steps(run_dir))
    restored = starting.restore(recipe, run_dir, identity, model, optimizer, average)
    recipe, start, notes = restored
    require_ahead(recipe, start, run_dir)

    # ---- step ----
    parts = (model, optimizer, run, vocab.pad_id, group, found_data.names, compiled)
    step_function = parallel.make_train_step(*parts)
    row_nats = make_row_nats(model, vocab.pad_id, parallel.compute_dtype(run, group.device))
    schedule = learning_rate_schedule(recipe.optimizer, run.steps)
    order = (recipe.data.shuffle_seed, start, group.rank, group.size, recipe.data.order)
    batches = training_batches(windows, run.batch_size, *order)
    notes = [*jumps(run_dir, recipe, start), *too_long(recipe), *notes]
    notes += [] if start else start_notes(recipe)
    log = _open_log(recipe, run_dir, start, lock if first else None)
    display = ProgressLines(run.steps, first)
    reporter = StepReporter(recipe, start, group, log, display, clock, _frozen_sizes(model))
    batches = clock.batches(batches, reporter.is_idle)
    agree = partial(parallel.as_first_says, group)
    patience = Patience(run.patience, log.records, agree, display.say)

    @clock.phase("evaluation")
    def validate(step: int) -> dict[str, float] | None:
        if not validation:
            return None
        reporter.stop_on_non_finite(step, model=model.state_dict())
        rows = -(-run.batch_size // group.size) * group.size
        part, results = (run.eval_windows, group.rank, group.size), {}
        for name, held_out in validation.items():
            batches = evaluation_batches(held_out, rows, *part)
            with average.in_model():
                results[name] = evaluate_batches(row_nats, batches, vocab.pad_id, group)
        record = validation_record(results)
        reporter.evaluated(step, record)
        patience.look(step, record)
        return record

    @clock.phase("checkpoint")
    def save(step: int, record: dict[str, float] | None) -> None:
        reporter.stop_on_non_finite(
            step, model=model.state_dict(), optimizer=optimizer.state_dict()
        )
        if first:
            lock.check()
            run_state = (run_dir, step, model, optimizer, recipe, identity)
            checkpoint.save(*run_state, record, average)
        reporter.saved = step

    # ---- loop ----
    step, piece = start, length
    traced = Tracing(step_function, run, start, run_dir, display.say, group)
    with StopSignal() as stop, closing(log), traced:
        parameters = sum(each.numel() for each in model.parameters())
        frozen = sum(each.numel() for each in model.parameters() if not each.requires_grad)
        devices = f"{group.size} {reporter.device} device{'s' * (group.size > 1)}"
        machine = f"{devices}, {parallel.compute_dtype(run, group.device)}"
        lines = first_lines(recipe, found_data, parameters, machine, frozen)
        lines += [*notes, *unknown_peak(reporter.device)]
        how = "resuming" if resumes else "training"
        for line in (f"{how} {recipe.name} in {run_dir}, step {start}", *lines):
            display.say(line)
        if start and not resumes:
            save(start, None)  # a branch needs its source no more
        while step < run.steps and not reporter.asked and not patience.over:
            clip, rate = recipe.optimizer.max_grad_norm, schedule(step)
            before, piece = piece, recipe.data.length_at(step)
            if piece != before:
                reporter.restart(piece)
            batch = next(batches).cut(piece)
            report = traced(step, batch.ids, rate, clip, bool(stop), **batch.rest())
            average.update()
            step += 1
            reporter.add(step, report)
            reporter.drain(0 if group.device.type == "cpu" else _IN_FLIGHT)

            last = step == run.steps
            evaluates = last or (run.eval_every and step % run.eval_every == 0)
            saves = last or (run.checkpoint_every and step % run.checkpoint_every == 0)
            if evaluates or saves:
                reporter.drain(0)
                record = validate(step) if evaluates else None
                saves = saves or patience.over
                # While steps are being skipped, or where a validation is not finite, the checkpoint
                # from before stays the newest; at the end a validation alone decides.
                good = not reporter.bad
                if record is not None:
                    good = checkpoint.score(record) is not None and (good or last)
                if saves and good:
                    save(step, record)
                reporter.restart()
        reporter.drain(0)
        if step > reporter.saved:
            if not reporter.asked:
                raise reporter.diverged(step, not_saved(reporter.bad))
            save(step, None)
        reporter.finish(step)
    parallel.wait_for_all(group)
    return Outcome(step, reporter.asked and step < run.steps)


def _open_log(recipe: Recipe, run_dir: Path, start: int, lock: RunLock | None) -> MetricsLog:
    """The log of the process that has the lock; the others write nowhere."""
    if lock is None:
        return MetricsLog(Path(os.devnull), start)
    lock.check()
    log = MetricsLog(run_dir / "metrics.jsonl", start, open_trackers(recipe, run_dir, start))
    lock.save_recipe(recipe)  # nothing is refused any more
    return log
