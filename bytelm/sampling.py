"""How the next byte is chosen: the generation settings, the same in both frameworks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from bytelm.config import ByteVocab, ModelConfig, require, require_number
from bytelm.config.base import LARGEST_INTEGER
from bytelm.generation.automaton import Automaton, free, least_bytes, start_state, valid_utf8
from bytelm.generation.stops import StopScanner


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How the next byte is chosen.

    - `greedy`: the most likely byte; the other fields are ignored.
    - `categorical`: sampled from softmax(logits / temperature), restricted to the `top_k` most
      likely bytes (0: all), then to the fewest most likely of these whose probabilities sum to at
      least the fraction `top_p` of theirs (1: all).
    - `entropy`: by the entropy H, in bits, of the model's own distribution (temperature 1): for H <
      `entropy_low` the most likely byte, for H < `entropy_medium` one of the ten most likely,
      otherwise any byte; above `entropy_high` at 0.8 times the temperature. `top_k` and `top_p`
      restrict it further.

    Equal logits rank by id. `temperature=0` is greedy. An invalid field raises `ValueError`.
    """

    sampler: Literal["greedy", "categorical", "entropy"] = "categorical"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    entropy_low: float = 0.3
    entropy_medium: float = 1.2
    entropy_high: float = 2.5

    def __post_init__(self) -> None:
        known = ("greedy", "categorical", "entropy")
        require(self.sampler in known, f"sampler={self.sampler!r}: choose {', '.join(known)}")
        for field in fields(self):
            value = getattr(self, field.name)
            require_number(field.name, float(value) if isinstance(value, int) else value)
        heat = self.temperature
        require(
            heat == 0 or heat >= 1e-6,
            f"temperature={heat}: give 0 for greedy or a number from 1e-6 up",
        )
        require(self.top_k >= 0, f"top_k={self.top_k}: give 0 for all bytes or at least 1")
        require(0 < self.top_p <= 1, f"top_p={self.top_p}: must be above 0 and at most 1")
        thresholds = (self.entropy_low, self.entropy_medium, self.entropy_high)
        require(
            0 <= thresholds[0] <= thresholds[1] <= thresholds[2],
            f"entropy_low, entropy_medium, entropy_high={thresholds}: must be increasing, from "
            "at least 0",
        )


LEAST_TOP_P = 1e-30
"""A smaller `top_p` means the same, the most likely byte alone, but could be 0 in float32."""

LONG_SEQUENCE = 1 << 20
"""Bytes from which on a sequence is checked for fitting into memory before it is generated."""


def check_request(
    config: ModelConfig,
    prompts: Sequence[bytes],
    max_new_bytes: int,
    seed: int,
    valid_utf8_only: bool,
    stop: Sequence[bytes],
    capacity: Callable[[int], int],
) -> Automaton:
    """The constraint of a request's bytes.

    Raises `ValueError` for what generation cannot do, before anything is built. `capacity` gives
    the positions for which the caches of so many rows fit into memory.
    """
    rows = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
    rows = rows and all(isinstance(prompt, bytes) for prompt in prompts)
    require(rows, "prompts: give a list of bytes, such as [b'text']")
    whole = isinstance(max_new_bytes, int)
    require(whole and max_new_bytes >= 0, f"max_new_bytes={max_new_bytes}: give a number from 0 up")
    require_number("seed", seed)
    require(config.causal, "causal=False: generation needs a causal model")
    longest = max(map(len, prompts), default=0)
    limit = config.longest_input
    if limit is not None and longest + max_new_bytes > limit:
        raise ValueError(
            f"prompts: {longest} bytes and max_new_bytes={max_new_bytes} make "
            f"{longest + max_new_bytes}, but this model has max_length={limit} positions; "
            'shorten them, or train with a larger max_length or variant="in_action"'
        )
    if longest + max_new_bytes > LONG_SEQUENCE:
        most = max(0, min(capacity(len(prompts)), LARGEST_INTEGER) - longest)
        require(
            max_new_bytes <= most,
            f"max_new_bytes={max_new_bytes}: the model's cache for so many does not fit into "
            f"memory; give at most {most}",
        )
    StopScanner(stop)
    automaton = valid_utf8() if valid_utf8_only else free()
    for prompt in prompts if max_new_bytes else ():
        least = least_bytes(automaton, start_state(automaton, prompt))
        require(
            least <= max_new_bytes,
            f"max_new_bytes={max_new_bytes}: the prompt ends inside a character that needs {least} "
            "more bytes; give at least as many, or leave valid_utf8 off",
        )
    return automaton


def require_sampled(ids: Sequence[int], vocab: ByteVocab) -> None:
    """Raises `ValueError` if one of the ids of new bytes says that its logits were not finite."""
    if vocab.pad_id in ids:
        raise ValueError(
            "the model's logits are not finite, so nothing can be sampled from them: its training "
            "diverged, or its weights are damaged; take an earlier checkpoint"
        )
