"""Learning rates by step: warm-up, then one of four schedules.

The formulas stand here in Python and, for compiled steps, in `bytelm_jax/optimizers/build.py`.
"""

import math
from collections.abc import Callable
from pathlib import Path

from bytelm.config import OptimizerConfig, Recipe
from bytelm.runs import saved_recipe

_VISIBLE = 1.05
"""A rate that changes by less than this factor between two steps is no jump."""


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Callable[[int], float]:
    """Step number, from 0, → learning rate: linear warm-up, then `config.schedule` to `steps`.

    The first step has learning_rate / warmup_steps and the last step of the warm-up the full rate;
    from step `steps` on the rate stays where it is.
    """
    warmup, floor = config.warmup_steps, config.final_fraction
    begin = config.decay_start(steps)

    def schedule(count: int) -> float:
        if count < warmup:
            return config.learning_rate * ((count + 1) / warmup)
        if begin is None:
            return config.learning_rate
        done = min(max((count - begin) / max(steps - begin, 1), 0.0), 1.0)
        left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
        return config.learning_rate * (floor + (1 - floor) * left)

    return schedule


def too_long(recipe: Recipe) -> list[str]:
    """A line where a decay that was asked for does not fit into a run behind its warm-up."""
    optimizer, steps = recipe.optimizer, recipe.train.steps
    decay = optimizer.decay_steps if optimizer.schedule == "wsd" else 0
    if not decay or optimizer.warmup_steps + decay <= steps:
        return []
    both = f"warm-up ({optimizer.warmup_steps} steps) and decay ({decay})"
    return [f"warning: {both} are longer than the run ({steps}), so the decay is cut short"]


def jumps(run_dir: Path, recipe: Recipe, start: int) -> list[str]:
    """A line about the learning rate if it jumps where a run goes on with other steps than before.

    `run_dir` holds the run as it was, saved at step `start`, from which `recipe` goes on.
    """
    saved = saved_recipe(run_dir) if 0 < start < recipe.train.steps else None
    if saved is None:
        return []
    following = learning_rate_schedule(recipe.optimizer, recipe.train.steps)(start)
    usual = learning_rate_schedule(saved.optimizer, saved.train.steps)(start)
    if following == usual or max(following, usual) < _VISIBLE * min(following, usual):
        return []
    line = f"warning: the learning rate jumps at step {start}, from {usual:.3g} under "
    line += f"{saved.train.steps} steps to {following:.3g} under {recipe.train.steps}"
    hint = "" if recipe.optimizer.schedule == "wsd" else "; under --schedule wsd it stays"
    return [line + hint]
