"""The answers of the API in OpenAI's shapes: texts in whole characters, bytes as tokens."""

import codecs
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bytelm.generation.automaton import END
from bytelm.serving.engine import Scores
from bytelm.serving.requests import CompletionRequest
from bytelm.serving.scheduler import Piece

END_TOKEN = "<|endoftext|>"
"""The name of the end of the text among the most likely tokens."""

_LEAST = -9999.0
"""What stands for a logarithm of −∞, which JSON does not have."""


def token(byte: int) -> str:
    r"""The name of a byte: an ASCII character, or `bytes:\xNN`; 256 is the end of the text."""
    if byte == END:
        return END_TOKEN
    return chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"


class Choice:
    """One text of an answer as it grows. What `add` gives never ends inside a character."""

    def __init__(self, index: int, logprobs: int | None) -> None:
        self.index, self._top = index, logprobs
        self.bytes_written = 0
        self.finish_reason: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0
        self._held: list[_Token] = []

    def start(self, prompt: bytes, scores: Scores | None, end: str | None = None) -> dict[str, Any]:
        """The prompt, for `echo`; `end` is why nothing comes after it."""
        self.finish_reason = end
        return self._new(prompt, scores, final=end is not None)

    def add(self, piece: Piece) -> dict[str, Any]:
        """What is new: an entry of `choices`."""
        self.bytes_written += len(piece.data)
        self.finish_reason = piece.end
        return self._new(piece.data, piece.scores, final=piece.end is not None)

    def _new(self, data: bytes, scores: Scores | None, final: bool) -> dict[str, Any]:
        logprobs = None
        if self._top is None:
            text = self._decoder.decode(data, final)
            self._characters += len(text)
        else:
            text, tokens = self._decode_each(data, scores, final)
            logprobs = _logprobs(tokens, self._top)
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }

    def _decode_each(
        self, data: bytes, scores: Scores | None, final: bool
    ) -> "tuple[str, list[_Token]]":
        """The text, and the bytes whose characters are in it."""
        parts = []
        for at, byte in enumerate(data):
            new = self._decoder.decode(data[at : at + 1])
            unfinished = bool(self._decoder.getstate()[0])
            self._characters += len(new)
            offset = self._characters - (0 if unfinished else 1)
            parts.append(new)
            if new:  # all bytes before the last character are in the text
                for each in self._held:
                    each.shown = True
            self._held.append(_Token.of(byte, scores, at, offset, not unfinished))
        if final:
            parts.append(self._decoder.decode(b"", True))
            for each in self._held:
                each.shown = True
        shown = [each for each in self._held if each.shown]
        self._held = [each for each in self._held if not each.shown]
        return "".join(parts), shown


@dataclass
class _Token:
    """A byte, the offset of its character in the text, and the probabilities of its place."""

    byte: int
    offset: int
    shown: bool
    log_prob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, byte: int, scores: Scores | None, at: int, offset: int, shown: bool) -> "_Token":
        if scores is None:
            return cls(byte, offset, shown, None)
        top = zip(scores.top[at].tolist(), scores.top_log_probs[at].tolist(), strict=True)
        return cls(byte, offset, shown, float(scores.log_probs[at]), list(top))


def _logprobs(tokens: list[_Token], count: int) -> dict[str, Any]:
    tops: list[dict[str, float] | None] = []
    for each in tokens:
        if each.log_prob is None:
            tops.append(None)
            continue
        top = {token(byte): _finite(value) for byte, value in each.top[:count]}
        tops.append(top | {token(each.byte): _finite(each.log_prob)})
    return {
        "tokens": [token(each.byte) for each in tokens],
        "token_logprobs": [
            None if each.log_prob is None else _finite(each.log_prob) for each in tokens
        ],
        "top_logprobs": tops if count else None,
        "text_offset": [each.offset for each in tokens],
    }


def _finite(value: float) -> float:
    return value if np.isfinite(value) else _LEAST


class Usage(NamedTuple):
    """Bytes of the prompts, each counted once, and of all that was written."""

    prompt: int
    written: int

    def body(self) -> dict[str, int]:
        """As OpenAI names them."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.written,
            "total_tokens": self.prompt + self.written,
        }


class Answer:
    """The choices of one request, numbered prompt by prompt, and what surrounds them."""

    def __init__(self, request: CompletionRequest, model: str) -> None:
        self._request = request
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        count = len(request.prompts) * request.n
        self.choices = [Choice(index, request.logprobs) for index in range(count)]

    @property
    def usage(self) -> Usage:
        """So far."""
        written = sum(choice.bytes_written for choice in self.choices)
        return Usage(sum(map(len, self._request.prompts)), written)

    def body(self, entries: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        """The object of a whole answer or of a part of it."""
        found: dict[str, Any] = {**self._head, "choices": entries}
        if usage is not None:
            found["usage"] = usage.body()
        elif self._request.include_usage:
            found["usage"] = None
        return found

    def event(self, entries: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
        """A part of the answer as a server-sent event."""
        return event(self.body(entries, usage))


def event(found: dict[str, Any]) -> bytes:
    """An object as a server-sent event."""
    return f"data: {json.dumps(found, allow_nan=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
"""The event that ends every stream."""


def merged(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """All parts of one choice as one."""
    found = dict(entries[-1])
    found["text"] = "".join(each["text"] for each in entries)
    if found["logprobs"] is not None:
        parts = [each["logprobs"] for each in entries]
        found["logprobs"] = {
            key: None if parts[0][key] is None else [one for part in parts for one in part[key]]
            for key in parts[0]
        }
    return found
