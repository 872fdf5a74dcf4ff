"""`bytelm serve`: a page that generates text and shows the model's view of every byte.

`Service` holds all the logic and knows nothing of the page; `build_page` wraps it in Gradio, from
the extra `app`, which provides the queue: one request runs at a time, a bounded number wait in
order.
"""

import html
import importlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from bytelm.config import Recipe, require, require_positive
from bytelm.config.lfbyte import require_prediction
from bytelm.inspection import Inspection
from bytelm.sampling import SamplerConfig
from bytelm.serving.api import Api
from bytelm.serving.server import Server, own_names
from bytelm.tokenizer import ByteTokenizer, StreamingDecoder
from bytelm_jax.inference.generate import stream
from bytelm_jax.models import Params
from bytelm_jax.tools.inspection import characters, inspect, shade
from bytelm_jax.tools.server import PageGuard
from bytelm_jax.training.pretrained import model_of

SAMPLERS = ("greedy", "categorical", "entropy")
Number = int | float | None
"""The value of a number field; None if somebody cleared it."""

_CHUNK = 16  # bytes per device call: a reader sees this many appear at once
_SHADES = 16  # classes of the style sheet, two per bit


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


class Reply(NamedTuple):
    """The contents of the page: prompt and text so far, its coloured bytes, and a status line."""

    text: str
    cells: str
    status: str


class Service:
    """A model that answers one request at a time."""

    def __init__(self, recipe: Recipe, params: Params, limits: Limits):
        require_prediction(recipe.model)
        self.recipe, self.limits = recipe, limits
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
            yield Reply(text, "", clock.say())
            stopped = clock.running() > limits.seconds
            if stopped:
                break
        text += decoder.finish()
        status = clock.say()
        if stopped:
            status += f"; stopped after {limits.seconds:g} seconds"
        elif len(generated) < count:
            status += "; the model ended the text"
        if not data + generated:
            yield Reply("", "", status)
            return
        inspected = inspect(self._model, data + generated)
        status += f". {inspected.describe()}"
        yield Reply(text, paint_cells(inspected, len(data)), status)


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


def _number(name: str, value: Number) -> float:
    require(isinstance(value, int | float), f"{name}={value!r}: give a number")
    return float(value)  # type: ignore[arg-type]  (required to be a number)


def _whole(name: str, value: Number) -> int:
    number = _number(name, value)
    require(number.is_integer(), f"{name}={value}: give a whole number")
    return int(number)


# ---- coloured bytes -----------------------------------------------------------------------------


def style_sheet() -> str:
    """The colours of surprises, from 0 to 8 bits, and the marks of patches."""
    shades = [
        f".b{i}{{background:rgb({red},{green},{blue})}}"
        for i in range(_SHADES + 1)
        for red, green, blue in [shade(i / 2)]
    ]
    rules = [
        ".cells{font-family:monospace;line-height:1.9;overflow-wrap:anywhere;direction:ltr}",
        ".cells span{color:#000;padding:1px 0;unicode-bidi:isolate;white-space:pre}",
        ".cells .p{border-left:2px solid #333;margin-left:2px}",
        ".cells .o{text-decoration:underline}",
    ]
    return "\n".join([*rules, *shades])


def paint_cells(inspected: Inspection, prompt_bytes: int) -> str:
    """HTML with one span per byte: colour by surprise, both values on hover, a bar before a patch.

    A character is in the span of its first byte, with a dot in those of its other bytes; a byte
    that is not part of a character is escaped. Generated bytes are underlined.
    """
    spans = []
    for at, piece, character in characters(inspected.data):
        for offset, byte in enumerate(piece, at):
            bits, nats = float(inspected.surprise[offset]), float(inspected.entropy[offset])
            names = [f"b{min(max(round(2 * bits), 0), _SHADES)}"]
            names += ["p"] if inspected.starts is not None and inspected.starts[offset] else []
            names += ["o"] if offset >= prompt_bytes else []
            shown = _shown(character, byte) if offset == at else "·"
            tooltip = f"byte {byte:02x}, surprise {bits:.2f} bits, entropy {nats:.2f} bits"
            spans.append(f'<span class="{" ".join(names)}" title="{tooltip}">{shown}</span>')
        if character == "\n":
            spans.append("<br>")
    return f'<div class="cells">{"".join(spans)}</div>'


def _shown(character: str | None, byte: int) -> str:
    if character == "\n":
        return "⏎"
    if character is None or not character.isprintable():
        return f"\\x{byte:02x}"
    return html.escape(character)


# ---- the page -----------------------------------------------------------------------------------


def build_page(service: Service) -> Any:
    """The Gradio page of a service. Raises `ValueError` if Gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # otherwise it asks a server for its version
    try:
        gr: Any = importlib.import_module("gradio")
    except ImportError:
        raise ValueError("gradio: is not installed; pip install 'bytelm[app]'") from None
    limits, model = service.limits, service.recipe.model

    def answer(request: tuple[Any, ...]) -> Iterator[Reply]:
        try:
            yield from service.reply(*request)
        except ValueError as error:
            options = {"title": "Bad input", "duration": None, "print_exception": False}
            raise gr.Error(str(error), **options) from None

    # Gradio streams only genuine generator functions; the tests' type checks wrap `answer`.
    generate = lambda *request: (yield from answer(request))  # noqa: E731

    with gr.Blocks(title="bytelm", analytics_enabled=False) as page:
        size = f"{model.architecture}, {model.parameter_count():,} parameters"
        gr.Markdown(f"# bytelm: {service.recipe.name}\n{size}")
        with gr.Row():
            with gr.Column(scale=1):
                prompt = gr.Textbox(
                    label=f"Starting text, at most {limits.prompt_bytes:,} bytes", lines=4
                )
                inputs = [prompt, *_controls(gr, limits)]
                button = gr.Button("Generate", variant="primary")
            with gr.Column(scale=2):
                text = gr.Textbox(label="Text", lines=8, interactive=False)
                status = gr.Markdown()
                cells = gr.HTML(label="Bytes: hover for bits; a bar begins a patch")
        outputs = [text, cells, status]
        shared = {"concurrency_limit": 1, "concurrency_id": "model"}
        button.click(generate, inputs, outputs, api_name="generate", **shared)
        prompt.submit(generate, inputs, outputs, api_visibility="private", **shared)
    page.queue(max_size=limits.queue, default_concurrency_limit=1)
    return page


def _controls(gr: Any, limits: Limits) -> list[Any]:
    length = min(256, limits.new_bytes)
    return [
        gr.Number(length, label=f"Length in bytes, at most {limits.new_bytes:,}", precision=0),
        gr.Number(1.0, label="Temperature (0 is greedy)", step=0.1),
        gr.Number(0, label="Top-k (0 keeps all bytes)", precision=0),
        gr.Number(1.0, label="Top-p (1 keeps all bytes)", step=0.05),
        gr.Dropdown(list(SAMPLERS), value="categorical", label="Sampler"),
        gr.Number(0, label="Seed", precision=0),
    ]


def launch(page: Any, host: str, port: int, limits: Limits, api: Api | None = None) -> Server:
    """Starts the page in threads of this process; raises `OSError` if the port is taken.

    A page on this machine's own address answers to the names of this machine alone. `api` answers
    beside it.
    """
    gr: Any = importlib.import_module("gradio")
    fastapi: Any = importlib.import_module("fastapi")
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
        css=style_sheet(),
    )
    body_bytes = 8 * limits.prompt_bytes + 2**16  # a byte takes six characters as a JSON escape
    of_api = (0, None) if api is None else (api.limits.body_bytes, api.count)
    guard = PageGuard(mounted, own_names(host), set(page.fns), body_bytes, *of_api)
    return Server(guard, host, port)
