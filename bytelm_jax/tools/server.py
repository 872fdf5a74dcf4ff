"""What Gradio serves and the page does not need: uploads, and ways past its queue."""

import json
from collections.abc import Callable, Container
from typing import Any

from bytelm.serving.server import Guard, Message

_NOT_NEEDED = ("upload", "run/", "api/", "proxy=", "stream/", "component_server", "monitoring")
"""What Gradio has below /gradio_api/ and the page does not use."""


class PageGuard(Guard):
    """Refuses it; `functions` are the numbers of the page's functions."""

    def __init__(
        self,
        app: Any,
        hosts: Container[str] | None,
        functions: Container[int],
        body_bytes: int,
        api_body_bytes: int = 0,
        count: Callable[[int], None] | None = None,
    ):
        super().__init__(app, hosts, body_bytes, api_body_bytes, count)
        self._functions = functions

    def refused_path(self, scope: Message) -> tuple[int, str] | None:
        """Refuses addresses that the page does not use."""
        _, api, below = scope["path"].partition("/gradio_api/")
        if api and below.startswith(_NOT_NEEDED):
            return 403, "this address is not served; use /gradio_api/call/generate"
        return None

    def refused_call(self, scope: Message, body: bytes) -> tuple[int, str] | None:
        """Refuses calls of functions that the page does not have."""
        if not scope["path"].endswith("/queue/join"):
            return None
        try:
            number = json.loads(body)["fn_index"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return 400, "body: must be a JSON object with fn_index"
        known = type(number) is int and number in self._functions
        return None if known else (400, "fn_index: there is no such function")
