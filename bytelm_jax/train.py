"""The whole training story, top to bottom: setup, data, model, state, restore, step, loop."""

import math
import os
import signal
import sys
from collections import deque
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bytelm_jax import checkpoint, data, parallel, patch_contract
from bytelm_jax.config import (
    BLTConfig,
    Recipe,
    TrainConfig,
    require_document_ends,
    training_flops_per_byte,
)
from bytelm_jax.config_lfbyte import require_prediction
from bytelm_jax.display import Display
from bytelm_jax.evaluate import evaluate, make_row_nats
from bytelm_jax.loss import bits_per_byte
from bytelm_jax.metrics import MetricsLog, Throughput
from bytelm_jax.models import define_model
from bytelm_jax.optim import build_optimizer, learning_rate_schedule
from bytelm_jax.tracking import check_trackers, open_trackers

_FIXED = {"batch_size", "accumulation_steps", "seed", "entropy_from"}
_MAY_CHANGE = {f.name for f in fields(TrainConfig)} - _FIXED
"""Fields of `TrainConfig` that a resumed run may change without changing what it trains on."""

_MOST_SKIPPED = 20
"""Steps in a row that an optimizer may skip for a loss or gradient that is no number."""

_IN_FLIGHT = 4
"""Steps queued on the devices: simulated CPU devices deadlock when many are left un-awaited."""


class Outcome(NamedTuple):
    """How a run ended: at which step, and whether a signal stopped it before the last one."""

    step: int
    interrupted: bool


class DivergedError(RuntimeError):
    """The loss is no longer a number; the message names the step and the last good checkpoint."""


class StopSignal:
    """True once SIGINT or SIGTERM arrived; a second signal ends the process at once."""

    def __init__(self) -> None:
        self._seen = False

    def __bool__(self) -> bool:
        return self._seen

    def __enter__(self) -> "StopSignal":
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            os._exit(128 + number)
        self._seen = True
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)


def prepare_run_dir(run_dir: Path, recipe: Recipe) -> None:
    """Makes the folder, or makes sure that it holds this recipe; raises `ValueError` otherwise."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir={run_dir}: is a file; name a folder")
    if (run_dir / "config.json").exists():
        check_same_run(checkpoint.load_config(run_dir), recipe, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)


def check_same_run(saved: Recipe, asked: Recipe, run_dir: Path) -> None:
    """Raises `ValueError` for the first field whose change would make this another run."""
    pairs = [("model", saved.model, asked.model), ("optimizer", saved.optimizer, asked.optimizer)]
    pairs += [("data", saved.data, asked.data), ("train", saved.train, asked.train)]
    for part, old, new in pairs:
        names = [f.name for f in fields(old)] if type(old) is type(new) else []
        if not names:
            raise ValueError(
                f"{part}: {run_dir} holds another architecture; choose another run_dir"
            )
        for name in names:
            free = name == "paths" or (part == "train" and name in _MAY_CHANGE)
            before, after = getattr(old, name), getattr(new, name)
            if before != after and not free:
                raise ValueError(
                    f"{part}.{name}={after}: {run_dir} was started with {before}; "
                    "keep that value or choose another run_dir"
                )


def agree_on_patches(recipe: Recipe, params: Any, windows: data.Windows, resumed: bool) -> Recipe:
    """`recipe` with its patching contract; says so where these data break the one it came with."""
    model, known = recipe.model, recipe.patching
    assert isinstance(model, BLTConfig)
    found = patch_contract.measure(model, params, windows)
    wrong = patch_contract.outside(known, found) if known else None
    if wrong:
        print(f"bytelm train: warning: data.paths: {wrong}", file=sys.stderr, flush=True)
    return recipe if resumed and known else replace(recipe, patching=found)


def open_windows(recipe: Recipe) -> tuple[data.Windows, data.Windows, str]:
    """Training and validation windows of the recipe's data, and the identity of that data."""
    kept = recipe.data
    corpus = data.open_corpus(kept.paths)
    parts = data.split(corpus, kept.validation_fraction, kept.split_seed)
    windows, held_out = (
        data.Windows(part, recipe.model.vocab, kept.sequence_length, kept.append_eos)
        for part in parts
    )
    return windows, held_out, corpus.fingerprint()


def train(recipe: Recipe, run_dir: Path) -> Outcome:
    """Trains `recipe` in `run_dir`, from its latest checkpoint when it holds one.

    Raises `ValueError` for settings, data or checkpoints that do not fit, before anything is
    overwritten, and `DivergedError` when the loss stops being finite: at once, or after
    `_MOST_SKIPPED` steps in a row with an optimizer that skips such steps.
    """
    require_prediction(recipe.model)
    require_document_ends(recipe)

    # ---- setup ----
    check_trackers(recipe.train.track)
    recipe = patch_contract.adopt(recipe, run_dir)
    run, vocab = recipe.train, recipe.model.vocab
    frozen = recipe.model.frozen_prefixes
    mesh = parallel.make_mesh(run.devices)
    parallel.check_batch(mesh, run)

    # ---- data ----
    length = recipe.data.sequence_length
    windows, held_out, identity = open_windows(recipe)

    # ---- model and state, born sharded ----
    prepare_run_dir(run_dir, recipe)
    bind, init = define_model(recipe.model)
    optimizer = build_optimizer(recipe.optimizer, run.steps, run.seed, frozen)
    state = parallel.init_state(mesh, optimizer, lambda: init(run.seed))

    # ---- restore ----
    manager = checkpoint.open_checkpoints(run_dir, run)
    start = manager.latest_step() or 0
    if start:
        like = parallel.abstract_state(state)
        params, opt_state, found = checkpoint.restore(manager, start, like.params, like.opt_state)
        if found["data"] != identity:
            raise ValueError(f"data: not the bytes that {run_dir} was started on; give the same")
        step_number = jax.device_put(start, like.step.sharding).astype(like.step.dtype)
        state = parallel.TrainState(step_number, params, opt_state)
    elif run.entropy_from:
        trained = patch_contract.load_entropy_model(recipe)
        trained = jax.device_put(trained, parallel.replicated(mesh))
        state = state._replace(params=state.params | trained)
    if isinstance(recipe.model, BLTConfig):
        recipe = agree_on_patches(recipe, state.params, windows, bool(start))
    checkpoint.save_config(run_dir, recipe)

    # ---- step ----
    step_function = parallel.make_train_step(bind, optimizer, run, vocab.pad_id, mesh, frozen)
    row_nats = make_row_nats(bind, vocab.pad_id, mesh, parallel.compute_dtype(run))
    schedule = learning_rate_schedule(recipe.optimizer, run.steps)
    log = MetricsLog(run_dir / "metrics.jsonl", start, open_trackers(recipe, run_dir, start))
    rates = Throughput(training_flops_per_byte(recipe.model, length), mesh.size)
    pending: deque[tuple[int, dict[str, Any]]] = deque()
    saved = counted = start  # the step up to which checkpoints and rates reach
    in_a_row = 0

    def settle(keep: int, display: Display) -> None:
        """Waits until at most `keep` steps are in flight; checks and logs the finished ones."""
        nonlocal in_a_row, counted
        while len(pending) > keep:
            step, report = pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(report).items()}
            finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
            in_a_row = 0 if finite else in_a_row + 1
            if in_a_row > (_MOST_SKIPPED if "skipped_steps" in values else 0):
                raise DivergedError(
                    f"step {step}: the loss is {values['loss']} and the gradient norm "
                    f"{values['grad_norm']}; the checkpoint of step {saved} is kept; lower "
                    f"optimizer.learning_rate={recipe.optimizer.learning_rate}"
                )
            if not finite:
                display.say(f"step {step}: skipped, its loss or gradient norm is not a number")
                log.write({"step": step} | {k: v for k, v in values.items() if math.isfinite(v)})
            elif step % run.log_every == 0 or step == run.steps:
                values["bits_per_byte"] = bits_per_byte(values["loss"], 1)
                values.setdefault("learning_rate", float(schedule(jnp.asarray(step - 1))))
                # The host may come late: steps behind this one may be finished, too.
                finished = step + sum(later["loss"].is_ready() for _, later in pending)
                rates.add((finished - counted) * run.batch_size * length)
                counted = finished
                values |= rates.read()
                log.write({"step": step, **values})
                display.show(step, values)

    def validate(step: int, display: Display) -> dict[str, float] | None:
        if not len(held_out):
            return None
        batches = data.evaluation_batches(held_out, run.batch_size, run.eval_windows)
        found = evaluate(row_nats, state.params, batches, vocab.pad_id, mesh)
        record = {
            "validation_loss": found.nats / found.count,
            checkpoint.METRIC: found.bits_per_byte,
        }
        log.write({"step": step, **record})
        display.say(f"step {step}: validation {found.bits_per_byte:.4f} bits per byte")
        return record

    # ---- loop ----
    batches = data.batches(windows, run.batch_size, recipe.data.shuffle_seed, start)
    step = start
    with (
        StopSignal() as stop,
        Display(recipe.name, start, run.steps) as display,
        manager,
        closing(log),
    ):
        display.say(
            f"{'resuming' if start else 'training'} {recipe.name} in {run_dir}, step {start}"
        )
        while step < run.steps and not stop:
            piece = recipe.data.length_at(step)
            compiles = step == start or piece != recipe.data.length_at(step - 1)
            if compiles:
                settle(0, display)
            rows = next(batches).reshape(-1, piece)
            state, report = step_function(state, parallel.put_batch(mesh, rows))
            step += 1
            pending.append((step, report))
            if compiles:  # which belongs to no rate
                settle(0, display)
                counted = step
                rates.restart(training_flops_per_byte(recipe.model, piece))
            settle(_IN_FLIGHT, display)

            last = step == run.steps
            evaluates = last or (run.eval_every and step % run.eval_every == 0)
            saves = last or (run.checkpoint_every and step % run.checkpoint_every == 0)
            if evaluates or saves:
                settle(0, display)
                record = validate(step, display) if evaluates else None
                if saves:
                    checkpoint.save(
                        manager, step, state.params, state.opt_state, recipe, identity, record
                    )
                    saved = step
                counted = step
                rates.restart()
        settle(0, display)
        if stop and step > saved:
            checkpoint.save(manager, step, state.params, state.opt_state, recipe, identity, None)
        checkpoint.finish(manager)
    return Outcome(step, bool(stop) and step < run.steps)
