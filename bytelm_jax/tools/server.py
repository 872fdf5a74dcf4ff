"""The HTTP server under a page: who may ask, how much, and how long a request may take to arrive.

Gradio's own server answers any `Host` (so that a page elsewhere can reach this machine by DNS
rebinding), keeps uploaded files, runs functions past its queue, and waits forever for requests that
never end. This one answers the page's own origin, refuses what the page does not need, and closes
connections that stall. uvicorn, of the extra `app`, is imported where it is used.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_SECONDS = 15.0
"""How long the head of a request may take, and how long its body."""

_CONNECTIONS = 512
"""Connections at once; more are answered with status 503."""

_NOT_NEEDED = ("upload", "run/", "api/", "proxy=", "stream/", "component_server", "monitoring")
"""What Gradio serves below /gradio_api/ and the page does not use: uploads, ways past the queue."""


class Guard:
    """An ASGI application in front of another: refuses requests in one line of plain text.

    `hosts` are the names by which this server may be addressed, None for any; `functions` are the
    numbers of the page's functions; a body may have `body_bytes`.
    """

    def __init__(
        self, app: Any, hosts: Container[str] | None, functions: Container[int], body_bytes: int
    ):
        self._app, self._hosts = app, hosts
        self._functions, self._body_bytes = functions, body_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request, or hands it on with its whole body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused, body = self._refused(scope), b""
        if refused is None:
            body = await self._body(receive)
            refused = body if isinstance(body, tuple) else self._refused_call(scope, body)
        if refused is not None:
            await _answer(send, *refused)
            return
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return parts.pop() if parts else await receive()

        await self._app(scope, again, send)

    def _refused(self, scope: Message) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, "Host: this server does not go by that name"
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "Origin: pages of other sites may not ask this server"
        _, api, below = scope["path"].partition("/gradio_api/")
        if api and below.startswith(_NOT_NEEDED):
            return 403, "this address is not served; use /gradio_api/call/generate"
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > self._body_bytes:
            return 413, f"body: at most {self._body_bytes} bytes"
        return None

    async def _body(self, receive: Receive) -> bytes | tuple[int, str]:
        """The whole body, or the status and text of a refusal."""
        body, more, until = b"", True, time.monotonic() + _SECONDS
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                return 408, f"body: did not arrive within {_SECONDS:.0f} s"
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._body_bytes:
                return 413, f"body: at most {self._body_bytes} bytes"
        return body

    def _refused_call(self, scope: Message, body: bytes) -> tuple[int, str] | None:
        if not scope["path"].endswith("/queue/join"):
            return None
        try:
            number = json.loads(body)["fn_index"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return 400, "body: must be a JSON object with fn_index"
        known = type(number) is int and number in self._functions
        return None if known else (400, "fn_index: there is no such function")


def _name(host: str) -> str:
    """The name in a `Host` header, without its port and the brackets of IPv6."""
    return (urlsplit(f"//{host}").hostname or "") if host else ""


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{text}\n".encode()})


def _timed_protocol() -> type:
    """uvicorn's HTTP protocol, which closes a connection whose request does not arrive."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.timer = self.loop.call_later(_SECONDS, transport.close)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self.connection_at_work()
            elif self.timer is None:
                self.timer = self.loop.call_later(_SECONDS, self.transport.close)

        def connection_at_work(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = None

        def connection_lost(self, exc: Exception | None) -> None:
            self.connection_at_work()
            super().connection_lost(exc)

    return TimedProtocol


class Server:
    """An ASGI application served by threads of this process until `close`.

    Raises `OSError` if the address cannot be taken.
    """

    def __init__(self, app: Any, host: str, port: int):
        import uvicorn

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=128)
        named = f"[{host}]" if ":" in host else host
        self.address = f"http://{named}:{self._socket.getsockname()[1]}/"
        config = uvicorn.Config(
            app,
            http=_timed_protocol(),
            ws="none",
            log_level="error",
            access_log=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
            limit_concurrency=_CONNECTIONS,
        )
        self._server = uvicorn.Server(config)
        run = lambda: self._server.run(sockets=[self._socket])  # noqa: E731
        self._thread = threading.Thread(target=run, name="bytelm serve", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise OSError(0, "the server did not start", f"{host}:{port}")
            time.sleep(0.01)

    def close(self) -> None:
        """Ends open requests and frees the address."""
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
