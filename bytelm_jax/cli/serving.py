"""The command that serves a model: a page for people, an API for programs."""

import os
import signal
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

from bytelm.arguments import UsageError
from bytelm_jax.cli.model import with_resets

KEY_VARIABLE = "BYTELM_API_KEY"


def serve_command(
    run: Path,
    /,
    host: str = "127.0.0.1",
    port: int = 7860,
    page: bool = True,
    api: bool = False,
    slots: int = 16,
    api_key: str = "",
    max_prompt_bytes: int = 4096,
    max_new_bytes: int = 1024,
    time_limit: float = 60.0,
    queue: int = 128,
    checkpoint: str = "latest",
    reset_on: Literal["trained", "none", "newline", "document"] = "trained",
) -> int:
    """Serves a page in the browser, and with --api an OpenAI-compatible API.

    Only this machine can reach it, unless --host says otherwise. The page runs one request at a
    time, the API as many texts as it has slots.

    Example: bytelm serve runs/megabyte_tiny --api

    Args:
        run: the run folder.
        host: the address to listen on; 0.0.0.0 is every network that this machine is in.
        port: the port to listen on.
        page: serve the page.
        api: serve /v1/completions, /v1/models, /health and /metrics.
        slots: how many texts the API writes at once; each takes memory for its caches.
        api_key: what clients of the API must send; by default the variable BYTELM_API_KEY.
        max_prompt_bytes: the longest starting text.
        max_new_bytes: the longest continuation.
        time_limit: seconds after which a generation of the page is stopped.
        queue: how many requests of the page, and how many texts of the API, may wait; more are
            refused.
        checkpoint: latest, best or a step.
        reset_on: where a new segment starts for the model; as in training, by default.
    """
    key = _checked(port, page, api, slots, api_key)

    from bytelm.serving.server import is_loopback
    from bytelm_jax.tools import app
    from bytelm_jax.training import checkpoint as checkpoints

    limits = app.Limits(
        prompt_bytes=max_prompt_bytes, new_bytes=max_new_bytes, seconds=time_limit, queue=queue
    )
    recipe, params, step = checkpoints.load_run(run, checkpoint)
    recipe = with_resets(recipe, reset_on)
    with ExitStack() as stack:
        blocks = app.build_page(app.Service(recipe, params, limits)) if page else None
        served = _api(run, recipe, params, limits, slots, key) if api else None
        if served is not None:
            stack.callback(served.close)
        server = _listen(host, port, limits, blocks, served)
        stack.callback(server.close)
        if not is_loopback(host) and not key:
            what = "page; it has no password" if page else "API; it has no key"
            print(f"note: whoever reaches {host}:{port} can use this {what}")
        print(f"{run} (step {step}) at {server.address} until Ctrl-C", flush=True)
        _wait_for_interrupt()
    return 0


def _checked(port: int, page: bool, api: bool, slots: int, given: str) -> str:
    """The key of the API; raises `UsageError` where options contradict each other."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: must be from 0 to 65535")
    if not (page or api):
        raise UsageError("--no-page: leaves nothing to serve; add --api")
    if not 1 <= slots <= 4096:
        raise UsageError(f"--slots {slots}: must be from 1 to 4096")
    if given and not api:
        raise UsageError("--api-key: is for --api")
    key = given or os.environ.get(KEY_VARIABLE, "") if api else ""
    if key and page:
        name = "--api-key" if given else KEY_VARIABLE
        raise UsageError(f"{name}: guards the API and not the page; add --no-page")
    if not (key.isascii() and key.isprintable()):
        raise UsageError("--api-key: must be printable ASCII")
    return key


def _api(run: Path, recipe: Any, params: Any, limits: Any, slots: int, key: str) -> Any:
    """The API of a model, with everything compiled."""
    from bytelm.serving.api import Api
    from bytelm.serving.requests import Limits
    from bytelm_jax.inference.slots import JaxSlots
    from bytelm_jax.training.pretrained import model_of

    most, new = limits.prompt_bytes, limits.new_bytes
    engine = JaxSlots(model_of(recipe, params), slots, most + new)
    allowed = Limits(prompt_bytes=most, new_bytes=new, capacity=engine.capacity)
    served = Api(engine, run.resolve().name, allowed, limits.queue, key)
    print("compiling", flush=True)
    engine.warm_up()
    return served


def _listen(host: str, port: int, limits: Any, blocks: Any, served: Any) -> Any:
    """The running server of the page, of the API, or of both."""
    from bytelm.serving.server import Guard, Server, own_names
    from bytelm_jax.tools import app

    if served is None:
        return app.launch(blocks, host, port, limits)
    size = served.limits.body_bytes
    if blocks is not None:
        return app.launch(blocks, host, port, limits, served.app(), size)
    return Server(Guard(served.app(), own_names(host), 2**16, size), host, port)


def _wait_for_interrupt() -> None:
    """Blocks until SIGINT or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
