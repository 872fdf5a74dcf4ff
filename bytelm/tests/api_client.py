"""An engine without a model, and a client that asks a server of it."""

import http.client
import json
import re
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from bytelm.config import ByteVocab
from bytelm.serving.engine import TOP, Scores, Written
from bytelm.serving.requests import Limits

LIMITS = Limits(prompt_bytes=64, new_bytes=400, capacity=440)
FOREVER = {"prompt": "forever", "max_tokens": 400, "stream": True}


class Echo:
    """Writes the prompt over and over, a byte an advance; `gate` holds it back."""

    config = SimpleNamespace(vocab=ByteVocab())
    capacity, most_rounds, device_bytes = LIMITS.capacity, 4, 0

    def __init__(self, slots: int = 2) -> None:
        self.slots, self.advances, self.joined, self.joined_after = slots, 0, [], []
        self.texts: dict[int, list] = {}
        self.gate = threading.Event()
        self.gate.set()

    def warm_up(self):
        pass

    def join(self, texts):
        for slot, prompt, settings in texts:
            assert slot not in self.texts
            self.joined.append((prompt, settings))
            self.joined_after.append(self.advances)
            self.texts[slot] = [prompt, settings, 0]

    def read(self, writing: bool) -> bool:
        return False

    def leave(self, slot):
        del self.texts[slot]

    def advance(self, rounds, meanwhile=lambda: None):
        meanwhile()
        self.gate.wait(20)
        time.sleep(0.002)
        self.advances += 1
        written = []
        for slot, text in list(self.texts.items()):
            prompt, settings, count = text
            if prompt == b"broken":
                written.append(Written(slot, b"", None, None, "the model's logits are not finite"))
                del self.texts[slot]
                continue
            if prompt == b"crash":
                raise RuntimeError("out of memory\nand a trace")
            text[2] = count + 1
            end = "length" if count + 1 == settings.max_new_bytes else None
            scores = self.score(b"?") if settings.scores else None
            written.append(Written(slot, prompt[count % len(prompt) :][:1], scores, end))
            if end:
                del self.texts[slot]
        return written, 1

    def score(self, text):
        shape = (len(text), TOP)
        top = np.broadcast_to(np.array([256, 65, 66, 200, 0], np.int32), shape)
        mine = np.full(len(text), np.nan if text == b"broken" else -1, np.float32)
        return Scores(mine, top, np.full(shape, -2, np.float32))


def ask(address, body, path="/v1/completions", method="POST", **headers) -> tuple[int, Any]:
    """Status and body of one request; `body` may be an object or bytes."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(address, timeout=20)
    headers = {"Authorization": "Bearer secret"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    found = answer.read()
    connection.close()
    return answer.status, json.loads(found) if found[:1] == b"{" else found


def metric(address, name):
    _, text = ask(address, None, "/metrics", "GET")
    (value,) = re.findall(rf"^bytelm_{re.escape(name)} (\S+)$", text.decode(), re.M)
    return float(value)


def count_of(address, status):
    _, text = ask(address, None, "/metrics", "GET")
    found = re.search(rf'^bytelm_requests_total{{status="{status}"}} (\S+)$', text.decode(), re.M)
    return float(found[1]) if found else 0.0


def events(data):
    lines = data.decode().strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def start_stream(address, body=FOREVER):
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Authorization": "Bearer secret"}
    )
    answer = connection.getresponse()
    assert answer.status == 200
    return connection, answer


def until(holds, seconds=10.0):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    assert holds()
