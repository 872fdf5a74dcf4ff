"""Early stopping: a run ends once its validation has stopped improving."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bytelm.config import Recipe, require
from bytelm.metrics import METRIC, score


def require_validation(recipe: Recipe, validated: bool) -> None:
    """Raises `ValueError` for a patience of a run that is not validated before its end."""
    run, given = recipe.train, f"train.patience={recipe.train.patience}"
    if run.patience:
        require(validated, f"{given}: nothing is held out; give --valid, or leave it out")
        require(run.eval_every > 0, f"{given}: counts evaluations; set train.eval_every above 0")


class Patience:
    """Counts evaluations in a row without a lower score, the first ones from a run's records."""

    def __init__(
        self,
        limit: int,
        records: Iterable[Mapping[str, Any]],
        agree: Callable[[bool], bool],
        say: Callable[[str], None],
    ):
        """`limit` is how many of them end the run; 0 means never.

        `agree` gives what the first process, which alone has `records`, says, and `say` shows a
        line to people.
        """
        self._limit, self._best, self._since, self._misses = limit, math.inf, 0, 0
        self._agree, self._say = agree, say
        for record in records:
            if METRIC in record:
                self._count(record["step"], record)
        self.over = False
        """Whether the run ends."""
        self._decide()

    def look(self, step: int, record: Mapping[str, Any]) -> None:
        """Takes the record of an evaluation, in all processes alike."""
        self._count(step, record)
        self._decide()

    def _count(self, step: int, record: Mapping[str, Any]) -> None:
        bits = score(record)
        if bits is not None and bits < self._best:
            self._best, self._since, self._misses = bits, step, 0
        else:
            self._misses += 1

    def _decide(self) -> None:
        if not self._limit:
            return
        self.over = self._agree(self._misses >= self._limit)
        if self.over:
            best = f"{self._best:.4f} bits per byte at step {self._since}"
            self._say(f"stopped early: {self._misses} evaluations in a row not below {best}")
