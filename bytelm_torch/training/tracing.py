"""`train.profile_steps`: a trace of some steps, for TensorBoard and Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import profiler

from bytelm.config import TrainConfig
from bytelm.runs import traced_steps
from bytelm_torch.training.parallel import Group


class Tracing:
    """A context manager around the training loop, and the train step that it traces.

    The first process traces its own device, into RUN/profile; a run that ends in between writes
    what it has. The steps before are waited for, so that the trace shows whole steps alone.
    """

    def __init__(
        self, step: Callable[..., Any], run: TrainConfig, start: int, run_dir: Path,
        say: Callable[[str], None], group: Group,
    ):  # fmt: skip
        self._function, self._say, self._group = step, say, group
        self._folder, self._asked = run_dir / "profile", traced_steps(run, start, say)
        self._step, self._trace = start, None

    def __call__(self, step: int, *arguments: Any, **named: Any) -> Any:
        """The step with index `step`, counted from 0."""
        self._step = step + 1
        if self._step not in self._asked or self._group.rank:
            return self._function(step, *arguments, **named)
        if self._trace is None:
            self._wait()
            kinds = profiler.supported_activities()
            where = profiler.tensorboard_trace_handler(str(self._folder))
            self._trace = profiler.profile(activities=kinds, on_trace_ready=where)
            self._trace.start()
        with profiler.record_function(f"train step {self._step}"):
            result = self._function(step, *arguments, **named)
        if self._step == self._asked[-1]:
            self._wait()
            self._stop()
        return result

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(self, *_: object) -> None:
        if self._trace is not None:
            self._stop()

    def _wait(self) -> None:
        if self._group.device.type == "cuda":
            torch.cuda.synchronize(self._group.device)

    def _stop(self) -> None:
        trace, self._trace = self._trace, None
        assert trace is not None
        trace.stop()
        self._say(f"the trace of steps {self._asked[0]} to {self._step} is in {self._folder}")
