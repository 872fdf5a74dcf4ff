"""The API of tiny models of both packages, for clients that know nothing of them."""

import functools
import gc
import http.client
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from bytelm.sampling import SamplerConfig
from bytelm.serving.api import Api
from bytelm.serving.requests import Limits
from bytelm.serving.server import Guard, Server, own_names
from bytelm.tests.api_client import metric
from parity_tests.packages import MODEL, PACKAGES, model_of

openai = pytest.importorskip("openai", reason="needs the extra test")
pytest.importorskip("fastapi", reason="needs the extra api")
# Libraries of the server warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

GUIDE = Path(__file__).parents[1] / "docs" / "serving.md"


class Served(NamedTuple):
    """The official client of a server with 3 slots, and the package behind it."""

    client: Any
    package: str

    @property
    def generation(self):
        """`generate` and `complete`."""
        return PACKAGES[self.package].generation

    @property
    def address(self):
        """Host and port."""
        return f"{self.client.base_url.host}:{self.client.base_url.port}"

    def complete(self, **request):
        """A completion by the client."""
        return self.client.completions.create(model="tiny", **request)

    def expected(self, prompt, count, seed, rows=1, **options):
        """What `generate` writes, as text."""
        model, request = model_of(self.package, MODEL), (count, SamplerConfig(), seed)
        texts = self.generation.generate(
            model, [prompt] * rows, *request, valid_utf8=True, **options
        )
        return [text.decode() for text in texts]


@pytest.fixture(scope="module", params=PACKAGES)
def served(request):
    engine = PACKAGES[request.param].engine(model_of(request.param, MODEL), 3, 128)
    limits = Limits(prompt_bytes=64, new_bytes=100, capacity=engine.capacity)
    api = Api(engine, "tiny", limits, 8)
    guard = Guard(api.app(), own_names("127.0.0.1"), 2**16, limits.body_bytes, api.count)
    server = Server(guard, "127.0.0.1", 0)
    client = openai.OpenAI(base_url=f"{server.address}v1", api_key="-", max_retries=0, timeout=60)

    def end():
        client.close()
        server.close()
        api.close()
        gc.collect()

    request.addfinalizer(end)
    return Served(client, request.param)


def test_the_official_client_completes(served):
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    answer = served.complete(prompt="hé ", max_tokens=30, seed=3)
    assert answer.choices[0].text == served.expected("hé ".encode(), 30, 3)[0]
    written = len(answer.choices[0].text.encode())
    assert answer.usage.completion_tokens == written and answer.usage.prompt_tokens == 4
    assert answer.choices[0].finish_reason == ("length" if written == 30 else "stop")
    many = served.complete(prompt=[104, 105], max_tokens=20, seed=4, n=4)
    assert [choice.text for choice in many.choices] == served.expected(b"hi", 20, 4, rows=4)


def test_the_official_client_streams(served):
    stream = served.complete(
        prompt="hé ", max_tokens=60, seed=3, n=2, stream=True,
        extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
    )  # fmt: skip
    texts, ends, usage = ["", ""], {}, None
    for part in stream:
        usage = part.usage
        for choice in part.choices:
            assert "\ufffd" not in choice.text
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == served.expected("hé ".encode(), 60, 3, rows=2, stop_at_eos=False)
    assert ends == {0: "length", 1: "length"} and usage and usage.completion_tokens == 120


def test_the_official_client_stops_scores_and_echoes(served):
    create = functools.partial(served.complete, prompt="ab", seed=6)
    (whole,) = served.expected(b"ab", 40, 6)
    stop = whole[5:7]
    stopped = create(max_tokens=40, stop=stop).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == whole[: whole.index(stop)]
    scored = create(max_tokens=12, logprobs=2, echo=True).choices[0]
    (alone,) = served.expected(b"ab", 12, 6)
    assert scored.text == f"ab{alone}"
    model, options = model_of(served.package, MODEL), {"valid_utf8": True, "log_probs": True}
    (wanted,) = served.generation.complete(model, [b"ab"], 12, SamplerConfig(), 6, **options)
    logs = scored.logprobs.token_logprobs
    assert len(logs) == 2 + len(wanted.text)
    np.testing.assert_allclose(logs[2:], wanted.log_probs, rtol=1e-5, atol=1e-5)
    whole_text = PACKAGES[served.package].engine(model, 1, 64).score(b"ab" + wanted.text)
    np.testing.assert_allclose(logs, whole_text.log_probs, rtol=1e-5, atol=1e-5)
    raw = create(max_tokens=30, logprobs=0, extra_body={"valid_utf8": False}).choices[0]
    (data,) = served.generation.generate(model, [b"ab"], 30, SamplerConfig(), 6)
    assert raw.text == data.decode("utf-8", "replace") and "\ufffd" in raw.text
    first = next(byte for byte in data if byte >= 0x80)
    assert f"bytes:\\x{first:02x}" in raw.logprobs.tokens


def test_the_official_client_is_told_what_is_wrong(served):
    for error, body, says in (
        (openai.BadRequestError, {"prompt": "a" * 65}, "prompt: 65 bytes; at most 64"),
        (openai.BadRequestError, {"prompt": [256]}, "ids must be whole numbers from 0 to 255"),
        (openai.BadRequestError, {"prompt": "a", "temperature": -1}, "temperature=-1.0"),
        (openai.NotFoundError, {"prompt": "a", "model": "gpt"}, "this is tiny"),
    ):
        with pytest.raises(error, match=says):
            served.client.completions.create(**{"model": "tiny"} | body)
    with pytest.raises(openai.NotFoundError, match="There is no chat endpoint"):
        served.client.chat.completions.create(model="tiny", messages=[])


def test_the_commands_of_the_guide_run_as_they_are_written(served):
    text = GUIDE.read_text()
    commands = re.findall(r"^curl .*$", text, re.M)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.replace("127.0.0.1:7860", served.address))
        heard = subprocess.check_output([*words, "-sS", "--max-time", "60"], text=True)
        assert '{"error"' not in heard and heard, (command, heard)
        if "-N" in command:
            lines = heard.strip().split("\n\n")
            assert lines[-1] == "data: [DONE]" and all(x.startswith("data: {") for x in lines[:-1])
        elif "completions" in command:
            assert json.loads(heard)["object"] == "text_completion"
    (program,) = re.findall(r"```python\n(import openai.*?)```", text, re.S)
    wrote = []
    exec(
        program.replace("127.0.0.1:7860", served.address), {"print": lambda x, **_: wrote.append(x)}
    )
    assert 0 < len("".join(wrote).encode()) <= 100


HOSTILE = [
    ({}, b'{"prompt": "a", "temperature": NaN}', 400),
    ({}, b'{"prompt": ' + b"[" * 20_000, 400),
    ({}, b'{"prompt": "a", "n": 1000000000}', 400),
    ({}, b'{"prompt": "a", "seed": 1e400}', 400),
    ({}, b'{"prompt": "\\ud800"}', 400),
    ({}, b'{"prompt": [-1]}', 400),
    ({}, b'{"prompt": "a", "stop": [""]}', 400),
    ({}, b'{"prompt": "a", "best_of": 5}', 400),
    ({}, b'{"prompt": "a", "max_tokens": 99999}', 400),
    ({}, b"\xff\xfe", 400),
    ({"Host": "elsewhere"}, b'{"prompt": "a"}', 421),
    ({"Origin": "http://elsewhere"}, b'{"prompt": "a"}', 403),
    ({"Content-Encoding": "gzip"}, b'{"prompt": "a"}', 415),
    ({}, b" " * 200_000, 413),
]


def test_hostile_requests_get_their_status_and_none_reaches_the_model(served):
    before = metric(served.address, "advances_total")
    for headers, body, status in HOSTILE:
        connection = http.client.HTTPConnection(served.address, timeout=20)
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        message = json.loads(answer.read())["error"]["message"]
        connection.close()
        assert answer.status == status and "\n" not in message, (body[:60], answer.status, message)
    assert metric(served.address, "advances_total") == before
    assert served.complete(prompt="a", max_tokens=1).choices[0].finish_reason
