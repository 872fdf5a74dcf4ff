"""Recipes trained for the same time and then evaluated: what several benchmarks here share.

No command of its own. Compilation and evaluation never count as training. What clock the time is
taken from is the caller's choice: the wall's for a device, the process's for a shared CPU.
"""

import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from bytelm import data, recipes
from bytelm.arguments import parse_recipe
from bytelm.config import Recipe
from bytelm.config.base import require
from bytelm.metrics import Evaluation, bits_per_byte
from bytelm.run_data import open_windows
from bytelm.trainable import trainable
from bytelm_jax.models import Params, abstract_params, define_model
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import patch_calibration as patch_contract
from bytelm_jax.training import step as steps
from bytelm_jax.training.batches import training_batches
from bytelm_jax.training.evaluate import evaluate_batches, make_row_nats

_QUICK_WINDOWS = 64
"""Held-out windows, evenly spaced, behind each point of a curve."""


class Trained(NamedTuple):
    """What a run left.

    A point of `curve` is seconds, bytes, held-out and training bits per byte.
    """

    params: Params
    steps: int
    bytes: int
    seconds: float
    peak_gib: float
    evaluations: dict[str, Evaluation]
    curve: list[tuple[float, int, float, float]]


def read_row(row: str, options: str = "") -> Recipe:
    """The recipe that a row of the command line describes: its name and overrides."""
    name, *overrides = shlex.split(row)
    recipe = parse_recipe(recipes.get(name), [*shlex.split(options), *overrides], name, "")
    return patch_contract.adopt(recipe, Path(os.devnull))  # a run that does not exist


def machine() -> dict[str, Any]:
    """On what a row was measured, and when."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


class PacedState(NamedTuple):
    """The state of `paced`: the learning rate of the next step, and the optimizer's own."""

    rate: Array
    inner: Any


def paced(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose learning rate is 1, times a rate in its state, which its user sets."""

    def init(params: Any) -> PacedState:
        return PacedState(jnp.zeros(()), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any):
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        scaled = jax.tree.map(lambda u: u * state.rate.astype(u.dtype), updates)
        return scaled, PacedState(state.rate, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def rate_at(done: float, warmup: float, floor: float) -> float:
    """The factor of the learning rate where the share `done` of a run is over: linear, cosine."""
    if done < warmup:
        return done / warmup
    left = 0.5 * (1 + math.cos(math.pi * min((done - warmup) / (1 - warmup), 1.0)))
    return floor + (1 - floor) * left


class Trainer:
    """A recipe, compiled once for all its seeds, learning rates and lengths of runs.

    A run ends when its seconds, or its passes over the text, are over, whichever is first. The
    learning rate follows the share that is over: it rises over `warmup` of it and falls along a
    cosine to the recipe's `final_fraction`. Every set of `held_out` is evaluated at the end.
    """

    def __init__(
        self, recipe: Recipe, held_out: dict[str, data.Windows] | None = None, warmup: float = 0.05
    ) -> None:
        require(
            not recipe.optimizer.has_agent,
            f"optimizer={recipe.optimizer.name}: its agent needs the schedule of `bytelm train`",
        )
        self.recipe, self._warmup, run = recipe, warmup, recipe.train
        self.windows, validation, _ = open_windows(recipe)
        self._limit, self.held_out = (
            (run.eval_windows, validation) if held_out is None else (None, held_out)
        )
        self._mesh = meshes.make_mesh(1)
        bind, self._init = define_model(recipe.model)
        parts = trainable(recipe, abstract_params(recipe.model))
        dtype, pad_id = steps.compute_dtype(run), recipe.model.vocab.pad_id
        self._row_nats = make_row_nats(bind, pad_id, self._mesh, dtype)
        unit = replace(
            recipe.optimizer, learning_rate=1.0, schedule="constant", warmup_steps=0,
            decay_steps=0, final_fraction=type(recipe.optimizer).final_fraction,
        )  # fmt: skip
        self._optimizer = paced(build_optimizer(unit, run.steps, parts=parts))
        self._step = steps.make_train_step(bind, self._optimizer, run, pad_id, self._mesh, parts)
        self._compiled = False

    @property
    def steps_of_a_pass(self) -> int:
        """Steps that read the text once."""
        return max(1, len(self.windows) // self.recipe.train.batch_size)

    def train(
        self,
        seed: int,
        seconds: float,
        clock: Callable[[], float],
        points: int = 0,
        rate: float | None = None,
        most_steps: int = 0,
    ) -> Trained:
        """Trains from `seed` for so many seconds of `clock`; `points` are those of the curve.

        `rate` is the highest learning rate, by default the recipe's; `most_steps` end a run in
        place of a pass over the text. The curve's points are denser at its beginning.
        """
        self.compile(seed)
        peak_rate = self.recipe.optimizer.learning_rate if rate is None else rate
        most = most_steps or self.steps_of_a_pass
        run, curve, floor = _Run(self, seed, clock), [], self.recipe.optimizer.final_fraction

        def factor(used: float, count: int) -> float:
            done = max(used / seconds, count / most)
            return peak_rate * rate_at(done, self._warmup, floor)

        for i in range(1, max(points, 1) + 1):
            share = (i / max(points, 1)) ** 1.5
            run.advance(factor, share * seconds, max(1, round(share * most)))
            if points and run.losses:
                curve.append((run.used, run.bytes, *self._point(run)))
        memory = jax.local_devices()[0].memory_stats() or {}
        peak, params = memory.get("peak_bytes_in_use", 0) / 2**30, run.state.params
        sets = {name: self._look(params, each, self._limit) for name, each in self.held_out.items()}
        return Trained(params, run.count, run.bytes, run.used, peak, sets, curve)

    def compile(self, seed: int) -> None:
        """Compiles the step, if it is not yet, by one whose result is thrown away."""
        if not self._compiled:
            throwaway = _Run(self, seed, time.perf_counter)
            throwaway.step(0.0)
            jax.block_until_ready(throwaway.state)
            self._compiled = True

    def start(self, seed: int) -> steps.TrainState:
        """The state before the first step."""
        recipe = self.recipe
        state = steps.init_state(self._mesh, self._optimizer, lambda: self._init(seed))
        if recipe.train.entropy_from:
            trained = meshes.place(self._mesh, patch_contract.load_entropy_model(recipe))
            state = state._replace(params=state.params | trained)
        return state

    def batches(self, seed: int) -> Iterator[Any]:
        """Batches of ids on the device, in the order of `seed`."""
        rows = training_batches(self.windows, self.recipe.train.batch_size, seed, 0)
        return (meshes.put_batch(self._mesh, batch.ids) for batch in rows)

    def take_step(self, state: steps.TrainState, ids: Any, rate: float) -> tuple[Any, Any]:
        """The state after a step at this learning rate, and its report."""
        on_device = meshes.place(self._mesh, np.float32(rate))
        return self._step(state._replace(opt_state=state.opt_state._replace(rate=on_device)), ids)

    def _look(self, params: Params, windows: data.Windows, limit: int | None) -> Evaluation:
        batches = data.evaluation_batches(windows, self.recipe.train.batch_size, limit)
        return evaluate_batches(self._row_nats, params, batches, self._mesh)

    def _point(self, run: "_Run") -> tuple[float, float]:
        """Bits per byte of the first held-out set, and of training since the last point."""
        nats = statistics.fmean(jax.device_get(run.losses))
        run.losses.clear()
        first = next(iter(self.held_out.values()))
        looked = self._look(run.state.params, first, _QUICK_WINDOWS)
        return looked.bits_per_byte, bits_per_byte(nats, 1)


class _Run:
    """A run under way: its state, its steps, the seconds used and the losses since last cleared."""

    def __init__(self, trainer: Trainer, seed: int, clock: Callable[[], float]) -> None:
        self.state, self._batches = trainer.start(seed), trainer.batches(seed)
        self._trainer, self._clock = trainer, clock
        self.count, self.used = 0, 0.0
        self.losses: list[Any] = []
        self._in_flight = 0 if jax.default_backend() == "cpu" else 4

    @property
    def bytes(self) -> int:
        """Bytes read so far, pads included."""
        recipe = self._trainer.recipe
        return self.count * recipe.train.batch_size * recipe.data.sequence_length

    def advance(self, factor: Callable[[float, int], float], until: float, most: int) -> None:
        """Steps until `until` seconds are used, or there are `most` steps in all."""
        begin = self._clock() - self.used
        while self._clock() - begin < until and self.count < most:
            self.step(factor(self._clock() - begin, self.count + 1))
            if len(self.losses) > self._in_flight:
                jax.block_until_ready(self.losses[-1 - self._in_flight])
        jax.block_until_ready(self.state)
        self.used = self._clock() - begin

    def step(self, rate: float) -> None:
        """One step."""
        self.state, report = self._trainer.take_step(self.state, next(self._batches), rate)
        self.losses.append(report["loss"])
        self.count += 1


def side_by_side(calls: list[list[str]], gpus: int) -> Iterator[dict[str, Any]]:
    """Runs Python with each of `calls` in a process of its own, one a GPU, `gpus` at a time.

    Yields the JSON object that each prints last, as they end, and {"failed": call} for one that
    ends badly. What they write to stderr passes through.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(i) for i in range(gpus)]
    free: SimpleQueue[str] = SimpleQueue()
    for name in names[:gpus]:
        free.put(name)

    def run(call: list[str]) -> dict[str, Any]:
        name = free.get()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": name}
        done = subprocess.run([sys.executable, *call], env=environment, stdout=subprocess.PIPE)
        free.put(name)
        lines = done.stdout.decode().splitlines()
        return {"failed": shlex.join(call)} if done.returncode else json.loads(lines[-1])

    with ThreadPoolExecutor(gpus) as pool:
        for ended in as_completed([pool.submit(run, call) for call in calls]):
            yield ended.result()
