"""The API under load: limits, clients that go, a server that stops, an engine that fails."""

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest

from bytelm.sampling import SamplerConfig
from bytelm.serving import scheduler as scheduling
from bytelm.serving import server as serving
from bytelm.serving.api import Api
from bytelm.serving.engine import Settings
from bytelm.serving.scheduler import QueueFull, Scheduler, Text
from bytelm.serving.server import Guard, Server
from bytelm.tests.api_client import (
    FOREVER,
    LIMITS,
    Echo,
    ask,
    metric,
    start_stream,
    until,
)

pytest.importorskip("fastapi", reason="needs the extra api")
# Libraries of the server warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

SCORED = {"prompt": ["ab", "cd"], "max_tokens": 0, "echo": True, "logprobs": 1}


@pytest.mark.parametrize("stream", [True, False])
def test_scoring_has_a_limit_and_ends_with_its_client(address, engine, monkeypatch, stream):
    scored, gate, score = [], threading.Event(), engine.score

    def slow(text):
        scored.append(text)
        assert gate.wait(20)
        return score(text)

    monkeypatch.setattr(engine, "score", slow)
    both = [http.client.HTTPConnection(address, timeout=20) for _ in range(2)]
    for connection in both:  # two slots and two that wait
        body = json.dumps(SCORED | {"stream": stream})
        connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer secret"})
    until(lambda: metric(address, "scoring_prompts") == 4 and scored)
    engine.joined.clear()
    status, _ = ask(address, SCORED | {"max_tokens": 5})
    assert status == 429 and scored == [b"ab"] and not engine.joined
    for connection in both:
        connection.close()
    until(lambda: metric(address, "scoring_prompts") == 0)
    gate.set()
    time.sleep(0.05)
    assert scored == [b"ab"]
    assert ask(address, SCORED)[0] == 200


def test_a_full_batch_refuses_before_it_scores(address, engine, monkeypatch):
    scored, score = [], engine.score
    monkeypatch.setattr(engine, "score", lambda text: scored.append(text) or score(text))
    engine.gate.clear()
    streams = [start_stream(address, FOREVER | {"n": 4})]
    assert ask(address, SCORED | {"max_tokens": 5})[0] == 429
    assert not scored and metric(address, "scoring_prompts") == 0
    for connection, answer in streams:
        answer.close()
        connection.close()
    engine.gate.set()
    until(lambda: metric(address, "waiting_texts") == 0 == metric(address, "active_texts"))


@pytest.mark.parametrize("scoring", [False, True])
def test_a_server_that_stops_answers_what_is_open(monkeypatch, scoring):
    monkeypatch.setattr(scheduling, "STOP_SECONDS", 0.2)
    engine = Echo(2)
    score = engine.score
    engine.score = lambda text: time.sleep(0.3) or score(text)
    api = Api(engine, "echo", LIMITS, 2)
    server = Server(Guard(api.app(), None, 2**16, 2**16), "127.0.0.1", 0)
    address = server.address.removeprefix("http://").rstrip("/")
    long = SCORED | {"prompt": ["ab"] * 4} if scoring else FOREVER
    stream, whole = (http.client.HTTPConnection(address, timeout=20) for _ in range(2))
    whole.request("POST", "/v1/completions", json.dumps(long | {"stream": False}))
    if not scoring:
        stream.request("POST", "/v1/completions", json.dumps(long))
    until(lambda: api.scorer.waiting == 4 if scoring else len(engine.texts) == 2)
    api.close()
    answer = whole.getresponse()
    assert answer.status == 503 and b"the server is stopping" in answer.read()
    if not scoring:
        assert b'"message": "the server is stopping"' in stream.getresponse().read()
    assert ask(address, {"prompt": "a"})[0] == 503
    for connection in (stream, whole):
        connection.close()
    server.close()
    api.close()


def test_a_request_that_never_ends_is_cut_without_a_traceback(caplog):
    open_ = threading.Event()

    async def page(scope, receive, send):
        open_.set()
        await asyncio.sleep(60)

    server = Server(Guard(page, None, 2**16), "127.0.0.1", 0)
    server._server.config.timeout_graceful_shutdown = 0
    address = server.address.removeprefix("http://").rstrip("/")
    with closing(http.client.HTTPConnection(address, timeout=20)) as tab:
        tab.request("GET", "/")
        assert open_.wait(20)
        server.close()
    assert not caplog.records


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(address, engine, stream):
    connection = http.client.HTTPConnection(address, timeout=20)
    body = json.dumps(FOREVER | {"stream": stream})
    connection.request("POST", "/v1/completions", body, {"Authorization": "Bearer secret"})
    until(lambda: engine.texts)
    before = metric(address, 'texts_total{end="cancelled"}')
    if stream:
        answer = connection.getresponse()
        answer.read(10)
        answer.close()
    connection.close()
    until(lambda: not engine.texts)
    assert metric(address, 'texts_total{end="cancelled"}') == before + 1
    assert metric(address, "advances_total") == engine.advances


def test_a_cancelled_text_is_gone_before_the_next_advance():
    engine, heard = Echo(1), []
    scheduler = Scheduler(engine, 1, heard.extend)
    settings = Settings(max_new_bytes=400, sampler=SamplerConfig(), seed=0)
    first, second = (Text(i, b"ab", settings, (), lambda *_: None) for i in range(2))
    engine.gate.clear()
    scheduler.submit([first])
    until(lambda: engine.texts)
    scheduler.submit([second])
    scheduler.cancel([first])
    engine.gate.set()
    until(lambda: len(engine.joined) == 2)
    assert engine.joined_after == [0, 1]  # the one advance that was under way
    with pytest.raises(QueueFull):
        scheduler.submit([first, second])
    scheduler.cancel([second])
    until(lambda: not engine.texts)
    scheduler.close()


def test_a_text_gets_its_end_though_all_others_are_cancelled_by_then():
    engine, heard = Echo(2), []
    scheduler = Scheduler(engine, 1, heard.extend)
    settings = Settings(max_new_bytes=1, sampler=SamplerConfig(), seed=0)
    short, long = (
        Text(count, b"ab", replace(settings, max_new_bytes=count), (), lambda *_: None)
        for count in (1, 400)
    )
    engine.gate.clear()
    scheduler.submit([short, long])
    until(lambda: len(engine.texts) == 2)
    scheduler.cancel([long])  # in the advance that ends the other one
    engine.gate.set()
    until(lambda: [(text, piece.end) for text, piece in heard] == [(short, "length")])
    scheduler.close()


def test_a_long_prompt_is_read_beside_a_text_that_is_written():
    engine, reads = Echo(2), []
    scheduler = Scheduler(engine, 1, lambda _: None)
    settings = Settings(max_new_bytes=400, sampler=SamplerConfig(), seed=0)
    first, second = (Text(i, b"ab", settings, (), lambda *_: None) for i in range(2))
    scheduler.submit([first])
    until(lambda: engine.advances > 2)

    def read(writing):
        assert writing
        reads.append(engine.advances)
        time.sleep(scheduling.SECONDS / 5)
        return len(reads) < 12

    engine.read = read
    scheduler.submit([second])
    until(lambda: len(reads) == 12)
    assert max(map(reads.count, reads)) <= 3  # half of an advance's time, and what was begun
    scheduler.cancel([first, second])
    until(lambda: not engine.texts)
    scheduler.close()


def test_a_full_queue_answers_429(address, engine):
    engine.gate.clear()
    streams = [start_stream(address) for _ in range(2)]
    until(lambda: engine.texts)
    streams += [start_stream(address) for _ in range(2)]  # two slots and two that wait
    status, found = ask(address, {"prompt": "x"})
    assert status == 429 and found["error"]["type"] == "rate_limit_error"
    for connection, answer in streams:
        answer.close()
        connection.close()
    engine.gate.set()
    until(lambda: metric(address, "waiting_texts") == 0 == metric(address, "active_texts"))


@pytest.mark.parametrize("scoring", [{}, {"max_tokens": 0, "echo": True, "logprobs": 1}])
def test_logits_that_are_not_finite_are_an_error_of_one_request(address, scoring):
    body = {"prompt": "broken"} | scoring
    status, found = ask(address, body)
    assert status == 500 and "not finite" in found["error"]["message"]
    status, data = ask(address, body | {"stream": True})
    assert status == 200 and b"not finite" in data and b"[DONE]" not in data
    assert ask(address, {"prompt": "ab"})[0] == 200


def test_slow_clients_are_cut(address, engine, monkeypatch):
    monkeypatch.setattr(serving, "_SECONDS", 0.2)
    host, port = address.split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
    for part in ("", head, f"{head}Content-Length: 9\r\n\r\n{{"):
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(part.encode())
            answer = b"".join(iter(lambda: slow.recv(4096), b""))  # until the server closes
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408"), answer


def test_a_client_that_does_not_read_is_cut(address, engine, monkeypatch):
    monkeypatch.setattr(serving, "_SECONDS", 0.2)
    host, port = address.split(":")
    body = json.dumps(FOREVER | {"n": 100, "logprobs": 5})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
    monkeypatch.setattr(engine, "slots", 100)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect((host, int(port)))
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: engine.texts)
        until(lambda: not engine.texts, 20)
        assert metric(address, 'texts_total{end="cancelled"}') >= 1


def test_a_failed_engine_is_said(monkeypatch):
    engine = Echo()
    api = Api(engine, "echo", LIMITS, 2)
    server = Server(Guard(api.app(), None, 2**16, 2**16), "127.0.0.1", 0)
    address = server.address.removeprefix("http://").rstrip("/")
    assert ask(address, {"prompt": "ab"})[0] == 200
    status, found = ask(address, {"prompt": "crash"})
    assert (status, found["error"]["message"]) == (500, "RuntimeError: out of memory")
    assert ask(address, {"prompt": "ab"})[0] == 503
    assert ask(address, None, "/health", "GET")[0] == 503
    server.close()
    api.close()
