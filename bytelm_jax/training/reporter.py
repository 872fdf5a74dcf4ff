"""What is reported about steps: waited for, checked, counted, logged and shown."""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from bytelm import runs
from bytelm.config import (
    Recipe,
    training_flops_per_byte,
)
from bytelm.goodput import WallClock
from bytelm.metrics import MetricsLog, Throughput, add_bits, skipped_step, validation_line
from bytelm.progress import GuessWarning
from bytelm_jax.optimizers.build import learning_rate_schedule
from bytelm_jax.training import checkpoint, processes
from bytelm_jax.training.display import Display


class StepReporter:
    """The reports of steps on the devices: waited for, checked, counted, logged and shown."""

    def __init__(
        self, recipe: Recipe, start: int, devices: int, log: MetricsLog, display: Display,
        watchdog: processes.Watchdog, manager: ocp.CheckpointManager, clock: WallClock,
        frozen: Mapping[str, int],
    ):  # fmt: skip
        """`frozen`: parameters that the run does not train, and their numbers of elements."""
        self._frozen = frozen
        self._recipe, self._log, self._display = recipe, log, display
        self._watchdog, self._manager, self._clock = watchdog, manager, clock
        clock.resume(log.records, log.last, start)
        self._pending: deque[tuple[int, dict[str, Any]]] = deque()
        self._rates = Throughput(0.0, devices, jax.devices()[0].device_kind)
        self._schedule = jax.jit(learning_rate_schedule(recipe.optimizer, recipe.train.steps))
        self._counted = start  # the last step that rates include
        self._guess = GuessWarning(recipe)
        self._skipped = log.skipped
        self._start = self.saved = start
        self.bad_in_a_row = 0

    def add(self, step: int, report: dict[str, Any]) -> None:
        """Takes the report of a step that may still be in progress."""
        self._pending.append((step, report))

    def drain(self, keep: int) -> None:
        """Waits until at most `keep` steps are in flight; checks and logs the finished ones."""
        run = self._recipe.train
        while len(self._pending) > keep:
            step, report = self._pending.popleft()
            values = {name: float(value) for name, value in jax.device_get(report).items()}
            self._watchdog.progress(f"the steps after {step}")
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                self._skip(step, values)
                continue
            self.bad_in_a_row = 0
            if step % run.log_every == 0 or step == run.steps:
                self._report(step, values)

    def exclude_from_rates(self, step: int, sequence_length: int = 0) -> None:
        """Drains all steps; the time and bytes since the last report up to `step` count in no rate.

        `sequence_length` is that of the steps from now on, if it changes.
        """
        self.drain(0)
        if sequence_length:  # most of the step's time
            self._clock.count_as("compile")
        self._counted = step
        cost = training_flops_per_byte(self._recipe.model, sequence_length or 1, self._frozen)
        self._rates.restart(cost if sequence_length else None)

    def evaluated(self, step: int, record: dict[str, float]) -> None:
        """Logs and shows an evaluation."""
        self._log.write({"step": step, **record, **self._clock.record()})
        self._display.say(validation_line(step, record))

    def is_idle(self) -> bool:
        """Whether the devices have finished all steps."""
        return all(report["loss"].is_ready() for _, report in self._pending)

    def finish(self, step: int) -> None:
        """Waits for the last checkpoint; logs and shows what the run's time, up to `step`, went to.

        A run that had nothing to do has nothing to show.
        """
        with self._clock.phase("checkpoint"):
            checkpoint.finish(self._manager)
        if step > self._start:
            self._log.write({"step": step, **self._clock.record()})
            self._display.say(self._clock.line(self._rates.mean_mfu))

    def diverged(self, step: int, why: str) -> runs.DivergedError:
        """The error to raise at `step`; waits until the checkpoint that it names is on disk."""
        checkpoint.finish(self._manager)
        return runs.diverged(self._recipe, step, why, self.saved)

    @contextmanager
    def stopping_on_non_finite(self, step: int) -> Iterator[None]:
        """Within this context non-finite weights end the run: no later step would repair them."""
        try:
            yield
        except checkpoint.NonFiniteError as error:
            raise self.diverged(step, str(error)) from None

    def _skip(self, step: int, values: dict[str, float]) -> None:
        self.bad_in_a_row += 1
        self._skipped += 1
        if self.bad_in_a_row >= self._recipe.train.max_bad_steps:
            raise self.diverged(step, runs.never_finite(values, self.bad_in_a_row))
        line, record = skipped_step(step, self._skipped, values)
        self._display.say(line)
        self._log.write(record)

    def _report(self, step: int, values: dict[str, float]) -> None:
        run, length = self._recipe.train, self._recipe.data.sequence_length
        add_bits(values)
        values.setdefault("learning_rate", float(self._schedule(jnp.asarray(step - 1))))
        # The host may be late: steps after this one may be finished, too.
        finished = step + sum(later["loss"].is_ready() for _, later in self._pending)
        self._rates.add((finished - self._counted) * run.batch_size * length)
        self._counted = finished
        values |= self._rates.read() | self._clock.record()
        self._log.write({"step": step, **values})
        self._display.show(step, values)
        if warning := self._guess.look(step, values["loss"]):
            self._display.say(warning)
