"""Prompts whose bytes are scored: one after another, in a thread of their own."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bytelm.serving.engine import Engine, Scores
from bytelm.serving.errors import ApiError
from bytelm.serving.scheduler import STOPPING, Failed, QueueFull


class Scorer:
    """Scores prompts; `waiting` of them, at most the slots and `queue`, wait or are at work.

    All of it but `score` runs in the server's event loop.
    """

    def __init__(self, engine: Engine, queue: int) -> None:
        self._engine, self._queue = engine, queue
        self._threads = ThreadPoolExecutor(1, "bytelm scorer")
        self._closed = False
        self.waiting = 0

    def add(self, prompts: Sequence[bytes]) -> "Scoring":
        """Places for prompts, all of them or, by `QueueFull`, none."""
        if self.waiting + len(prompts) > self._engine.slots + self._queue:
            raise QueueFull
        self.waiting += len(prompts)
        return Scoring(self, prompts)

    def close(self) -> None:
        """Ends the thread after the prompt that it is at; the others are answered by `Failed`."""
        self._closed = True
        self._threads.shutdown(wait=True)

    async def score(self, prompt: bytes) -> Scores:
        """The probabilities of all bytes of a prompt, unless the task is cancelled before.

        Raises `ApiError` if the model's logits are not finite.
        """

        def run() -> Scores:
            if self._closed:
                raise Failed(STOPPING)
            scores = self._engine.score(prompt)
            if np.isnan(scores.log_probs).any():
                raise ApiError(500, "the model's logits are not finite")
            return scores

        if self._closed:
            raise Failed(STOPPING)
        return await asyncio.get_running_loop().run_in_executor(self._threads, run)


class Scoring:
    """The prompts of one request, which give their places back one by one, or by `leave`."""

    def __init__(self, scorer: Scorer, prompts: Sequence[bytes]) -> None:
        self._scorer, self._prompts, self._left = scorer, prompts, len(prompts)

    async def scores(self) -> list[Scores | None]:
        """Of every prompt; None for an empty one."""
        found: list[Scores | None] = []
        for prompt in self._prompts:
            found.append(await self._scorer.score(prompt) if prompt else None)
            self._free(1)
        return found

    def leave(self) -> None:
        """Gives up what is not scored yet."""
        self._free(self._left)

    def _free(self, count: int) -> None:
        count = min(count, self._left)
        self._left -= count
        self._scorer.waiting -= count
