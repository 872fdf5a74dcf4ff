"""Recipes trained for the same time and then evaluated: what several benchmarks here share.

No command of its own. Compilation and evaluation never count as training. What clock the time is
taken from is the caller's choice: the wall's for a device, the process's for a shared CPU.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import flax
import jax

from bytelm import data, recipes
from bytelm.arguments import parse_recipe
from bytelm.config import Recipe
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

_PROBE = 0.02
"""The share of the time after which the speed is known, and so the number of steps."""

_QUICK_WINDOWS = 64
"""Held-out windows, evenly spaced, behind each point of a curve."""


class Trained(NamedTuple):
    """What a run left; a point of `curve` is seconds, held-out and training bits per byte."""

    params: Params
    steps: int
    seconds: float
    peak_gib: float
    evaluation: Evaluation
    curve: list[tuple[float, float, float]]


def add_options(parser: argparse.ArgumentParser, seconds: float) -> None:
    """On what is trained and evaluated, for how long, on how many GPUs."""
    parser.add_argument("--train", default="english_train.txt", help="text to train on")
    parser.add_argument("--valid", default="english_valid.txt", help="text to evaluate on")
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--gpus", type=int, default=1)


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


class Trainer:
    """A recipe, compiled for as many runs as are asked for.

    It is evaluated on all of `held_out`, or on what the recipe itself holds out.
    """

    def __init__(self, recipe: Recipe, held_out: data.Windows | None = None) -> None:
        self.recipe, run, vocab = recipe, recipe.train, recipe.model.vocab
        self.windows, validation, _ = open_windows(recipe)
        self._limit, self.held_out = (
            (run.eval_windows, validation[""]) if held_out is None else (None, held_out)
        )
        self._mesh = meshes.make_mesh(1)
        self._bind, self._init = define_model(recipe.model)
        self._parts = trainable(recipe, abstract_params(recipe.model))
        dtype = steps.compute_dtype(run)
        self._row_nats = make_row_nats(self._bind, vocab.pad_id, self._mesh, dtype)
        self._programs: dict[int, Callable] = {}

    def train(
        self, seed: int, seconds: float, clock: Callable[[], float], points: int = 0
    ) -> Trained:
        """Trains from `seed` for so many seconds of `clock`; `points` are those of the curve.

        The learning rate ends its descent when the time is over: the steps are counted from the
        speed of the first ones, which belong to the warm-up and so are the same whatever that
        number. The curve's points are denser at its beginning.
        """
        optimizer, curve = self.recipe.optimizer, []
        run = _Run(self._start(seed), self._batches(seed), clock)
        step = self._program(self.recipe.train.steps)
        run.compiles(step)
        if optimizer.final_fraction < 1:
            run.advance(step, _PROBE * seconds, max(2, optimizer.warmup_steps))
            whole = run.count + 1 + round((seconds - run.used) * (run.count - 1) / run.used)
            step = self._program(whole)
            run.compiles(step)
        for i in range(1, max(points, 1) + 1):
            until = seconds * (i / max(points, 1)) ** 1.5
            if until > run.used:
                run.advance(step, until)
                if points:
                    curve.append((run.used, *self._point(run)))
        if points and run.losses:  # a slow machine's first steps took all the time
            curve.append((run.used, *self._point(run)))
        memory = jax.local_devices()[0].memory_stats() or {}
        peak = memory.get("peak_bytes_in_use", 0) / 2**30
        params = run.state.params
        return Trained(params, run.count, run.used, peak, self._look(params, self._limit), curve)

    def _start(self, seed: int) -> steps.TrainState:
        recipe = self.recipe
        optimizer = build_optimizer(recipe.optimizer, recipe.train.steps, parts=self._parts)
        state = steps.init_state(self._mesh, optimizer, lambda: self._init(seed))
        if recipe.train.entropy_from:
            trained = meshes.place(self._mesh, patch_contract.load_entropy_model(recipe))
            state = state._replace(params=state.params | trained)
        return state

    def _batches(self, seed: int) -> Iterator[Any]:
        rows = training_batches(self.windows, self.recipe.train.batch_size, seed, 0)
        return (meshes.put_batch(self._mesh, batch.ids) for batch in rows)

    def _program(self, count: int) -> Callable:
        if count not in self._programs:
            recipe = self.recipe
            optimizer = build_optimizer(recipe.optimizer, count, parts=self._parts)
            pad_id = recipe.model.vocab.pad_id
            self._programs[count] = steps.make_train_step(
                self._bind, optimizer, recipe.train, pad_id, self._mesh, self._parts
            )
        return self._programs[count]

    def _look(self, params: Params, limit: int | None) -> Evaluation:
        batches = data.evaluation_batches(self.held_out, self.recipe.train.batch_size, limit)
        return evaluate_batches(self._row_nats, params, batches, self._mesh)

    def _point(self, run: "_Run") -> tuple[float, float]:
        """Held-out and training bits per byte, the latter since the last point."""
        nats = statistics.fmean(jax.device_get(run.losses))
        run.losses.clear()
        return self._look(run.state.params, _QUICK_WINDOWS).bits_per_byte, bits_per_byte(nats, 1)


class _Run:
    """A run under way: its state, its steps, the seconds used and the losses since last cleared."""

    def __init__(self, state: Any, batches: Iterator[Any], clock: Callable[[], float]) -> None:
        self.state, self._batches, self._clock = state, batches, clock
        self.count, self.used = 0, 0.0
        self.losses: list[Any] = []
        self._in_flight = 0 if jax.default_backend() == "cpu" else 4

    def compiles(self, step: Callable) -> None:
        """The first step of a program: it counts as a step, but not as time."""
        self._one(step)
        jax.block_until_ready(self.state)

    def advance(self, step: Callable, until: float, most: int = sys.maxsize) -> None:
        """Steps until `until` seconds are used, or there are `most` steps in all."""
        begin = self._clock() - self.used
        while self._clock() - begin < until and self.count < most:
            self._one(step)
            if len(self.losses) > self._in_flight:
                jax.block_until_ready(self.losses[-1 - self._in_flight])
        jax.block_until_ready(self.state)
        self.used = self._clock() - begin

    def _one(self, step: Callable) -> None:
        self.state, report = step(self.state, next(self._batches))
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
