"""The HTTP server: who may ask, how much, and how long a request or a reader may take.

A server that answers any `Host` lets a page elsewhere reach this machine by DNS rebinding. This one
answers its own names and its own origin, bounds bodies, and closes connections that stall. uvicorn,
of the extras `api` and `app`, is imported where it is used.
"""

import asyncio
import ipaddress
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Container, MutableMapping
from typing import Any

from bytelm.serving.errors import error_body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_SECONDS = 15.0
"""How long the head of a request may take, and its body, and a reader that reads nothing."""

_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+))(?::[0-9]{0,5})?", re.ASCII)

_CONNECTIONS = 512
"""Connections at once; more are answered with status 503."""


class Guard:
    """An ASGI application in front of another: refuses requests in one line.

    `hosts` are the names by which this server may be addressed, None for any; a body may have
    `body_bytes`, and one for the API `api_body_bytes`. `count` hears the status of every request to
    the API that is refused here.
    """

    def __init__(
        self,
        app: Any,
        hosts: Container[str] | None,
        body_bytes: int,
        api_body_bytes: int = 0,
        count: Callable[[int], None] | None = None,
    ):
        self._app, self._hosts, self._count = app, hosts, count
        self._body_bytes, self._api_body_bytes = body_bytes, api_body_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers one request, or hands it on with its whole body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = (_is_api(scope) and self._api_body_bytes) or self._body_bytes
        refused, body = self._refused(scope, most) or self.refused_path(scope), b""
        if refused is None:
            body = await self._body(receive, most)
            refused = body if isinstance(body, tuple) else self.refused_call(scope, body)
        if refused is not None:
            if self._count is not None and _is_api(scope):
                self._count(refused[0])
            await _answer(scope, send, *refused)
            return
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return parts.pop() if parts else await receive()

        await self._app(scope, again, send)

    def _refused(self, scope: Message, most: int) -> tuple[int, str] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self._hosts is not None and _name(host) not in self._hosts:
            return 421, "Host: this server does not go by that name"
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return 403, "Origin: pages of other sites may not ask this server"
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > most:
            return 413, f"body: at most {most} bytes"
        return None

    def refused_path(self, scope: Message) -> tuple[int, str] | None:
        """Status and text for what the application should not see, before its body is read."""
        return None

    def refused_call(self, scope: Message, body: bytes) -> tuple[int, str] | None:
        """The same, with its body."""
        return None

    async def _body(self, receive: Receive, most: int) -> bytes | tuple[int, str]:
        """The whole body, or the status and text of a refusal."""
        body, more, until = b"", True, time.monotonic() + _SECONDS
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                return 408, f"body: did not arrive within {_SECONDS:.0f} s"
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                return 413, f"body: at most {most} bytes"
        return body


def _name(host: str) -> str:
    """The name in a `Host` header, without its port and the brackets of IPv6.

    Empty if the header is not a name with at most a port.
    """
    found = _HOST.fullmatch(host)
    return (found[1] or found[2]).lower() if found else ""


def _is_api(scope: Message) -> bool:
    return scope["path"].startswith("/v1/") or scope["path"] in ("/health", "/metrics")


async def _answer(scope: Message, send: Send, status: int, text: str) -> None:
    kind, body = b"text/plain; charset=utf-8", f"{text}\n".encode()
    if _is_api(scope):
        kind, body = b"application/json", json.dumps(error_body(status, text)).encode() + b"\n"
    headers = [(b"content-type", kind), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def own_names(host: str) -> set[str] | None:
    """The names by which a server on this address may be asked; None for any name.

    One that only this machine can reach answers to the names of this machine alone.
    """
    return {host, "localhost", "127.0.0.1", "::1"} if is_loopback(host) else None


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_address(host: str, port: int) -> None:
    """Raises `OSError` if the address cannot be taken, before a model is made ready for it."""
    _listening(host, port).close()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def _timed_protocol() -> type:
    """uvicorn's HTTP protocol, which closes a connection whose request does not arrive.

    Also one whose client does not read what it is sent.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        unread: asyncio.TimerHandle | None = None

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

        def pause_writing(self) -> None:
            super().pause_writing()
            self.unread = self.loop.call_later(_SECONDS, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self.unread is not None:
                self.unread.cancel()
            self.unread = None

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

        self._socket = _listening(host, port)
        named = f"[{host}]" if ":" in host else host
        self.address = f"http://{named}:{self._socket.getsockname()[1]}/"
        config = uvicorn.Config(
            app,
            http=_timed_protocol(),
            ws="none",
            log_config=None,  # uvicorn's own would close the handlers of everybody else
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
        # Each open page has a request that never ends; uvicorn would print a traceback for it.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
