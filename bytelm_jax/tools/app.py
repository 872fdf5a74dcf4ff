"""`bytelm serve`: a page that generates text and shows the model's view of every byte.

`Service` holds all the logic and knows nothing of the page; `build_page` wraps it in Gradio, from
the extra `app`, which provides the queue: one request runs at a time, a bounded number wait in
order. `tools.cells` paints the bytes.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bytelm.config import Recipe, require, require_positive
from bytelm.config.lfbyte import require_prediction
from bytelm.extras import import_extra
from bytelm.sampling import SamplerConfig
from bytelm.serving.api import Api
from bytelm.serving.server import Server, own_names
from bytelm.tokenizer import ByteTokenizer, StreamingDecoder
from bytelm_jax.inference.generate import stream
from bytelm_jax.models import Params
from bytelm_jax.tools.cells import legend, paint_cells, style_sheet
from bytelm_jax.tools.inspection import inspect
from bytelm_jax.tools.server import PageGuard
from bytelm_jax.training.pretrained import model_of

SAMPLERS = ("greedy", "categorical", "entropy")
Number = int | float | None
"""The value of a number field; None if somebody cleared it."""

_CHUNK = 16  # bytes per device call: a reader sees this many appear at once


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of requests: `seconds` of generation, `queue` requests waiting."""

    prompt_bytes: int = 4096
    new_bytes: int = 1024
    seconds: float = 60.0
    queue: int = 128

    def __post_init__(self) -> None:
        require_positive(self, "prompt_bytes", "new_bytes", "queue")
        require(self.seconds > 0, f"seconds={self.seconds}: must be above 0")


class Unfinished(NamedTuple):
    """What there is of a text while it is generated: prompt and new bytes, and a status line."""

    data: bytes
    prompt_bytes: int
    status: str


class Reply(NamedTuple):
    """The contents of the page: prompt and text so far, its coloured bytes, and a status line."""

    text: str
    cells: str
    status: str
    unfinished: Unfinished | None = None
    """What `Service.finish` needs to end a text that is stopped here; None for the last reply."""


class Halt:
    """Whether the reader of one page wants no more of the text that is being generated."""

    asked = False

    def ask(self) -> None:
        """Ends the generation after the bytes that are being computed."""
        self.asked = True


class Service:
    """A model that answers one request at a time.

    Its limits are no more than what the model takes.
    """

    def __init__(self, recipe: Recipe, params: Params, limits: Limits):
        require_prediction(recipe.model)
        sizes = limits.prompt_bytes, limits.new_bytes
        prompt, new = (min(size, recipe.model.longest_input or size) for size in sizes)
        self.recipe, self.limits = recipe, replace(limits, prompt_bytes=prompt, new_bytes=new)
        self._model = model_of(recipe, params)
        self._tokenizer = ByteTokenizer(recipe.model.vocab)

    def reply(
        self,
        prompt: str | None,
        max_new_bytes: Number = 256,
        temperature: Number = 1.0,
        top_k: Number = 0,
        top_p: Number = 1.0,
        sampler: str | None = "categorical",
        seed: Number = 0,
    ) -> Iterator[Reply]:
        """Yields replies, each with more text than the last; the final one has coloured bytes.

        No text ends inside a character. Raises `ValueError` for an invalid request before anything
        runs. Generation stops after `limits.seconds`, counted from the first bytes on, so that
        compilation is not counted.
        """
        limits, vocab = self.limits, self.recipe.model.vocab
        data = self._tokenizer.to_bytes(self._tokenizer.encode(prompt or ""))
        capacity = limits.prompt_bytes
        require(len(data) <= capacity, f"starting text: {len(data):,} bytes; at most {capacity:,}")
        count = _whole("length", max_new_bytes)
        require(1 <= count <= limits.new_bytes, f"length={count}: from 1 to {limits.new_bytes:,}")
        known = ", ".join(SAMPLERS)
        require(sampler in SAMPLERS, f"sampler={sampler!r}: choose {known}")
        config = SamplerConfig(
            sampler=sampler,  # type: ignore[arg-type]  (one of them)
            temperature=_number("temperature", temperature),
            top_k=_whole("top-k", top_k),
            top_p=_number("top-p", top_p),
        )
        pieces = stream(self._model, data, count, config, _whole("seed", seed), chunk_bytes=_CHUNK)
        decoder, generated = StreamingDecoder(vocab), b""
        text = decoder.push(self._tokenizer.encode(data))
        clock, stopped = _Clock(), False
        for piece in pieces:
            generated += piece
            text += decoder.push(self._tokenizer.encode(piece))
            clock.count(len(piece))
            yield Reply(text, "", clock.say(), Unfinished(data + generated, len(data), clock.say()))
            stopped = clock.running() > limits.seconds
            if stopped:
                break
        status = clock.say()
        if stopped:
            status += f"; stopped after {limits.seconds:g} seconds"
        elif len(generated) < count:
            status += "; the model ended the text"
        yield self._last(Unfinished(data + generated, len(data), status))

    def finish(self, stopped: Unfinished) -> Reply:
        """The last reply of a text that its reader stopped: what there was of it, coloured."""
        return self._last(stopped._replace(status=_stopped(stopped)))

    def _last(self, ended: Unfinished) -> Reply:
        data, prompt_bytes, status = ended
        if not data:
            return Reply("", "", status)
        decoder = StreamingDecoder(self.recipe.model.vocab)
        text = decoder.push(self._tokenizer.encode(data)) + decoder.finish()
        inspected = inspect(self._model, data)
        painted = legend(inspected.starts is not None) + paint_cells(inspected, prompt_bytes)
        return Reply(text, painted, f"{status}. {inspected.describe()}")


class _Clock:
    """Bytes per second from the first piece on: the time before it is mostly compilation."""

    def __init__(self) -> None:
        self._began, self._first, self._bytes, self._counted = time.perf_counter(), 0.0, 0, 0
        self._last = self._began

    def count(self, size: int) -> None:
        self._last = time.perf_counter()
        if self._first:
            self._counted += size
        else:
            self._first = self._last
        self._bytes += size

    def running(self) -> float:
        return time.perf_counter() - self._first if self._first else 0.0

    def say(self) -> str:
        line = f"{self._bytes:,} bytes in {self._last - self._began:.2f} s"
        if not self._counted:
            return line
        rate = self._counted / max(self._last - self._first, 1e-9)
        return f"{line}, {rate:,.0f} bytes per second after the first"


def _stopped(text: Unfinished | None, status: str = "") -> str:
    """The status line once the reader has stopped a text; `status` if none is unfinished."""
    return status if text is None else f"{text.status}; stopped by you"


def _number(name: str, value: Number) -> float:
    require(isinstance(value, int | float), f"{name}={value!r}: give a number")
    return float(value)  # type: ignore[arg-type]  (required to be a number)


def _whole(name: str, value: Number) -> int:
    number = _number(name, value)
    require(number.is_integer(), f"{name}={value}: give a whole number")
    return int(number)


# ---- the page -----------------------------------------------------------------------------------


def build_page(service: Service) -> Any:
    """The Gradio page of a service. Raises `ValueError` if Gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # otherwise it asks a server for its version
    gr = import_extra("gradio", "app")
    with gr.Blocks(title="bytelm", analytics_enabled=False) as page:
        _connect(gr, service, _lay_out(gr, service))
    page.queue(max_size=service.limits.queue, default_concurrency_limit=1)
    return page


class _Parts(NamedTuple):
    """The components of the page."""

    prompt: Any
    settings: list[Any]
    buttons: list[Any]
    text: Any
    cells: Any
    status: Any


def _lay_out(gr: Any, service: Service) -> _Parts:
    """Three areas in the order of a phone; a wide screen has the settings below the prompt."""
    limits, model = service.limits, service.recipe.model
    size = f"{model.architecture}, {model.parameter_count():,} parameters"
    gr.Markdown(f"# bytelm: {service.recipe.name}\n{size}")
    with gr.Row(elem_id="sheet"):
        with gr.Column(elem_id="ask"):
            label = f"Starting text, at most {limits.prompt_bytes:,} bytes"
            prompt = gr.Textbox(label=label, lines=4, buttons=[])
            with gr.Row(elem_id="buttons"):
                buttons = [
                    gr.Button("Generate", variant="primary", min_width=80),
                    gr.Button("Stop", variant="stop", min_width=60),
                    gr.Button("Clear", min_width=60),
                ]
        with gr.Column(elem_id="out"):
            text = gr.Textbox(label="Text", lines=8, interactive=False, buttons=[])
            with gr.Row(elem_id="below"):
                status = gr.Markdown(label="Status", elem_id="status", min_height=24)
                buttons.append(gr.Button("Copy", size="sm", min_width=80, scale=0))
            cells = gr.HTML(label="Cells")
        with gr.Column(elem_id="settings"):
            settings = _controls(gr, limits)
    return _Parts(prompt, settings, buttons, text, cells, status)


def _connect(gr: Any, service: Service, parts: _Parts) -> None:
    """What the buttons do. Stop and Clear end what runs or waits; neither waits for the model."""

    def answer(halt: Halt, *request: Any) -> Iterator[Reply]:
        halt.asked = False
        try:
            for reply in service.reply(*request):
                if halt.asked:
                    return
                yield reply
        except ValueError as error:
            options = {"title": "Bad input", "duration": None, "print_exception": False}
            raise gr.Error(str(error), **options) from None

    # Gradio streams only genuine generator functions, and the tests' type checks wrap `answer`;
    # clients of Gradio know the arguments by these names.
    generate = lambda prompt, max_new_bytes, temperature, top_k, top_p, sampler, seed, halt: (  # noqa: E731
        yield from answer(  # type: ignore[misc]  (a generator, whatever a lambda should return)
            halt, prompt, max_new_bytes, temperature, top_k, top_p, sampler, seed
        )
    )
    prompt, settings, (start, stop, clear, copy), text, cells, status = parts
    unfinished, halt = gr.State(None), gr.State(Halt())
    outputs = [text, cells, status, unfinished]
    model = {"concurrency_limit": 1, "concurrency_id": "model"}
    private = {"api_visibility": "private"}
    at_once = {"concurrency_limit": None, "show_progress": "hidden", **private}
    running = gr.on(
        [start.click, prompt.submit],
        generate,
        [prompt, *settings, halt],
        outputs,
        api_name="generate",
        show_progress="minimal",
        show_progress_on=status,  # alone: otherwise every output repeats an error
        **model,
    )

    def finish(stopped: Unfinished | None) -> Any:
        return [gr.skip()] * 4 if stopped is None else list(service.finish(stopped))

    # Gradio's own way to cancel takes what waits in the queue; it does not end a busy generator.
    ended = stop.click(Halt.ask, halt, None, cancels=[running], **at_once)
    # A request that waited says no more that it waits; `finish` itself waits for the model.
    ended = ended.then(_stopped, [unfinished, status], status, **at_once)
    ended.then(finish, unfinished, outputs, show_progress="hidden", **private, **model)
    ended = clear.click(Halt.ask, halt, None, cancels=[running], **at_once)
    ended.then(lambda: ("", "", "", "", None), None, [prompt, *outputs], **at_once)
    copied = copy.click(None, text, copy, js=_COPY, **private)
    copied.then(None, None, copy, js=_COPY_AGAIN, **private)
    _switch(gr, settings)


def _switch(gr: Any, settings: list[Any]) -> None:
    """Switches off the settings that the others make ineffective, in the browser."""
    _, temperature, top_k, top_p, sampler, seed = settings
    gr.on(
        [sampler.change, temperature.change],
        None,
        [sampler, temperature],
        [temperature, top_k, top_p, seed],
        js=_SWITCH,
        api_visibility="private",
    )


_SWITCH = """(sampler, temperature) => {
    const greedy = sampler === "greedy", sure = greedy || temperature === 0;
    const set = (off) => ({__type__: "update", interactive: !off});
    return [set(greedy), set(sure), set(sure), set(sure)];
}"""
"""Switches off what the sampler ignores: greedy ignores all four, temperature 0 all but itself."""

_COPY = """async (text) => {
    try {
        await navigator.clipboard.writeText(text);
    } catch {  // not over plain HTTP from another machine
        const box = document.createElement("textarea");
        box.value = text;
        document.body.append(box);
        box.select();
        const done = document.execCommand("copy");
        box.remove();
        if (!done) return "Not copied";
    }
    return "Copied";
}"""

_COPY_AGAIN = '() => new Promise((done) => setTimeout(() => done("Copy"), 2000))'

_LAYOUT = """
#sheet{display:grid;gap:16px;grid-template:"ask out" auto "settings out" 1fr / 1fr 2fr}
#ask{grid-area:ask} #out{grid-area:out} #settings{grid-area:settings}
#sheet>*{min-width:0}
#buttons,#below{flex-wrap:nowrap;align-items:center}
#status .error,#status .clear-status{display:none}
#out .html-container{padding:0}
#settings input:disabled{opacity:.45;cursor:not-allowed}
@media (max-width:700px){#sheet{grid-template:"ask" "out" "settings" / 1fr}}
"""


def _controls(gr: Any, limits: Limits) -> list[Any]:
    length = min(256, limits.new_bytes)
    return [
        gr.Number(length, label=f"Length in bytes, at most {limits.new_bytes:,}"),
        gr.Number(1.0, label="Temperature (0 is greedy)", step=0.1),
        gr.Number(0, label="Top-k (0 keeps all bytes)"),
        gr.Number(1.0, label="Top-p (1 keeps all bytes)", step=0.05),
        gr.Dropdown(list(SAMPLERS), value="categorical", label="Sampler"),
        gr.Number(0, label="Seed"),
    ]


def launch(page: Any, host: str, port: int, limits: Limits, api: Api | None = None) -> Server:
    """Starts the page in threads of this process; raises `OSError` if the port is taken.

    A page on this machine's own address answers to the names of this machine alone. `api` answers
    beside it.
    """
    gr, fastapi = import_extra("gradio", "app"), import_extra("fastapi", "app")
    local_fonts = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    mounted = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None) if api is None else api.app(),
        page,
        path="/",
        server_name=host,
        server_port=port,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        theme=local_fonts,
        css=_LAYOUT + style_sheet(),
    )
    body_bytes = 8 * limits.prompt_bytes + 2**16  # a byte takes six characters as a JSON escape
    functions = {number for number, one in page.fns.items() if one.fn}  # not those of the browser
    of_api = (0, None) if api is None else (api.limits.body_bytes, api.count)
    guard = PageGuard(mounted, own_names(host), functions, body_bytes, *of_api)
    return Server(guard, host, port)
