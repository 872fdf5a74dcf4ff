"""Puts a load on an API server of either package and prints what it saw, line by line.

`python scripts/check/serve_load.py [MODEL] [--package jax|torch] [--device cuda] [--recipe NAME]`:
a run folder or, for torch, an export; by default a tiny model, or random parameters of a recipe.
Streams at once: bytes a second through the API beside those of `generate` with as many rows of the
same prompts and the same sampler, in turns, in a process of its own, and percentiles of the first
byte and of the time between events, in milliseconds. The same streams while prompts of the greatest
length come. Then requests one after another, of which every fourth is dropped in mid-stream, with
memory read at the 200th and at the last one; how soon the slots of dropped requests are free; and a
server that is killed in mid-stream and started again (`--requests 0` leaves these out). Traffic
goes to 127.0.0.1 alone. On one GPU, both processes get two fifths of its memory each.
"""

import argparse
import asyncio
import http.client
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bytelm import recipes
from bytelm.config import MegabyteConfig, Recipe
from bytelm.sampling import SamplerConfig

PROMPT_BYTES = 64
SLOTS = 8
"""Of the server that gets one request after another."""

DROPPED_BYTES = 2048
"""What a request asks for that is dropped: too much to be written before the client has gone."""

ENVIRONMENT = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.4"}

TINY = MegabyteConfig(
    patch_size=4, global_dim=64, local_dim=64, max_length=8192, variant="in_action",
    global_layers=2, local_layers=2, global_heads=2, local_heads=2,
)  # fmt: skip


# ---- the model, in processes of its own ---------------------------------------------------------


def make_model(folder: Path, recipe: str, package: str) -> None:
    """Random parameters, as a run or, for torch, as an export."""
    found = getattr(recipes, recipe)() if recipe else Recipe(name="tiny", model=TINY)
    if package == "torch":
        from bytelm_torch import build_model, save_pretrained

        save_pretrained(build_model(found.model), folder)
        return
    import jax

    from bytelm_jax.models import define_model
    from bytelm_jax.training import checkpoint

    params = jax.jit(define_model(found.model)[1], static_argnums=0)(0)
    checkpoint.create_run(folder, replace(found, name="load"), params)


def generate_in_turns(folder: Path, package: str, device: str, streams: int, count: int) -> None:
    """Generates once for each line that comes, and prints the seconds; 4 texts at the end."""
    if package == "torch":
        from bytelm_torch import from_pretrained, generate

        model: Any = from_pretrained(folder, device=device)
        write: Any = generate
    else:
        from bytelm_jax import from_pretrained, generate

        model, write = from_pretrained(folder), generate
    prompts = make_prompts(streams)

    def rows(of: list[bytes], seed: int) -> list[bytes]:
        return write(model, of, count, SamplerConfig(), seed, False, valid_utf8=True)

    rows(prompts, 0)
    print("ready", flush=True)
    while sys.stdin.readline().strip():
        began = time.perf_counter()
        rows(prompts, 0)
        print(time.perf_counter() - began, flush=True)
    print(json.dumps([rows([each], i)[0].decode() for i, each in enumerate(prompts[:4])]))


def make_prompts(count: int, size: int = PROMPT_BYTES) -> list[bytes]:
    source = np.random.default_rng(size)
    return [bytes(source.integers(97, 123, size).tolist()) for _ in range(count)]


# ---- the server ---------------------------------------------------------------------------------


class Served:
    """An API server in a process of its own, until `end`."""

    def __init__(
        self, options: argparse.Namespace, slots: int, prompt_bytes: int, new_bytes: int = 0
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        began = time.perf_counter()
        command = [sys.executable, "-m", "bytelm_torch.serve", str(options.model)]
        command += ["--device", options.device]
        if options.package == "jax":
            command = [sys.executable, "-m", "bytelm_jax.cli", "serve", str(options.model)]
            command += ["--api", "--no-page"]
        command += ["--port", str(self.port), "--slots", str(slots), "--queue", "256"]
        command += ["--max-prompt-bytes", str(prompt_bytes)]
        command += ["--max-new-bytes", str(new_bytes or options.bytes)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert self.process.stdout
        while "until Ctrl-C" not in (line := self.process.stdout.readline()):
            assert line, "the server did not start"
        self.seconds = round(time.perf_counter() - began, 1)

    def ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The whole answer; raises `OSError` unless its status is 200."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as client:
            client.request("POST", "/v1/completions", json.dumps(asked))
            answer = client.getresponse()
            found = answer.read()
            if answer.status != 200:
                raise OSError(f"status {answer.status}: {found.decode()}")
        return json.loads(found) if found[:1] == b"{" else {}

    def begin(self, asked: dict[str, Any]) -> http.client.HTTPConnection:
        """A stream whose first event has come."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        client.request("POST", "/v1/completions", json.dumps(asked))
        answer = client.getresponse()
        assert answer.readline().startswith(b"data: ")
        answer.close()
        return client

    def resident(self) -> float:
        """MiB of memory that the server holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024, 1)

    def metric(self, name: str) -> float:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as client:
            client.request("GET", "/metrics")
            text = client.getresponse().read().decode()
        found = re.findall(rf"^bytelm_{re.escape(name)} (\S+)$", text, re.M)
        return float(found[0]) if found else float("nan")

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


def body(prompt: bytes, count: int, seed: int) -> dict[str, Any]:
    return {
        "prompt": prompt.decode("latin-1"), "max_tokens": count, "seed": seed, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip


class Stream(NamedTuple):
    """A stream that has ended; `times` are those of its events, in seconds from the request on."""

    text: str
    times: list[float]


def request_bytes(asked: dict[str, Any]) -> bytes:
    data = json.dumps(asked).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
    return head % len(data) + data


async def lines_of(port: int, request: bytes) -> list[tuple[float, bytes]]:
    """The lines of an answer, and when each came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, found = time.perf_counter(), list[tuple[float, bytes]]()
    writer.write(request)
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        assert line, "the stream was cut"
        found.append((time.perf_counter() - began, line))
    writer.close()
    return found


def stream_of(lines: list[tuple[float, bytes]]) -> Stream:
    events = [(at, json.loads(line[6:])) for at, line in lines if line.startswith(b"data: ")]
    text = "".join(each["choices"][0]["text"] for _, each in events)
    return Stream(text, [at for at, _ in events])


async def stream(port: int, asked: dict[str, Any]) -> Stream:
    return stream_of(await lines_of(port, request_bytes(asked)))


def cpu_seconds(pid: int) -> float:
    """Of a process so far: on a busy machine a better measure than the clock."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def streams(port: int, asked: list[dict[str, Any]]) -> tuple[list[Stream], float]:
    """Streams at once, and the seconds that they took.

    What a client does with requests and answers is done before and after: it takes the same time
    as the server's side of it, and clients elsewhere would do it beside each other.
    """

    async def at_once(requests: list[bytes]) -> list[list[tuple[float, bytes]]]:
        return await asyncio.gather(*[lines_of(port, each) for each in requests])

    requests, began = list(map(request_bytes, asked)), time.perf_counter()
    found = asyncio.run(at_once(requests))
    seconds = time.perf_counter() - began
    return list(map(stream_of, found)), seconds


# ---- what is measured ---------------------------------------------------------------------------


def at_once(served: Served, options: argparse.Namespace) -> None:
    count, wanted = options.bytes, options.streams * options.bytes
    asked = [body(each, count, i) for i, each in enumerate(make_prompts(options.streams))]
    command = [sys.executable, __file__, str(options.model), "--worker", "--device", options.device]
    command += ["--package", options.package, "--streams", str(options.streams)]
    command += ["--bytes", str(count)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    worker = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    assert worker.stdin and worker.stdout and worker.stdout.readline(), "generate did not start"
    found, _ = streams(served.port, asked)
    by_generate, by_api, first, between = [], [], [], []
    pids = {"generate": worker.pid, "server": served.process.pid, "client": os.getpid()}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    work = {each: f'engine_seconds_total{{work="{each}"}}' for each in ("join", "read", "advance")}
    taken = {each: -served.metric(name) for each, name in work.items()}
    for _ in range(options.turns):
        print("next", file=worker.stdin, flush=True)
        by_generate.append(wanted / float(worker.stdout.readline()))
        found, seconds = streams(served.port, asked)
        by_api.append(wanted / seconds)
        for each in found:
            first.append(each.times[0])
            between += np.diff(each.times).tolist()
    cpu = {n: round((cpu_seconds(p) - before[n]) / options.turns, 3) for n, p in pids.items()}
    taken = {
        each: round(1000 * (taken[each] + served.metric(name)) / options.turns, 1)
        for each, name in work.items()
    }
    print("", file=worker.stdin, flush=True)
    texts = json.loads(worker.stdout.readline())
    worker.wait(60)
    api, alone = statistics.median(by_api), statistics.median(by_generate)
    say("streams at once", {
        "streams": options.streams,
        "bytes each": count,
        "bytes/s through the API": round(api),
        "bytes/s by generate": round(alone),
        "share": round(api / alone, 3),
        "CPU seconds of a turn": cpu,
        "ms of a turn in the engine": taken,
        "first byte, ms": percentiles(first),
        "between events, ms": percentiles(between),
        "of 4 texts equal to generate's": sum(
            each.text == one for each, one in zip(found[:4], texts, strict=True)
        ),
    })  # fmt: skip
    times = streams(served.port, asked[:1])[0][0].times
    one = {"bytes/s": round(count / times[-1]), "first byte, ms": percentiles(times[:1])}
    say("one stream alone", one | {"between events, ms": percentiles(np.diff(times).tolist())})


def beside_long_prompts(served: Served, options: argparse.Namespace) -> None:
    """Half of the streams, and then prompts of the greatest length beside them."""
    half, long = options.streams // 2, make_prompts(8, options.long)
    asked = [body(each, options.bytes, i) for i, each in enumerate(make_prompts(half))]

    async def with_long() -> tuple[list[Stream], list[Stream]]:
        begun = asyncio.gather(*[stream(served.port, each) for each in asked])
        later = []
        for i, each in enumerate(long):
            await asyncio.sleep(0.1)
            later.append(asyncio.create_task(stream(served.port, body(each, 16, i))))
        return await begun, await asyncio.gather(*later)

    without, _ = streams(served.port, asked)
    beside, later = asyncio.run(with_long())
    gaps = [
        [gap for each in found for gap in np.diff(each.times).tolist()]
        for found in (without, beside)
    ]
    say("prompts of the greatest length beside streams", {
        "bytes of each of 8": options.long,
        "between events of the others before, ms": percentiles(gaps[0]),
        "between events of the others beside, ms": percentiles(gaps[1]),
        "their first byte, ms": percentiles([each.times[0] for each in later]),
    })  # fmt: skip


def percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds or [np.nan]) * 1000, (50, 95, 99))
    return dict(zip(("p50", "p95", "p99"), values.round(1).tolist(), strict=True))


def until_free(served: Served) -> dict[str, Any]:
    """From closing a stream until its slot is free, as far as the metrics show it."""
    waits, advances = [], []
    for seed in range(20):
        served.begin(body(b"dropped", DROPPED_BYTES, seed)).close()
        began, before = time.perf_counter(), served.metric("advances_total")
        while served.metric("active_texts"):
            time.sleep(0.002)
        waits.append(time.perf_counter() - began)
        advances.append(served.metric("advances_total") - before)
    return {"slot free after, ms": percentiles(waits), "after advances, at most": max(advances)}


def one_after_another(served: Served, requests: int) -> None:
    memory, began = {}, time.perf_counter()
    for i in range(1, requests + 1):
        if i % 4 == 0:
            served.begin(body(b"dropped", DROPPED_BYTES, i)).close()
        else:
            served.ask(body(b"%d: " % i, 16, i) | {"stream": i % 2 == 0})
        if i in (200, requests):
            memory[i] = served.resident(), served.metric("device_bytes") / 2**20
    seconds = time.perf_counter() - began
    dropped, free = served.metric('texts_total{end="cancelled"}'), until_free(served)
    host = [size for size, _ in memory.values()]
    device = [round(size, 1) for _, size in memory.values()]
    say("one after another", {
        "requests": requests,
        "of them dropped": dropped,
        "requests/s": round(requests / seconds, 1),
        f"MiB after {' and '.join(map(str, memory))} requests": {"host": host, "device": device},
        "growth": {"host": growth(host), "device": growth(device)},
    } | free)  # fmt: skip


def growth(sizes: list[float]) -> str:
    return f"{sizes[-1] / sizes[0] - 1:.2%}"


def killed(options: argparse.Namespace) -> None:
    """A server that is killed while it streams, and the next one."""
    asked = body(b"killed", options.bytes, 1)
    texts = []
    for how in (signal.SIGKILL, signal.SIGTERM):
        served = Served(options, SLOTS, PROMPT_BYTES)
        texts.append(served.ask(asked | {"stream": False})["choices"][0]["text"])
        with closing(served.begin(asked)):
            code = served.end(how)
    same = {"same text after a kill": texts[0] == texts[1], "exit code of SIGTERM": code}
    say("killed in mid-stream", same)


def say(what: str, found: dict[str, Any]) -> None:
    print(json.dumps({what: found}, ensure_ascii=False), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--package", choices=("jax", "torch"), default="jax")
    parser.add_argument("--device", default="cpu", help="of torch")
    parser.add_argument("--recipe", default="", help="whose parameters are random")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--bytes", type=int, default=192)
    parser.add_argument(
        "--long", type=int, default=1024, help="bytes of the longest prompts; 0: none"
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        given = options.model, options.package, options.device, options.streams, options.bytes
        generate_in_turns(*given)
        return
    if options.model is not None and not options.model.exists():
        parser.error(f"{options.model}: no such model")
    if options.model is not None and options.recipe:
        parser.error("--recipe: is for random parameters; leave MODEL out")
    with tempfile.TemporaryDirectory() as temporary:
        if options.model is None:
            options.model = Path(temporary) / "load"
            make = (
                "import sys, pathlib, serve_load; serve_load.make_model(pathlib.Path(sys.argv[1])"
            )
            make += ", *sys.argv[2:])"
            command = [sys.executable, "-c", make, str(options.model), options.recipe]
            folder = Path(__file__).parent
            subprocess.run([*command, options.package], check=True, cwd=folder, env=ENVIRONMENT)
        # A server of its own: every byte costs as much as the longest text that is served.
        for measure, prompt_bytes in ((at_once, PROMPT_BYTES), (beside_long_prompts, options.long)):
            if not prompt_bytes:
                continue
            served = Served(options, options.streams, prompt_bytes)
            say("server", {"package": options.package, "seconds until ready": served.seconds})
            try:
                measure(served, options)
            finally:
                served.end()
        if not options.requests:
            return
        served = Served(options, SLOTS, PROMPT_BYTES, DROPPED_BYTES)
        try:
            one_after_another(served, options.requests)
        finally:
            served.end()
        killed(options)


if __name__ == "__main__":
    main()
