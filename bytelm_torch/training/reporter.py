"""What is reported about steps: waited for, checked, counted, logged and shown."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bytelm import runs
from bytelm.config import Recipe, training_flops_per_byte
from bytelm.goodput import WallClock
from bytelm.metrics import MetricsLog, Throughput, add_bits, skipped_step, validation_line
from bytelm.progress import GuessWarning, ProgressLines
from bytelm.schedules import learning_rate_schedule
from bytelm_torch.interop.finite import first_non_finite
from bytelm_torch.training.parallel import Group


class StepReporter:
    """The reports of steps on the device: waited for, checked, counted, logged and shown."""

    def __init__(
        self, recipe: Recipe, start: int, group: Group, log: MetricsLog, display: ProgressLines,
        clock: WallClock, frozen: Mapping[str, int],
    ):  # fmt: skip
        """`frozen`: parameters that the run does not train, and their numbers of elements."""
        self._frozen = frozen
        self._recipe, self._log, self._display, self._clock = recipe, log, display, clock
        clock.resume(log.records, log.last, start)
        self._group, cuda = group, group.device.type == "cuda"
        self.device = torch.cuda.get_device_name(group.device) if cuda else "cpu"
        cost = training_flops_per_byte(recipe.model, recipe.data.sequence_length, frozen)
        self._rates = Throughput(cost, group.size, self.device)
        self._schedule = learning_rate_schedule(recipe.optimizer, recipe.train.steps)
        self._guess, self._skipped = GuessWarning(recipe), log.skipped
        self._pending: deque[tuple[int, dict[str, Tensor]]] = deque()
        self._start = self.saved = start
        self.asked = False
        """Whether a signal asked the run to end."""
        self.bad = 0
        """How many of the last steps were skipped."""

    def add(self, step: int, report: dict[str, Tensor]) -> None:
        """Takes the report of a step that may still be in progress."""
        self._pending.append((step, report))

    def drain(self, keep: int) -> None:
        """Waits until at most `keep` steps are in flight; checks and logs the finished ones."""
        run = self._recipe.train
        while len(self._pending) > keep:
            step, report = self._pending.popleft()
            values = {name: float(value) for name, value in report.items()}
            self.asked |= values.pop("stop") > 0  # in every process at the same step
            self._rates.add(run.batch_size * self._recipe.data.sequence_length)
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                self._skip(step, values)
                continue
            self.bad = 0
            if step % run.log_every == 0 or step == run.steps:
                self._report(step, values)

    def restart(self, sequence_length: int = 0) -> None:
        """Drains all steps; what was done since the last report counts in no rate.

        `sequence_length` is that of the steps from now on, if it changes.
        """
        self.drain(0)
        cost = training_flops_per_byte(self._recipe.model, sequence_length or 1, self._frozen)
        self._rates.restart(cost if sequence_length else None)

    def evaluated(self, step: int, record: dict[str, float]) -> None:
        """Logs and shows an evaluation."""
        self._log.write({"step": step, **record, **self._clock.record()})
        self._display.say(validation_line(step, record))

    def is_idle(self) -> bool:
        """Whether the device has finished all steps."""
        cuda = self._group.device.type == "cuda"
        return not cuda or torch.cuda.current_stream(self._group.device).query()

    def finish(self, step: int) -> None:
        """Logs and shows what the run's time, up to `step`, went to.

        A run that had nothing to do has nothing to show.
        """
        if step > self._start:
            self._log.write({"step": step, **self._clock.record()})
            self._display.say(self._clock.line(self._rates.mean_mfu))

    def diverged(self, step: int, why: str) -> runs.DivergedError:
        """The error to raise at `step`."""
        return runs.diverged(self._recipe, step, why, self.saved)

    def stop_on_non_finite(self, step: int, **trees: Any) -> None:
        """Ends the run, in all processes alike: no later step would repair the weights."""
        name = first_non_finite(trees)
        if name is not None:
            raise self.diverged(step, f"{name} holds NaN or infinity")

    def _skip(self, step: int, values: dict[str, float]) -> None:
        self.bad += 1
        self._skipped += 1
        if self.bad >= self._recipe.train.max_bad_steps:
            raise self.diverged(step, runs.never_finite(values, self.bad))
        line, record = skipped_step(step, self._skipped, values)
        self._display.say(line)
        self._log.write(record)

    def _report(self, step: int, values: dict[str, float]) -> None:
        add_bits(values)
        values["learning_rate"] = self._schedule(step - 1)
        values |= self._rates.read() | self._clock.record()
        self._log.write({"step": step, **values})
        self._display.show(step, values)
        if warning := self._guess.look(step, values["loss"]):
            self._display.say(warning)
