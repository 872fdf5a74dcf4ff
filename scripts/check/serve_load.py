"""Puts a load on `bytelm serve --api` and prints what it saw as one JSON object.

`python scripts/check/serve_load.py [RUN] [--streams 64] [--bytes 192] [--requests 2000]`: a run
folder, or a tiny model by default. Streams at once: bytes a second through the API beside those of
`generate` with as many rows of the same prompts and the same sampler, in turns, and percentiles of
the first byte and of the time between events, in milliseconds. Then requests one after another, of
which every fourth is dropped in mid-stream, with memory read at the 200th and at the last one; how
soon the slots of dropped requests are free; and a server that is killed in mid-stream and started
again. Traffic goes to 127.0.0.1 alone.
"""

import argparse
import asyncio
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np

from bytelm.config import MegabyteConfig, Recipe
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.generate import generate
from bytelm_jax.models import define_model
from bytelm_jax.training import checkpoint
from bytelm_jax.training.pretrained import model_of

PROMPT_BYTES = 64
SLOTS = 8
"""Of the server that gets one request after another."""

TURNS = 7
"""Times that API and `generate` are measured, in turns."""


def make_run(folder: Path) -> None:
    model = MegabyteConfig(
        patch_size=4, global_dim=64, local_dim=64, max_length=8192, variant="in_action",
        global_layers=2, local_layers=2, global_heads=2, local_heads=2,
    )  # fmt: skip
    params = jax.jit(define_model(model)[1], static_argnums=0)(0)
    checkpoint.create_run(folder, Recipe(name="tiny", model=model), params)


class Served:
    """`bytelm serve --api` in a process of its own, until `end`."""

    def __init__(self, run: Path, slots: int, new_bytes: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        began = time.perf_counter()
        options = ["--port", str(port), "--slots", str(slots), "--queue", "256"]
        options += ["--max-prompt-bytes", str(PROMPT_BYTES), "--max-new-bytes", str(new_bytes)]
        command = [sys.executable, "-m", "bytelm_jax.cli", "serve", str(run), "--api", "--no-page"]
        self.process = subprocess.Popen(command + options, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        while "until Ctrl-C" not in (line := self.process.stdout.readline()):
            assert line, "the server did not start"
        self.seconds = time.perf_counter() - began
        self.address = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.address, timeout=120)

    def resident(self) -> float:
        """MiB of memory that the server holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return round(int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024, 1)

    def metric(self, name: str) -> float:
        text = self.client.get("/metrics").text
        found = re.findall(rf"^bytelm_{re.escape(name)} (\S+)$", text, re.M)
        return float(found[0]) if found else float("nan")

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        self.client.close()
        return self.process.wait(60)


def body(prompt: bytes, count: int, seed: int) -> dict[str, Any]:
    return {
        "prompt": prompt.decode("latin-1"), "max_tokens": count, "seed": seed, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip


async def stream(address: str, asked: dict[str, Any]) -> tuple[str, list[float]]:
    """The text of a stream, and when each of its events came, from the request on."""
    head, _, rest = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(head, int(rest))
    data, began = json.dumps(asked).encode(), time.perf_counter()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b"
        % (len(data), data)
    )
    text, times = "", []
    while not (line := await reader.readline()).startswith(b"data: [DONE]"):
        assert line, "the stream was cut"
        if line.startswith(b"data: "):
            times.append(time.perf_counter() - began)
            text += json.loads(line[6:])["choices"][0]["text"]
    writer.close()
    return text, times


def at_once(served: Served, run: Path, streams: int, count: int) -> dict[str, Any]:
    recipe, params, _ = checkpoint.load_run(run)
    model, source = model_of(recipe, params), np.random.default_rng(0)
    prompts = [bytes(source.integers(97, 123, PROMPT_BYTES).tolist()) for _ in range(streams)]

    def written() -> list[bytes]:
        return generate(model, prompts, count, SamplerConfig(), 0, False, valid_utf8=True)

    async def asked() -> list[tuple[str, list[float]]]:
        jobs = [stream(served.address, body(p, count, i)) for i, p in enumerate(prompts)]
        return await asyncio.gather(*jobs)

    written()
    asyncio.run(asked())
    found, by_generate, by_api, first, between = [], [], [], [], []
    for _ in range(TURNS):
        began = time.perf_counter()
        written()
        by_generate.append(streams * count / (time.perf_counter() - began))
        began = time.perf_counter()
        found = asyncio.run(asked())
        by_api.append(streams * count / (time.perf_counter() - began))
        for _, times in found:
            first.append(times[0])
            between += np.diff(times).tolist()
    right = sum(
        text.encode() == generate(
            model, [prompt], count, SamplerConfig(), i, False, valid_utf8=True
        )[0]
        for i, (prompt, (text, _)) in enumerate(zip(prompts[:4], found[:4], strict=True))
    )  # fmt: skip
    api, alone = statistics.median(by_api), statistics.median(by_generate)
    return {
        "streams": streams,
        "bytes each": count,
        "bytes/s through the API": round(api),
        "bytes/s by generate": round(alone),
        "share": round(api / alone, 3),
        "first byte, ms": percentiles(first),
        "between events, ms": percentiles(between),
        "of 4 texts equal to generate's": right,
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.percentile(np.array(seconds) * 1000, (50, 95, 99))
    return dict(zip(("p50", "p95", "p99"), values.round(1).tolist(), strict=True))


def dropped(client: httpx.Client, seed: int, count: int) -> None:
    """Reads the first event of a stream and closes it."""
    asked = body(b"dropped", count, seed)
    with client.stream("POST", "/v1/completions", json=asked) as answer:
        next(answer.iter_lines())


def until_free(served: Served, count: int) -> dict[str, Any]:
    """From closing a stream until its slot is free, as far as the metrics show it."""
    waits, advances = [], []
    for seed in range(20):
        dropped(served.client, seed, count)
        began, before = time.perf_counter(), served.metric("advances_total")
        while served.metric("active_texts"):
            time.sleep(0.002)
        waits.append(time.perf_counter() - began)
        advances.append(served.metric("advances_total") - before)
    return {"slot free after, ms": percentiles(waits), "after advances, at most": max(advances)}


def one_after_another(served: Served, requests: int, count: int) -> dict[str, Any]:
    memory, began = {}, time.perf_counter()
    for i in range(1, requests + 1):
        if i % 4 == 0:
            dropped(served.client, i, count)
        else:
            asked = body(b"%d: " % i, 16, i) | {"stream": i % 2 == 0}
            served.client.post("/v1/completions", json=asked).raise_for_status()
        if i in (200, requests):
            memory[i] = served.resident(), served.metric("device_bytes") / 2**20
    seconds = time.perf_counter() - began
    free = until_free(served, count)
    host = [size for size, _ in memory.values()]
    device = [size for _, size in memory.values()]
    return {
        "requests": requests,
        "of them dropped": served.metric('texts_total{end="cancelled"}'),
        "requests/s": round(requests / seconds, 1),
        f"MiB after {' and '.join(map(str, memory))} requests": {"host": host, "device": device},
        "growth": {"host": growth(host), "device": growth(device)},
    } | free


def growth(sizes: list[float]) -> str:
    return f"{sizes[-1] / sizes[0] - 1:.2%}"


def killed(run: Path, count: int) -> dict[str, Any]:
    """A server that is killed while it streams, and the next one."""
    asked = body(b"killed", count, 1)
    texts = []
    for how in (signal.SIGKILL, signal.SIGTERM):
        served = Served(run, SLOTS, count)
        whole = served.client.post("/v1/completions", json=asked | {"stream": False}).json()
        texts.append(whole["choices"][0]["text"])
        with httpx.stream("POST", f"{served.address}/v1/completions", json=asked) as answer:
            next(answer.iter_lines())
            code = served.end(how)
    return {"same text after a kill": texts[0] == texts[1], "exit code of SIGTERM": code}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--bytes", type=int, default=192)
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = options.run
        if run is None:
            run = Path(temporary) / "tiny"
            make_run(run)
        served = Served(run, options.streams, options.bytes)
        report: dict[str, Any] = {"seconds until ready": round(served.seconds, 1)}
        try:
            report |= at_once(served, run, options.streams, options.bytes)
            print(json.dumps(report), file=sys.stderr, flush=True)
        finally:
            report["exit code"] = served.end()
        served = Served(run, SLOTS, options.bytes)
        try:
            report |= one_after_another(served, options.requests, options.bytes)
        finally:
            served.end()
        report |= killed(run, options.bytes)
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
