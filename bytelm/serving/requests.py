"""The requests of the API: JSON that strangers send, checked field by field before any of it runs.

Fields have OpenAI's names and meanings; `max_tokens` counts bytes, and ids are the model's own.
"""

import json
import math
import secrets
from dataclasses import dataclass
from typing import Any

import numpy as np

from bytelm.config import ByteVocab, ModelConfig
from bytelm.generation.stops import StopScanner
from bytelm.sampling import SamplerConfig
from bytelm.serving.engine import TOP, Settings, bytes_to_complete
from bytelm.serving.errors import ApiError
from bytelm.tokenizer import ByteTokenizer

MOST_TEXTS = 128
"""Of one request: its prompts times its `n`."""

_LONGEST_PROMPTS = 16
"""How many prompts of the greatest length fit into a body."""

_DEFAULT_BYTES = 16  # as OpenAI's `max_tokens`
_NOTHING = {
    "suffix": (None, ""), "best_of": (None, 1), "logit_bias": (None, {}),
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0),
}  # fmt: skip
"""Fields that other servers have and that may here only say what happens anyway."""

_KNOWN = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stream",
    "stream_options", "logprobs", "echo", "stop", "seed", "user", "valid_utf8", "ignore_eos",
    *_NOTHING,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may ask for; `capacity` are the bytes of the longest text with its prompt.

    No prompt and no continuation may be longer than that, whatever is given.
    """

    prompt_bytes: int
    new_bytes: int
    capacity: int

    def __post_init__(self) -> None:
        for name in ("prompt_bytes", "new_bytes"):
            object.__setattr__(self, name, min(getattr(self, name), self.capacity))

    @property
    def body_bytes(self) -> int:
        """Of the longest body: a byte takes six characters as a JSON escape."""
        return _LONGEST_PROMPTS * 8 * self.prompt_bytes + 2**16


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request that can be served as it is."""

    prompts: tuple[bytes, ...]
    settings: Settings
    """Of sample 0 of each prompt."""
    n: int
    stop: tuple[bytes, ...]
    logprobs: int | None
    """How many of the most likely bytes are reported with each; None for no probabilities."""
    echo: bool
    stream: bool
    include_usage: bool


def parse_request(body: bytes, name: str, config: ModelConfig, limits: Limits) -> CompletionRequest:
    """The request in a body, to the model called `name`; raises `ApiError`."""
    fields = _Fields(_json(body))
    fields.get("user", str, "")  # nothing depends on it
    model = fields.get("model", str, name)
    if model != name:
        raise ApiError(404, f"model: {_shown(model)} is not here; this is {name}", "model")
    prompts = _prompts(fields.raw("prompt"), config.vocab, limits.prompt_bytes)
    n = fields.whole("n", 1, 1, MOST_TEXTS)
    if n * len(prompts) > MOST_TEXTS:
        raise ApiError(400, f"n: {len(prompts)} prompts and n={n}; at most {MOST_TEXTS} texts", "n")
    count = fields.whole("max_tokens", min(_DEFAULT_BYTES, limits.new_bytes), 0, limits.new_bytes)
    valid = fields.get("valid_utf8", bool, True)
    for prompt in prompts:
        _check_length(prompt, count, valid, limits)
    logprobs = fields.optional("logprobs", 0, TOP)
    options = fields.get("stream_options", dict, {})
    usage = options.get("include_usage", False)
    if set(options) - {"include_usage"} or not isinstance(usage, bool):
        raise ApiError(400, "stream_options: holds include_usage, true or false", "stream_options")
    stream = fields.get("stream", bool, False)
    if options and not stream:
        raise ApiError(400, "stream_options: is for stream=true alone", "stream_options")
    settings = Settings(
        max_new_bytes=count,
        sampler=fields.sampler(),
        seed=fields.seed(),
        stop_at_eos=not fields.get("ignore_eos", bool, False),
        valid_utf8=valid,
        scores=logprobs is not None,
    )
    return CompletionRequest(
        prompts=prompts,
        settings=settings,
        n=n,
        stop=_stop(fields.raw("stop")),
        logprobs=logprobs,
        echo=fields.get("echo", bool, False),
        stream=stream,
        include_usage=usage,
    )


def _json(body: bytes) -> dict[str, Any]:
    def no_number(name: str) -> float:
        raise ApiError(400, f"body: {name} is not a number of JSON")

    try:
        found = json.loads(body, parse_constant=no_number)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ApiError(400, "body: is not JSON in UTF-8") from None
    except RecursionError:
        raise ApiError(400, "body: is nested too deeply") from None
    except ValueError:  # Python's bound on the digits of an integer
        raise ApiError(400, "body: a number has too many digits") from None
    if not isinstance(found, dict):
        raise ApiError(400, "body: must be a JSON object")
    unknown = sorted(set(found) - _KNOWN)
    if unknown:
        first = _shown(unknown[0])
        raise ApiError(400, f"{first}: is no field of a completion here", first[1:-1])
    for field, allowed in _NOTHING.items():
        value = found.get(field)
        if isinstance(value, bool) or value not in allowed:  # false equals 0
            raise ApiError(400, f"{field}: is not supported; leave it out", field)
    return found


def _shown(text: str) -> str:
    """A client's text in a message: short, in one line, without control characters."""
    return ascii(text if len(text) <= 60 else f"{text[:60]}…")


class _Fields:
    """Reads fields of a JSON object, of which null is as good as absent."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def raw(self, field: str) -> Any:
        return self._found.get(field)

    def get(self, field: str, kind: type, default: Any) -> Any:
        value = self._found.get(field)
        if value is None:
            return default
        if type(value) is not kind:
            named = {str: "a string", bool: "true or false", dict: "an object"}[kind]
            raise ApiError(400, f"{field}: must be {named}", field)
        return value

    def whole(self, field: str, default: int, least: int, most: int) -> int:
        value = self._found.get(field)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            raise ApiError(400, f"{field}: must be a whole number from {least} to {most}", field)
        return value

    def optional(self, field: str, least: int, most: int) -> int | None:
        return None if self.raw(field) is None else self.whole(field, 0, least, most)

    def number(self, field: str, default: float) -> float:
        value = self._found.get(field)
        if value is None:
            return default
        if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
            raise ApiError(400, f"{field}: must be a number", field)
        return float(value)

    def sampler(self) -> SamplerConfig:
        try:
            return SamplerConfig(
                temperature=self.number("temperature", 1.0),
                top_p=self.number("top_p", 1.0),
                top_k=self.whole("top_k", 0, 0, 2**31 - 1),
            )
        except ValueError as error:
            raise ApiError(400, str(error), str(error).partition("=")[0]) from None

    def seed(self) -> int:
        value = self.optional("seed", 0, 2**32 - 1)
        return secrets.randbelow(2**32) if value is None else value


def _prompts(value: Any, vocab: ByteVocab, most_bytes: int) -> tuple[bytes, ...]:
    """A text, a list of ids, or a list of either."""
    several = isinstance(value, list) and (not value or not _is_id(value[0]))
    found = value if several else [value]
    if several and not 1 <= len(found) <= MOST_TEXTS:
        raise ApiError(400, f"prompt: must have from 1 to {MOST_TEXTS} entries", "prompt")
    return tuple(_prompt(each, vocab, most_bytes) for each in found)


def _is_id(value: Any) -> bool:
    return type(value) is int


def _prompt(value: Any, vocab: ByteVocab, most_bytes: int) -> bytes:
    if value is not None and not isinstance(value, str | list):
        raise ApiError(400, "prompt: must be a string, a list of ids, or a list of these", "prompt")
    size = len(value or "")
    if size <= most_bytes:  # a character has at least a byte
        data = _bytes_of(value, vocab) if isinstance(value, list) else _text(value or "")
        size = len(data)
        if size <= most_bytes:
            return data
    raise ApiError(
        400, f"prompt: {size} bytes; at most {most_bytes}", "prompt", "context_length_exceeded"
    )


def _text(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, "prompt: holds half a surrogate pair, which is no text", "prompt"
        ) from None


def _bytes_of(ids: list[Any], vocab: ByteVocab) -> bytes:
    first, last = vocab.offset, vocab.offset + 255
    if not all(_is_id(each) and first <= each <= last for each in ids):
        raise ApiError(400, f"prompt: ids must be whole numbers from {first} to {last}", "prompt")
    return ByteTokenizer(vocab).to_bytes(np.array(ids, np.int64))


def _check_length(prompt: bytes, count: int, valid: bool, limits: Limits) -> None:
    if len(prompt) + count > limits.capacity:
        raise ApiError(
            400,
            f"prompt: {len(prompt)} bytes and max_tokens={count} make {len(prompt) + count}; this "
            f"model takes at most {limits.capacity}",
            "max_tokens",
            "context_length_exceeded",
        )
    least = bytes_to_complete(prompt) if valid and count else 0
    if least > count:
        raise ApiError(
            400,
            f"max_tokens: the prompt ends inside a character that needs {least} more bytes; give "
            "at least as many, or valid_utf8=false",
            "max_tokens",
        )


def _stop(value: Any) -> tuple[bytes, ...]:
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in texts):
        raise ApiError(400, "stop: must be a string or a list of strings", "stop")
    try:
        stops = tuple(each.encode() for each in texts)
        StopScanner(stops)
    except ValueError as error:
        message = "stop: is no text" if isinstance(error, UnicodeError) else str(error)
        raise ApiError(400, message, "stop") from None
    return stops
