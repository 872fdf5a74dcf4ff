"""`--profile-steps`: a trace of some steps, for xprof and TensorBoard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from bytelm.config import TrainConfig
from bytelm.runs import traced_steps
from bytelm_jax.training import processes


class Tracing:
    """A context manager around the training loop, and the train step that it traces.

    The first process traces its own devices, into RUN/profile; a run that ends in between writes
    what it has. The steps before are waited for, so that the trace shows whole steps alone.
    """

    def __init__(
        self, step: Callable[..., Any], run: TrainConfig, start: int, run_dir: Path,
        say: Callable[[str], None],
    ):  # fmt: skip
        self._function, self._step, self._say = step, start, say
        self._folder, self._asked = run_dir / "profile", traced_steps(run, start, say)
        self._tracing = False

    def __call__(self, state: Any, *arguments: Any, **named: Any) -> tuple[Any, Any]:
        """The step after the last one."""
        self._step += 1
        if self._step not in self._asked:
            return self._function(state, *arguments, **named)
        if not self._tracing:
            jax.block_until_ready(state)
            if processes.is_first():
                jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._step):
            result = self._function(state, *arguments, **named)
        if self._step == self._asked[-1]:
            jax.block_until_ready(result)
            self._stop()
        return result

    def __enter__(self) -> "Tracing":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()

    def _stop(self) -> None:
        self._tracing = False
        if processes.is_first():
            jax.profiler.stop_trace()
            self._say(f"the trace of steps {self._asked[0]} to {self._step} is in {self._folder}")
