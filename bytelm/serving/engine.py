"""What the API needs of a framework: a batch with places that texts join and leave."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, Int32

from bytelm.config import ByteVocab
from bytelm.generation.automaton import Automaton, free, least_bytes, start_state, valid_utf8
from bytelm.sampling import SamplerConfig
from bytelm.writing import written_bytes

TOP = 5
"""How many of the most likely bytes are reported with each byte, at most."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one text is written. It depends on these and on its prompt alone.

    Its random numbers are those of row `sample` of `generate(…, seed=seed)`.
    """

    max_new_bytes: int
    sampler: SamplerConfig
    seed: int
    sample: int = 0
    stop_at_eos: bool = True
    valid_utf8: bool = True
    scores: bool = False
    """Whether the probabilities of its bytes are wanted."""


class Scores(NamedTuple):
    """Natural logarithms of probabilities under the model, whatever the sampler made of them."""

    log_probs: Float32[np.ndarray, " T"]
    """Of the bytes of the text."""
    top: Int32[np.ndarray, "T 5"]
    """The most likely bytes in the place of each, 256 for the end of the text."""
    top_log_probs: Float32[np.ndarray, "T 5"]

    def cut(self, start: int, end: int | None = None) -> "Scores":
        """Those of some of the bytes."""
        return Scores(*(part[start:end] for part in self))

    def joined(self, others: Sequence["Scores"]) -> "Scores":
        """Those of this text and of others behind it."""
        return Scores(*(np.concatenate(parts) for parts in zip(self, *others, strict=True)))


class Written(NamedTuple):
    """What one advance has added to one text."""

    slot: int
    data: bytes
    scores: Scores | None
    end: Literal["eos", "length"] | None
    """Why the text has ended; None if it goes on."""
    error: str | None = None
    """The text cannot go on, and why."""


def written_by(
    slot: int, ids: np.ndarray, done: bool, scores: Scores | None, vocab: ByteVocab
) -> Written:
    """What the new ids of a row say, of which each has a score if there are any."""
    try:
        data = written_bytes(ids, vocab)
    except ValueError as error:
        return Written(slot, b"", None, None, str(error))
    end: Literal["eos", "length"] | None = None
    if done:
        end = "eos" if len(data) < len(ids) else "length"
    return Written(slot, data, None if scores is None else scores.cut(0, len(data)), end)


def nothing() -> None:
    """What there is to do meanwhile, by default."""


class Engine(Protocol):
    """A batch of a fixed number of slots, used by one thread; `score` by another one."""

    @property
    def config(self) -> Any:
        """The model's configuration."""
        ...

    @property
    def slots(self) -> int:
        """Texts that are written at once."""
        ...

    @property
    def capacity(self) -> int:
        """Bytes of the longest text, with its prompt."""
        ...

    @property
    def most_rounds(self) -> int:
        """The most rounds of one advance."""
        ...

    @property
    def device_bytes(self) -> int:
        """Memory that is in use on the device."""
        ...

    def warm_up(self) -> None:
        """Compiles what `join` and `advance` need, so that no request waits for it."""
        ...

    def join(self, texts: Sequence[tuple[int, bytes, Settings]]) -> None:
        """Puts texts with these prompts into free slots, where their prompts are to be read."""
        ...

    def read(self, writing: bool) -> bool:
        """Reads prompts or parts of them in one pass; whether more is to be read.

        With `writing` the pass is short, since texts that are being written wait for it.
        """
        ...

    def leave(self, slot: int) -> None:
        """Frees the slot of a text that has not ended, before the next advance."""
        ...

    def advance(
        self, rounds: int, meanwhile: Callable[[], None] = nothing
    ) -> tuple[list[Written], int]:
        """Writes up to that many rounds of every text, and says how many it were.

        A text whose prompt is not read yet waits, and one that ends frees its slot. `meanwhile` is
        called while the device works.
        """
        ...

    def score(self, text: bytes) -> Scores:
        """The probabilities of all bytes of a text."""
        ...


def bytes_to_complete(prompt: bytes) -> int:
    """Bytes that the character needs in which a prompt ends; 0 between characters."""
    automaton = valid_utf8()
    return least_bytes(automaton, start_state(automaton, prompt))


@functools.lru_cache(maxsize=1)
def both_constraints() -> Automaton:
    """The automata of `free` and `valid_utf8` as one, so that each text has one of its own."""
    unconstrained, constrained = free(), valid_utf8()
    states = np.int32(len(unconstrained.step))
    allowed = np.concatenate([unconstrained.allowed, constrained.allowed], axis=1)
    return Automaton(allowed, np.concatenate([unconstrained.step, constrained.step + states]))


def state_after(prompt: bytes, is_valid_utf8: bool) -> int:
    """The state of `both_constraints` after a prompt."""
    if not is_valid_utf8:
        return 0
    return len(free().step) + start_state(valid_utf8(), prompt)
