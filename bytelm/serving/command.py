"""What the commands that serve a model share."""

import gc
import os
import signal
import threading
from contextlib import suppress

from bytelm.arguments import UsageError
from bytelm.serving.api import Api
from bytelm.serving.engine import Engine
from bytelm.serving.requests import Limits
from bytelm.serving.server import Guard, Server, is_loopback, own_names, require_address

KEY_VARIABLE = "BYTELM_API_KEY"

_MOST = 2**29  # positions of a text with its prompt are 32-bit integers, padded to a power of two


def check_options(
    host: str,
    port: int,
    slots: int,
    prompt_bytes: int,
    new_bytes: int,
    queue: int,
    time_limit: float | None = None,
) -> None:
    """Raises `UsageError` for numbers that cannot be, `OSError` for an address that is not free."""
    if not host:  # which `socket` takes for every network
        raise UsageError("--host: must not be empty")
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: must be from 0 to 65535")
    if not 1 <= slots <= 4096:
        raise UsageError(f"--slots {slots}: must be from 1 to 4096")
    counts = {"max-prompt-bytes": prompt_bytes, "max-new-bytes": new_bytes, "queue": queue}
    for option, value in counts.items():
        if not 1 <= value <= _MOST:
            raise UsageError(f"--{option} {value}: must be from 1 to {_MOST}")
    if time_limit is not None and not time_limit > 0:
        raise UsageError(f"--time-limit {time_limit:g}: must be above 0")
    require_address(host, port)


def key_of(given: str) -> str:
    """The key of the API: the option, or else the variable; empty without one."""
    key = given or os.environ.get(KEY_VARIABLE, "")
    if not (key.isascii() and key.isprintable()):
        raise UsageError("--api-key: must be printable ASCII")
    return key


def make_api(
    engine: Engine, name: str, prompt_bytes: int, new_bytes: int, queue: int, key: str
) -> Api:
    """The API of an engine, with everything compiled."""
    limits = Limits(prompt_bytes=prompt_bytes, new_bytes=new_bytes, capacity=engine.capacity)
    if engine.capacity < prompt_bytes + new_bytes:
        print(f"note: a text may have {engine.capacity} bytes with its prompt, the model's limit")
    api = Api(engine, name, limits, queue, key)
    print("compiling", flush=True)
    engine.warm_up()
    # Of all that is loaded by now nothing will be garbage, and to look through it takes 150 ms,
    # for which every text would wait.
    gc.collect()
    gc.freeze()
    return api


def listen(api: Api, host: str, port: int) -> Server:
    """The running server of the API alone."""
    guard = Guard(api.app(), own_names(host), 2**16, api.limits.body_bytes, api.count)
    return Server(guard, host, port)


def announce(what: str, address: str, host: str, is_open: str) -> None:
    """Prints where it is, and, if strangers can reach it, `is_open`: what no key guards."""
    if is_open and not is_loopback(host):
        print(f"note: whoever reaches {address} can use this {is_open}")
    print(f"{what} at {address} until Ctrl-C", flush=True)


def wait_for_interrupt() -> None:
    """Blocks until SIGINT or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore SIGINT
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        threading.Event().wait()
