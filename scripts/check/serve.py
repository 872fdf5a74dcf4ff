"""Puts a load on `bytelm serve` with a tiny model and prints what it saw as one JSON object.

`python scripts/check/serve.py [REQUESTS]`: 64 requests at once (none lost, each the answer to its
own prompt, finished in the order they came), prompts of every awkward kind, 200 requests whose
askers leave, what other sites and slow clients might try, then REQUESTS (500) one after another,
between which the memory of the server is read. The server runs behind a proxy that does not exist.
Traffic goes to 127.0.0.1 alone.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import jax
from gradio_client import Client

from bytelm.config import MegabyteConfig, Recipe
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.generate import generate
from bytelm_jax.models import define_model
from bytelm_jax.training import checkpoint

AT_ONCE, LENGTH, CANCELS = 64, 24, 200
PATIENT: dict = {"timeout": 120}  # the server may be compiling
AWKWARD = {
    "empty": "",
    "emoji": "👩‍👩‍👧 🎉",
    "right to left": "שלום עולם مرحبا",
    "control characters": "\x00\x01\x1b[31m\x7f",
    "no text": "\x89PNG\r\n\x1a\n\xff\ufffd",
    "HTML": "<script>alert(1)</script>",
}
REFUSED = {
    "oversize": ("x" * 5000, 8, 1.0, 0, 1.0, "categorical", 0),
    "too long": ("x", 5000, 1.0, 0, 1.0, "categorical", 0),
    "temperature": ("x", 8, -1.0, 0, 1.0, "categorical", 0),
}


def make_run(folder: Path) -> None:
    model = MegabyteConfig(
        patch_size=4, global_dim=8, local_dim=16, max_length=8192, variant="in_action",
        global_layers=1, local_layers=1, global_heads=2, local_heads=2,
    )  # fmt: skip
    params = jax.jit(define_model(model)[1], static_argnums=0)(0)
    checkpoint.create_run(folder, Recipe(name="tiny", model=model), params)


def start(folder: Path) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bytelm_jax.cli", "serve", str(folder), "--port", str(port)]
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | proxies
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert server.stdout and "until Ctrl-C" in server.stdout.readline()
    return server, f"http://127.0.0.1:{port}"


def resident(server: subprocess.Popen) -> float:
    """MiB of memory that the server holds."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024, 1)


def ask(address: str, request: tuple) -> str:
    """Puts a request into the queue, which returns its number."""
    response = httpx.post(f"{address}/gradio_api/call/generate", json={"data": request}, **PATIENT)
    return response.json()["event_id"]


def answer(address: str, event: str) -> tuple[float, str]:
    """When the answer was complete, and its text."""
    url, complete = f"{address}/gradio_api/call/generate/{event}", False
    with httpx.stream("GET", url, timeout=300) as lines:
        for line in lines.iter_lines():
            if complete:
                return time.perf_counter(), json.loads(line.removeprefix("data: "))[0]
            complete = line == "event: complete"
    return time.perf_counter(), "lost"


def at_once(address: str, folder: Path) -> dict:
    prompts = [f"prompt number {i}: " for i in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as readers:
        jobs = []
        for i, prompt in enumerate(prompts):
            event = ask(address, (prompt, LENGTH, 1.0, 0, 1.0, "categorical", i))
            jobs.append(readers.submit(answer, address, event))
        waiting = sum(not job.done() for job in jobs)
        answers = [job.result() for job in jobs]
    recipe, params, _ = checkpoint.load_run(folder)
    model = define_model(recipe.model)[0](params)
    wanted = []
    for i, prompt in enumerate(prompts):
        (new,) = generate(model, [prompt.encode()], LENGTH, SamplerConfig(), seed=i)
        wanted.append((prompt.encode() + new).decode("utf-8", "replace"))
    return {
        "requests at once": AT_ONCE,
        "unanswered when the last one was asked": waiting,
        "answered": sum(text != "lost" for _, text in answers),
        "right": sum(text == right for (_, text), right in zip(answers, wanted, strict=True)),
        "finished in the order asked": answers == sorted(answers, key=lambda one: one[0]),
    }


def awkward(client: Client) -> dict:
    results = {}
    for name, prompt in AWKWARD.items():
        text, cells, _ = client.predict(
            prompt, LENGTH, 1.0, 0, 1.0, "categorical", 1, api_name="/generate"
        )
        size, shown = len(prompt.encode()), cells.count(' title="byte ')
        results[name] = text.startswith(prompt) and size < shown <= size + LENGTH
    for name, request in REFUSED.items():
        try:
            client.predict(*request, api_name="/generate")
            results[name] = False
        except Exception as error:  # gradio_client raises AppError, a ValueError in older ones
            results[name] = str(error)
    return results


def cancelled(address: str, client: Client) -> dict:
    """200 requests whose askers close the connection; then one that must still be answered."""
    long = {"data": ["c", 1024, 1.0, 0, 1.0, "categorical", 0]}
    left = 0
    for _ in range(CANCELS):
        event = httpx.post(f"{address}/gradio_api/call/generate", json=long, **PATIENT)
        if event.status_code != 200:
            continue  # the queue is full, and says so
        url = f"{address}/gradio_api/call/generate/{event.json()['event_id']}"
        try:
            with httpx.stream("GET", url, timeout=0.05):
                pass
        except httpx.TimeoutException:
            pass
        left += 1
    began = time.perf_counter()
    while True:
        try:
            client.predict("after", LENGTH, 1.0, 0, 1.0, "categorical", 1, api_name="/generate")
            return {"cancelled": left, "seconds until the next": time.perf_counter() - began}
        except Exception as error:
            if "queue" not in str(error).lower() or time.perf_counter() - began > 600:
                return {"cancelled": left, "after cancels": str(error)}
            time.sleep(0.5)


def hostile(address: str) -> dict:
    """Status codes of what the page does not need; how many of 100 half-sent requests stay open."""
    join, host = f"{address}/gradio_api/queue/join", address.removeprefix("http://")
    tried = {
        "upload of 50 MB": ("POST", f"{address}/gradio_api/upload", {}, b"x" * 50_000_000),
        "run": ("POST", f"{address}/gradio_api/run/generate", {}, b"{}"),
        "foreign origin": ("POST", join, {"Origin": "http://evil.example"}, b"{}"),
        "foreign host": ("GET", address, {"Host": f"evil.example:{host.partition(':')[2]}"}, None),
        "unknown function": ("POST", join, {}, b'{"fn_index": 77, "data": []}'),
    }
    codes: dict = {}
    for name, (method, url, headers, body) in tried.items():
        try:
            answer = httpx.request(method, url, headers=headers, content=body, timeout=60)
            codes[name] = answer.status_code
        except httpx.TransportError as error:  # refused while the body was still being sent
            codes[name] = type(error).__name__
    name, _, port = host.partition(":")
    slow = [socket.create_connection((name, int(port)), timeout=40) for _ in range(100)]
    for each in slow:
        each.sendall(b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: ")
    codes["half-sent requests open after 40 s"] = sum(is_open(each) for each in slow)
    return codes


def is_open(connection: socket.socket) -> bool:
    with connection:
        try:
            return bool(connection.recv(1))
        except TimeoutError:
            return True
        except OSError:
            return False


def main(requests: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        make_run(folder)
        server, address = start(folder)
        report: dict = {}
        try:
            report |= at_once(address, folder)
            client = Client(address, verbose=False, httpx_kwargs=PATIENT)
            report |= awkward(client) | cancelled(address, client) | hostile(address)
            memory, began = {}, time.perf_counter()
            for i in range(requests + 1):
                if i % max(1, requests // 5) == 0:
                    memory[i] = resident(server)
                settings = (f"{i}", LENGTH, 1.0, 0, 1.0, "categorical", i)
                client.predict(*settings, api_name="/generate")
            report["MiB after so many requests"] = memory
            report["requests a second"] = round(requests / (time.perf_counter() - began), 1)
        finally:
            server.send_signal(signal.SIGTERM)
            report["exit code"] = server.wait(30)
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
