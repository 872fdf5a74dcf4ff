"""The API without a model: an engine that writes what it is told to, and everything around it."""

import json
import socket
from typing import Any

import pytest

from bytelm.arguments import UsageError
from bytelm.serving.answers import Choice, merged
from bytelm.serving.api import NO_CHAT
from bytelm.serving.command import check_options
from bytelm.serving.errors import ApiError
from bytelm.serving.requests import Limits, parse_request
from bytelm.serving.scheduler import Piece
from bytelm.tests.api_client import (
    Echo,
    ask,
    count_of,
    events,
    metric,
)

pytest.importorskip("fastapi", reason="needs the extra api")
# Libraries of the server warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_completion_has_openais_shape(address):
    status, found = ask(address, {"model": "echo", "prompt": "añb", "max_tokens": 6, "echo": True})
    assert status == 200 and found["object"] == "text_completion" and found["model"] == "echo"
    (choice,) = found["choices"]
    assert choice == {
        "index": 0,
        "text": "añbañba\ufffd",
        "logprobs": None,
        "finish_reason": "length",
    }
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}


def test_prompts_and_samples_are_numbered_and_rows_of_one_seed(address, engine):
    engine.joined.clear()
    body = {"prompt": ["ab", [99, 100]], "n": 2, "max_tokens": 2, "seed": 7, "temperature": 0}
    _, found = ask(address, body)
    texts = [(choice["index"], choice["text"]) for choice in found["choices"]]
    assert texts == [(0, "ab"), (1, "ab"), (2, "cd"), (3, "cd")]
    rows = [(prompt, s.seed, s.sample, s.sampler.temperature) for prompt, s in engine.joined]
    assert rows == [(b"ab", 7, 0, 0), (b"ab", 7, 1, 0), (b"cd", 7, 0, 0), (b"cd", 7, 1, 0)]


def test_a_stream_gives_whole_characters_and_adds_up(address):
    body = {"prompt": "ñ日🎉", "max_tokens": 18, "stream": True, "logprobs": 2}
    status, data = ask(address, body | {"stream_options": {"include_usage": True}})
    assert status == 200
    parts = events(data)
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 18
    choices = [part["choices"][0] for part in parts[:-1]]
    assert [choice["text"] for choice in choices] == list("ñ日🎉ñ日🎉")
    assert [choice["finish_reason"] for choice in choices] == [None] * 5 + ["length"]
    assert choices[1]["logprobs"]["tokens"] == [r"bytes:\xe6", r"bytes:\x97", r"bytes:\xa5"]
    assert choices[1]["logprobs"]["text_offset"] == [1, 1, 1]
    top = choices[1]["logprobs"]["top_logprobs"][0]
    assert top == {"<|endoftext|>": -2.0, "A": -2.0, r"bytes:\xe6": -1.0}


@pytest.mark.parametrize("size", [1, 2, 7])
def test_choices_are_the_same_however_they_arrive(size):
    data = b"a\xc3\xa9\xff\xc3\xc3\xa9b\xe2\x82c\xf0\x9f\x8e\x89\xe2"
    scores = Echo().score(data)
    choice, entries = Choice(0, 1), []
    for at in range(0, len(data), size):
        end = "length" if at + size >= len(data) else None
        entries.append(choice.add(Piece(data[at : at + size], scores.cut(at, at + size), end)))
        assert len(entries[-1]["logprobs"]["tokens"]) == len(entries[-1]["logprobs"]["text_offset"])
    found = merged(entries)
    assert found["text"] == data.decode("utf-8", "replace")
    characters = found["text"]
    for name, offset in zip(
        found["logprobs"]["tokens"], found["logprobs"]["text_offset"], strict=True
    ):
        shown = characters[offset]
        assert shown == name if len(name) == 1 else shown not in "abc"
    assert found["logprobs"]["text_offset"] == [0, 1, 1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 8, 8, 9]


def test_stops_cut_text_and_probabilities(address, engine):
    body = {"prompt": "abcSTOPd", "max_tokens": 60, "stop": ["STOP", "zz"], "logprobs": 0}
    status, found = ask(address, body)
    (choice,) = found["choices"]
    assert (status, choice["text"], choice["finish_reason"]) == (200, "abc", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert not engine.texts  # the slot is free though the text had not ended


def test_scoring_alone(address, engine):
    engine.joined.clear()
    body = {"prompt": ["hi", ""], "max_tokens": 0, "echo": True, "logprobs": 1}
    _, found = ask(address, body)
    first, second = found["choices"]
    assert first["text"] == "hi" and first["logprobs"]["token_logprobs"] == [-1.0, -1.0]
    assert second["logprobs"]["tokens"] == [] and first["finish_reason"] == "length"
    assert not engine.joined


def test_a_prompt_that_ends_inside_a_character_is_scored_to_its_end(address):
    body = {"prompt": [97, 240], "max_tokens": 0, "echo": True, "logprobs": 1}
    (choice,) = ask(address, body)[1]["choices"]
    assert choice["text"] == "a\ufffd" and choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["a", r"bytes:\xf0"]


def test_limits_are_no_more_than_the_model_takes():
    limits = Limits(prompt_bytes=9_999_999, new_bytes=2048, capacity=1024)
    assert (limits.prompt_bytes, limits.new_bytes) == (1024, 1024)
    assert limits.body_bytes < 2**20
    config: Any = Echo.config
    with pytest.raises(ApiError, match="prompt: 1100 bytes; at most 1024") as caught:
        parse_request(json.dumps({"prompt": "a" * 1100}).encode(), "m", config, limits)
    assert caught.value.param == "prompt"


def test_a_fault_of_the_server_is_a_counted_500(address, engine, monkeypatch):
    before = metric(address, 'requests_total{status="500"}')
    monkeypatch.setattr(engine, "score", lambda text: 1 / 0)
    body = {"prompt": "hi", "max_tokens": 0, "echo": True, "logprobs": 1}
    status, found = ask(address, body)
    assert status == 500 and found["error"]["message"] == "the server failed: ZeroDivisionError"
    assert metric(address, 'requests_total{status="500"}') == before + 1
    status, data = ask(address, body | {"stream": True})
    assert status == 200 and json.loads(data.removeprefix(b"data: ")) == found


HOSTILE = {
    "nothing": (b"", 400, "body: is not JSON"),
    "deep": (b"[" * 50_000, 400, "body: is nested too deeply"),
    "deep prompt": (b'{"prompt":' + b"[" * 9000 + b"]" * 9000 + b"}", 400, "nested too deeply"),
    "half a field": (b'{"\\ud800": 1}', 400, "is no field of a completion"),
    "no place": ({"prompt": "a", "n": 5}, 400, "n: the request is for 5 texts; this server takes"),
    "no place for prompts": ({"prompt": ["a"] * 5}, 400, "prompt: the request is for 5 texts"),
    "no text": (b'{"prompt": "\xff"}', 400, "body: is not JSON"),
    "array": (b"[]", 400, "must be a JSON object"),
    "NaN": (b'{"temperature": NaN}', 400, "NaN is not a number of JSON"),
    "infinite": (b'{"temperature": 1e999}', 400, "temperature: must be a number"),
    "long number": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "has too many digits"),
    "negative": ({"temperature": -1}, 400, "temperature=-1.0"),
    "cold": ({"temperature": 1e-9}, 400, "temperature=1e-09"),
    "top_p": ({"top_p": 0}, 400, "top_p=0.0: must be above 0"),
    "text": ({"temperature": "1"}, 400, "temperature: must be a number"),
    "true": ({"n": True}, 400, "n: must be a whole number from 1 to 128"),
    "n": ({"n": 129}, 400, "n: must be a whole number"),
    "too many": ({"prompt": ["a"] * 65, "n": 2}, 400, "65 prompts and n=2; at most 128"),
    "seed": ({"seed": 2**32}, 400, "seed: must be a whole number"),
    "ids": ({"prompt": [1, 256]}, 400, "ids must be whole numbers from 0 to 255"),
    "negative id": ({"prompt": [-1]}, 400, "ids must be whole numbers"),
    "huge id": ({"prompt": [10**30]}, 400, "ids must be whole numbers"),
    "mixed": ({"prompt": [1, "a"]}, 400, "ids must be whole numbers"),
    "nested": ({"prompt": [[["a"]]]}, 400, "ids must be whole numbers"),
    "object": ({"prompt": {"a": 1}}, 400, "prompt: must be a string"),
    "no prompts": ({"prompt": []}, 400, "from 1 to 128 entries"),
    "surrogate": (b'{"prompt": "\\ud800"}', 400, "half a surrogate pair"),
    "long": ({"prompt": "é" * 33}, 400, "prompt: 66 bytes; at most 64"),
    "both long": ({"prompt": "a" * 64, "max_tokens": 400}, 400, "make 464; this model takes at"),
    "max_tokens": ({"max_tokens": 401}, 400, "max_tokens: must be a whole number from 0 to 400"),
    "unfinished": ({"prompt": [0xF0], "max_tokens": 2}, 400, "a character that needs 3 more"),
    "stop": ({"stop": 5}, 400, "stop: must be a string or a list"),
    "stops": ({"stop": ["a"] * 17}, 400, "stop: 17 texts; give at most 16"),
    "empty stop": ({"stop": ""}, 400, "stop: a text is empty"),
    "logprobs": ({"logprobs": 6}, 400, "logprobs: must be a whole number from 0 to 5"),
    "stream": ({"stream": "yes"}, 400, "stream: must be true or false"),
    "options": ({"stream_options": {"include_usage": True}}, 400, "for stream=true alone"),
    "unknown": ({"promt\n": "a"}, 400, "'promt\\n': is no field of a completion here"),
    "user": ({"user": 5}, 400, "user: must be a string"),
    "false penalty": ({"presence_penalty": False}, 400, "presence_penalty: is not supported"),
    "penalty": ({"presence_penalty": 1}, 400, "presence_penalty: is not supported"),
    "model": ({"model": "gpt-4"}, 404, "model: 'gpt-4' is not here; this is echo"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_get_their_status_and_reach_no_model(address, engine, name):
    body, status, says = HOSTILE[name]
    before = len(engine.joined)
    got, found = ask(address, body)
    assert got == status and says in found["error"]["message"], found
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in found["error"]["message"] and len(engine.joined) == before


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "says"),
    [
        ("GET", "/health", {"Authorization": ""}, None, 200, ""),
        ("GET", "/v1/models/echo", {}, None, 200, ""),
        ("GET", "/v1/models/other", {}, None, 404, "this is echo"),
        ("GET", "/v1/models", {"Authorization": "Bearer wrong"}, None, 401, "key of this server"),
        ("GET", "/v1/models", {"Authorization": "Bearer é"}, None, 401, "key of this server"),
        ("GET", "/metrics", {"Authorization": ""}, None, 401, "key of this server"),
        ("POST", "/v1/completions", {"Authorization": ""}, b"{}", 401, "key of this server"),
        ("GET", "/v1/completions", {}, None, 405, "takes POST alone"),
        ("DELETE", "/v1/models/echo", {}, None, 405, "takes GET alone"),
        ("POST", "/v1/models/other", {}, b"{}", 405, "takes GET alone"),
        ("POST", "/health", {}, b"{}", 405, "/health: takes GET alone"),
        ("POST", "/metrics", {}, b"{}", 405, "/metrics: takes GET alone"),
        ("HEAD", "/health", {}, None, 200, ""),
        ("GET", "/foo", {}, None, 404, "not served"),
        ("GET", "/foo", {"Authorization": ""}, None, 401, "key of this server"),
        ("GET", "/v1", {}, None, 404, "not served"),
        ("GET", "/health/", {}, None, 404, "not served"),
        ("GET", "/v1/models", {"Authorization": "bearer secret"}, None, 200, ""),
        ("GET", "/v1/models", {"Authorization": "Basic secret"}, None, 401, "key of this server"),
        ("POST", "/v1/completions", {"Content-Encoding": "gzip"}, b"{}", 415, "not compressed"),
        ("POST", "/v1/chat/completions", {}, b"{}", 404, NO_CHAT),
        ("POST", "/v1/embeddings", {}, b"{}", 404, "not served"),
        ("POST", "/v1/completions", {"Host": "evil.example"}, b"{}", 421, "does not go by"),
        ("GET", "/v1/models", {"Host": "[::1"}, None, 421, "does not go by"),
        ("GET", "/v1/models", {"Host": "evil@localhost"}, None, 421, "does not go by"),
        ("GET", "/v1/models", {"Host": "localhost:abc"}, None, 421, "does not go by"),
        ("GET", "/v1/models", {"Host": "[::1]:80"}, None, 200, ""),
        ("GET", "/v1/models", {"Host": "LOCALHOST"}, None, 200, ""),
        ("POST", "/v1/completions", {"Origin": "http://evil.example"}, b"{}", 403, "other sites"),
        ("GET", "/v1/models", {"Origin": "http://[evil"}, None, 403, "other sites"),
        ("GET", "/v1/models", {"Origin": "null"}, None, 403, "other sites"),
        ("POST", "/v1/completions", {"Content-Length": "9" * 12}, b"{}", 413, "body: at most"),
        ("POST", "/v1/completions", {}, b" " * 200_000, 413, "body: at most"),
    ],
)
def test_who_may_ask_what(address, engine, method, path, headers, body, status, says):
    before, counted = len(engine.joined), count_of(address, status)
    got, found = ask(address, body, path, method, **headers)
    assert got == status and len(engine.joined) == before
    of_metrics = status == 200  # the two requests for metrics are counted, too
    assert count_of(address, status) == counted + 1 + of_metrics
    assert status == 200 or says in found["error"]["message"]


@pytest.mark.parametrize(
    "name", ["port", "slots", "max-prompt-bytes", "max-new-bytes", "queue", "time-limit"]
)
def test_a_refused_option_has_its_name(name):
    numbers = {"port": 80, "slots": 1, "max-prompt-bytes": 1, "max-new-bytes": 1, "queue": 1}
    numbers["time-limit"] = 1
    with pytest.raises(UsageError, match=f"--{name} -1: must be"):
        check_options("127.0.0.1", *(numbers | {name: -1}).values())
    if "max" in name:
        with pytest.raises(UsageError, match=f"--{name} 1000000000000: must be from 1 to"):
            check_options("127.0.0.1", *(numbers | {name: 10**12}).values())
    with pytest.raises(UsageError, match="--host: must not be empty"):
        check_options("", *numbers.values())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        numbers["port"] = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"in use.*{numbers['port']}"):
            check_options("127.0.0.1", *numbers.values())
