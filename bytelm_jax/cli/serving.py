"""The command that serves a model: a page for people, an API for programs."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from bytelm.arguments import UsageError
from bytelm_jax.cli.model import with_resets


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
        queue: how many requests of the page, and texts of the API, may wait; more are refused.
        checkpoint: latest, best or a step.
        reset_on: where a new segment starts for the model; as in training, by default.
    """
    from bytelm.serving import command

    command.check_options(host, port, slots, max_prompt_bytes, max_new_bytes, queue, time_limit)
    key = _checked_key(page, api, api_key)

    from bytelm_jax.tools import app
    from bytelm_jax.training import checkpoint as checkpoints

    limits = app.Limits(
        prompt_bytes=max_prompt_bytes, new_bytes=max_new_bytes, seconds=time_limit, queue=queue
    )
    recipe, params, step = checkpoints.load_run(run, checkpoint)
    recipe = with_resets(recipe, reset_on)
    with ExitStack() as stack:
        blocks = app.build_page(app.Service(recipe, params, limits)) if page else None
        served = _make_api(stack, run, recipe, params, limits, slots, key) if api else None
        server = _listen(stack, host, port, limits, blocks, served)
        is_open = "page; it has no password" if page else "" if key else "API; it has no key"
        command.announce(f"{run} (step {step})", server.address, host, is_open)
        command.wait_for_interrupt()
    return 0


def _make_api(
    stack: ExitStack, run: Path, recipe: Any, params: Any, limits: Any, slots: int, key: str
) -> Any:
    """The API of a run's model, with everything compiled."""
    from bytelm.serving import command
    from bytelm_jax.inference.slots import JaxSlots
    from bytelm_jax.training.pretrained import model_of

    sizes = limits.prompt_bytes, limits.new_bytes
    engine = JaxSlots(model_of(recipe, params), slots, sum(sizes))
    served = command.make_api(engine, run.resolve().name, *sizes, limits.queue, key)
    stack.callback(served.close)
    return served


def _checked_key(page: bool, api: bool, given: str) -> str:
    """The key of the API; raises `UsageError` where options contradict each other."""
    from bytelm.serving.command import KEY_VARIABLE, key_of

    if not (page or api):
        raise UsageError("--no-page: leaves nothing to serve; add --api")
    if given and not api:
        raise UsageError("--api-key: is for --api")
    key = key_of(given) if api else ""
    if key and page:
        name = "--api-key" if given else KEY_VARIABLE
        raise UsageError(f"{name}: guards the API and not the page; add --no-page")
    return key


def _listen(stack: ExitStack, host: str, port: int, limits: Any, blocks: Any, served: Any) -> Any:
    """The running server of the page, of the API, or of both."""
    from bytelm.serving import command
    from bytelm_jax.tools import app

    if served is None:
        server = app.launch(blocks, host, port, limits)
    elif blocks is None:
        server = command.listen(served, host, port)
    else:
        server = app.launch(blocks, host, port, limits, served)
    stack.callback(server.close)
    if served is not None:  # ends before the server, so that no request is cut without an answer
        stack.callback(served.close)
    return server
