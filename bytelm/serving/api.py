"""The HTTP side of the API: routes, streams, errors, a key. FastAPI is imported where it is used.

Handlers run in the server's event loop and the scheduler in its own thread: once an advance, the
scheduler hands all new pieces to the loop, which sorts them into the inboxes of their requests.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any

from bytelm.extras import import_extra
from bytelm.serving.answers import DONE, Answer, event, merged
from bytelm.serving.engine import Engine
from bytelm.serving.errors import ApiError, error_body
from bytelm.serving.metrics import Metrics
from bytelm.serving.requests import CompletionRequest, Limits, parse_request
from bytelm.serving.scheduler import Failed, Piece, QueueFull, Scheduler, Text
from bytelm.serving.scoring import Scorer, Scoring

NO_CHAT = (
    "There is no chat endpoint: this is a base model, which continues text; use /v1/completions."
)


class Api:
    """The API of one model. Raises `ValueError` if the extra `api` is not installed.

    `name` is the model's; `queue` texts may wait for a slot; `key`, unless it is empty, is what
    clients must send as `Authorization: Bearer KEY`.
    """

    def __init__(
        self, engine: Engine, name: str, limits: Limits, queue: int, key: str = ""
    ) -> None:
        self._fastapi = import_extra("fastapi", "api")
        self._responses = import_extra("fastapi.responses", "api")
        self._engine, self._name, self.limits, self._key = engine, name, limits, key
        self._created, self._queue = int(time.time()), queue
        self._loop: asyncio.AbstractEventLoop | None = None
        counts = lambda: self.scheduler.counts  # noqa: E731
        self.scorer = Scorer(engine, queue)
        self.metrics = Metrics(
            engine.slots, counts, lambda: self.scorer.waiting, lambda: engine.device_bytes
        )
        self.scheduler = Scheduler(engine, queue, self._deliver)
        self._events = _event_stream(self._responses.StreamingResponse)

    def close(self) -> None:
        """Ends the threads; whatever is not complete by then is answered by an error."""
        self.scheduler.close()
        self.scorer.close()

    def app(self) -> Any:
        """The FastAPI application."""
        app = self._fastapi.FastAPI(openapi_url=None, redirect_slashes=False)
        routes: list[tuple[str, str, Callable[..., Any]]] = [
            ("POST", "/v1/completions", self._completions),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name}", self._model),
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics),
        ]
        methods = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
        # Not `add_api_route`: what it does for a request takes longer than to parse it here.
        for method, path, handler in routes:
            taken = ["GET", "HEAD"] if method == "GET" else [method]
            app.add_route(path, self._answered(handler), methods=taken)
        other = self._answered(self._nothing)
        for path in ("/v1/{rest:path}", "/health", "/metrics"):
            app.add_route(path, other, methods=methods)

        async def not_found(request: Any, error: Exception) -> Any:
            return await other(request)

        app.add_exception_handler(404, not_found)
        app.add_exception_handler(405, not_found)
        return app

    # ---- routes ---------------------------------------------------------------------------------

    async def _completions(self, request: Any) -> Any:
        self._require_key(request)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "Content-Encoding: send the body as it is, not compressed")
        found = parse_request(await request.body(), self._name, self._engine.config, self.limits)
        _require_places(found, self._engine.slots + self._queue)
        answer, began = Answer(found, self._name), time.perf_counter()
        inbox: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        texts = _texts(found, inbox)
        # Requests that came together are parsed before the first is submitted.
        await asyncio.sleep(0)
        scoring = self._submit(found, texts)
        self.metrics.prompt_bytes.inc(answer.usage.prompt)
        parts = self._parts(found, answer, scoring, texts, inbox, began)
        if found.stream:
            stream = _as_events(found, answer, parts)
            return self._events(stream, lambda: self._leave(texts, scoring))
        try:
            whole = await _whole(request, answer, parts)
            if whole is None:
                return self._json(499, error_body(499, "the client has gone"))  # nobody reads it
            return self._json(200, whole)
        finally:
            self._leave(texts, scoring)

    async def _models(self, request: Any) -> Any:
        self._require_key(request)
        return self._json(200, {"object": "list", "data": [self._model_body()]})

    async def _model(self, request: Any) -> Any:
        self._require_key(request)
        if request.path_params["name"] != self._name:
            raise ApiError(404, f"model: that one is not here; this is {self._name}", "model")
        return self._json(200, self._model_body())

    async def _health(self, request: Any) -> Any:
        failure = self.scheduler.failure
        if failure is not None:
            return self._json(503, {"status": "failed", "error": failure})
        return self._json(200, {"status": "ok"})

    async def _metrics(self, request: Any) -> Any:
        self._require_key(request)
        return self._responses.Response(
            self.metrics.text(), headers={"Content-Type": self.metrics.content_type}
        )

    async def _nothing(self, request: Any) -> Any:
        self._require_key(request)
        path = request.url.path
        if path.startswith("/v1/chat"):
            raise ApiError(404, NO_CHAT)
        taken = _method_of(path)
        if taken is not None and request.method not in (taken, taken.replace("GET", "HEAD")):
            raise ApiError(405, f"{path if path.isascii() else 'this'}: takes {taken} alone")
        raise ApiError(404, "this address is not served; there are /v1/completions and /v1/models")

    # ---- one request ----------------------------------------------------------------------------

    def _submit(self, found: CompletionRequest, texts: list[Text]) -> Scoring:
        """Takes all places that a request needs, or none; nothing is computed before."""
        self._loop = asyncio.get_running_loop()
        scoring = None
        try:
            scored = found.echo and found.logprobs is not None
            scoring = self.scorer.add(found.prompts if scored else ())
            self.scheduler.submit(texts)
            return scoring
        except QueueFull:
            if scoring is not None:
                scoring.leave()
            raise ApiError(429, "too many requests are waiting; try again later") from None
        except Failed as error:
            if scoring is not None:
                scoring.leave()
            raise ApiError(503, str(error)) from None

    async def _parts(
        self,
        found: CompletionRequest,
        answer: Answer,
        scoring: Scoring,
        texts: list[Text],
        inbox: asyncio.Queue,
        began: float,
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """The choices as they grow; raises `ApiError` if a text cannot go on."""
        if found.echo or not texts:
            try:
                scores = await scoring.scores() or [None] * len(found.prompts)
            except Failed as error:
                raise ApiError(503, str(error)) from None
            entries = []
            for choice in answer.choices:
                number = choice.index // found.n
                prompt = found.prompts[number] if found.echo else b""
                end = None if texts else "length"
                entries.append(choice.start(prompt, scores[number], end))
            yield entries
        left, heard = len(texts), set()
        while left:
            pieces = [await inbox.get()]
            while not inbox.empty():
                pieces.append(inbox.get_nowait())
            entries = []
            for index, piece in pieces:
                if piece.error is not None:
                    raise ApiError(503 if self.scheduler.closed else 500, piece.error)
                if index not in heard:
                    heard.add(index)
                    self.metrics.first_byte.observe(time.perf_counter() - began)
                left -= piece.end is not None
                entry = answer.choices[index].add(piece)
                if entry["text"] or piece.end is not None:
                    entries.append(entry)
            if entries:
                yield entries

    def _leave(self, texts: list[Text], scoring: Scoring) -> None:
        """Gives up what is not complete."""
        scoring.leave()
        left = [text for text in texts if not text.complete]
        if left:
            self.scheduler.cancel(left)
            self.metrics.texts.labels("cancelled").inc(len(left))

    # ---- all of them ----------------------------------------------------------------------------

    def _deliver(self, pieces: list[tuple[Text, Piece]]) -> None:
        """Called by the scheduler's thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the server has closed its loop
                self._loop.call_soon_threadsafe(self._sort, pieces)

    def _sort(self, pieces: list[tuple[Text, Piece]]) -> None:
        self.metrics.generated_bytes.inc(sum(len(piece.data) for _, piece in pieces))
        for text, piece in pieces:
            if piece.end is not None and not text.cancelled:
                text.complete = True
                self.metrics.texts.labels(piece.end).inc()
            text.inbox(text.index, piece)

    def count(self, status: int) -> None:
        """One more request that was answered with that status."""
        self.metrics.requests.labels(str(status)).inc()

    def _answered(self, handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
        async def answer(request: Any) -> Any:
            try:
                response = await handler(request)
            except ApiError as error:
                response = self._json(error.status, error.body())
                if error.status == 429:
                    response.headers["Retry-After"] = "1"
                if error.status == 401:
                    response.headers["WWW-Authenticate"] = "Bearer"
                if error.status == 405:
                    response.headers["Allow"] = _method_of(request.url.path) or "GET"
            except Exception as error:
                response = self._json(500, _unexpected(error))
            self.count(response.status_code)
            return response

        return answer

    def _require_key(self, request: Any) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.encode(), self._key.encode())
        if self._key and not (scheme.lower() == "bearer" and right):
            message = "Authorization: send the key of this server as 'Bearer KEY'"
            raise ApiError(401, message, code="invalid_api_key")

    def _model_body(self) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "bytelm",
            "max_model_len": self.limits.capacity,
        }

    def _json(self, status: int, found: dict[str, Any]) -> Any:
        # In ASCII: what clients send may hold half a surrogate pair, which UTF-8 cannot.
        text = json.dumps(found, allow_nan=False, separators=(",", ":"))
        return self._responses.Response(text, status, media_type="application/json")


def _unexpected(error: Exception) -> dict[str, Any]:
    """The body of an answer to a fault of the server, which is logged."""
    logging.getLogger(__name__).error("a request failed", exc_info=error)
    return error_body(500, f"the server failed: {type(error).__name__}")


def _method_of(path: str) -> str | None:
    """The one method that an address takes; None for an address that is not served."""
    if path == "/v1/completions":
        return "POST"
    known = path in ("/v1/models", "/health", "/metrics") or path.startswith("/v1/models/")
    return "GET" if known else None


def _require_places(found: CompletionRequest, most: int) -> None:
    """Refuses what would not find place even if nobody else asked."""
    count = len(found.prompts) * found.n
    if count > most:
        field = "n" if found.n > 1 else "prompt"
        message = f"{field}: the request is for {count} texts; this server takes at most {most}"
        raise ApiError(400, message, field)


def _texts(found: CompletionRequest, inbox: asyncio.Queue) -> list[Text]:
    if found.settings.max_new_bytes == 0:
        return []
    put = lambda index, piece: inbox.put_nowait((index, piece))  # noqa: E731
    return [
        Text(
            number * found.n + sample,
            prompt,
            replace(found.settings, sample=sample),
            found.stop,
            put,
        )
        for number, prompt in enumerate(found.prompts)
        for sample in range(found.n)
    ]


async def _whole(request: Any, answer: Answer, parts: AsyncIterator) -> dict[str, Any] | None:
    """The whole answer; None, and nothing goes on, once the client has gone."""
    found = None

    async def collect() -> None:
        nonlocal found
        each: list[list[dict[str, Any]]] = [[] for _ in answer.choices]
        async for entries in parts:
            for entry in entries:
                each[entry["index"]].append(entry)
        found = answer.body(list(map(merged, each)), answer.usage)

    await _while_heard(request.receive, collect())
    return found


async def _while_heard(receive: Callable[[], Any], work: Coroutine[Any, Any, None]) -> None:
    """Does the work until it is done or the client has gone; raises what it raises."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, going = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([working, going], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, going):
            task.cancel()
        await asyncio.gather(working, going, return_exceptions=True)


async def _as_events(
    found: CompletionRequest, answer: Answer, parts: AsyncIterator
) -> AsyncIterator[bytes]:
    """A stream's bytes: one event for each choice that grows."""
    try:
        async for entries in parts:
            yield b"".join(answer.event([entry]) for entry in entries)
    except ApiError as error:
        yield event(error.body())
        return
    except Exception as error:
        yield event(_unexpected(error))
        return
    usage = answer.event([], answer.usage) if found.include_usage else b""
    yield usage + DONE


def _event_stream(base: Any) -> Callable[..., Any]:
    """A class of responses that stream events and tell when they end, in whatever way."""

    class EventStream(base):
        def __init__(self, content: AsyncIterator[bytes], ended: Callable[[], None]) -> None:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            super().__init__(content, headers=headers, media_type="text/event-stream")
            self._ended = ended

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await _while_heard(receive, self.stream_response(send))
            finally:
                self._ended()

    return EventStream
