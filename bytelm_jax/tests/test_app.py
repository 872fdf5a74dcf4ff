"""The page: its logic without one, and the page itself in a browser that nobody sees."""

import ast
import asyncio
import contextlib
import gc
import html
import http.client
import itertools
import json
import re
import shutil
import socket
import sys
import time
import urllib.request
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bytelm.config import LFByteConfig, MegabyteConfig, Recipe
from bytelm.sampling import SamplerConfig
from bytelm.serving import command, server
from bytelm_jax.cli import main as cli
from bytelm_jax.inference.generate import generate
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.tools import app, cells
from bytelm_jax.tools.inspection import Inspection
from bytelm_jax.training import checkpoint

# Libraries that a page needs warn of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = MegabyteConfig(
    patch_size=4, global_dim=8, local_dim=16, max_length=64,
    global_layers=1, local_layers=1, global_heads=2, local_heads=2,
)  # fmt: skip
RECIPE = Recipe(name="tiny", model=MODEL)
LIMITS = app.Limits(prompt_bytes=40, new_bytes=48, queue=4)


@pytest.fixture(scope="module")
def params():
    source = np.random.default_rng(1)
    shapes = abstract_params(MODEL).items()
    return {k: jnp.asarray(source.normal(0, 0.3, v.shape), v.dtype) for k, v in shapes}


@pytest.fixture(scope="module")
def service(params):
    return app.Service(RECIPE, params, LIMITS)


def bare(cells):
    """The bytes of the cells, by their hovers, and which of them start patches or are new."""
    spans = re.findall(r'<span class="([^"]*)" title="byte (..), ([^"]*)">', cells)
    data = bytes(int(byte, 16) for _, byte, _ in spans)
    marks = [
        "".join(name for name in ("p", "o") if name in classes.split()) for classes, *_ in spans
    ]
    return data, marks, [tooltip for *_, tooltip in spans]


@pytest.mark.parametrize(
    "prompt",
    ["", "def ", "é🎉", "שלום مرحبا", "\x00\x1b[31m\x7f", "\udcff\udc80", "\ud800", "<b>&\n\n"],
)
def test_replies_grow_by_whole_characters_to_what_generate_gives(service, params, prompt):
    replies = list(service.reply(prompt, 24, seed=3))
    # Invalid bytes are U+FFFD at once; what is sent is never taken back.
    for before, after in itertools.pairwise(replies):
        assert after.text.startswith(before.text)
    data = service._tokenizer.to_bytes(service._tokenizer.encode(prompt))
    (new,) = generate(define_model(MODEL)[0](params), [data], 24, SamplerConfig(), seed=3)
    assert replies[-1].text == (data + new).decode("utf-8", "replace")
    shown, marks, tooltips = bare(replies[-1].cells)
    assert shown == data + new
    assert ["o" in mark for mark in marks] == [at >= len(data) for at in range(len(shown))]
    assert ["p" in mark for mark in marks] == [at % 4 == 0 for at in range(len(shown))]
    assert all(re.fullmatch(r"surprise [\d.]+ bits, entropy [\d.]+ bits", one) for one in tooltips)
    assert f"{len(new)} bytes in" in replies[-1].status and len(new) == 24
    assert "bytes per second after the first" in replies[-1].status
    assert len(replies) >= 3  # two pieces and the cells


def test_the_same_seed_gives_the_same_text_and_another_another(service):
    first, again, other = (list(service.reply("a", 24, seed=s))[-1] for s in (1, 1, 2))
    assert first.text == again.text != other.text


def test_a_text_that_its_reader_stops_keeps_what_there_was_of_it(service):
    whole = list(service.reply("é ", 40, seed=5))
    assert whole[-1].unfinished is None
    stopped = service.finish(whole[1].unfinished)
    assert whole[1].text and stopped.text.startswith(whole[1].text) and not stopped.unfinished
    shown, marks, _ = bare(stopped.cells)
    assert len(shown) < 43 and bare(whole[-1].cells)[0].startswith(shown)
    assert ["o" in mark for mark in marks] == [at >= 3 for at in range(len(shown))]
    assert "stopped by you" in stopped.status


@pytest.mark.parametrize(
    "request_, says",
    [
        (("é" * 21,), "starting text: 42 bytes; at most 40"),
        (("a", 0), "length=0: from 1 to 48"),
        (("a", 49), "length=49: from 1 to 48"),
        (("a", None), "length=None: give a number"),
        (("a", 1.5), "length=1.5: give a whole number"),
        (("x" * 40, 48), "this model has max_length=64"),
        (("a", 8, -1.0), "temperature=-1.0"),
        (("a", 8, float("nan")), "temperature=nan"),
        (("a", 8, 1.0, -2), "top_k=-2"),
        (("a", 8, 1.0, 0, 1.5), "top_p=1.5"),
        (("a", 8, 1.0, 0, 1.0, "best"), "sampler='best': choose greedy"),
        (("a", 8, 1.0, 0, 1.0, None), "sampler=None: choose greedy"),
        (("a", 8, 1.0, 0, 1.0, "greedy", -1), "seed=-1"),
        (("a", 8, 1.0, 0, 1.0, "greedy", float("inf")), "seed=inf: give a whole number"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_one_line(service, request_, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        next(service.reply(*request_))
    assert "\n" not in str(caught.value)


def test_generation_stops_when_its_time_is_over(service, params):
    limits = replace(LIMITS, seconds=1e-9)
    replies = list(app.Service(RECIPE, params, limits).reply("a", 48))
    status = replies[-1].status
    assert "15 bytes in" in status and "stopped after 1e-09 seconds" in status
    assert len(bare(replies[-1].cells)[0]) == 16  # four rounds of four


def test_cells_as_literals():
    surprise = np.array([0.0, 2.0, 8.0, 20.0, 1.0, 0.5], np.float32)
    starts = np.array([True, False, True, False, False, False])
    data = "<é\n".encode() + b"\xff\x00"
    inspected = Inspection(data, surprise, surprise / 2, starts, "patcher space")
    inside = re.fullmatch(r'<div class="cells">(.*)</div>', cells.paint_cells(inspected, 2))
    assert inside
    shown = re.findall(r'<span class="([^"]*)" title="[^"]*">(.*?)</span>', inside[1])
    assert [(names, html.unescape(text)) for names, text in shown] == [
        ("b0 p", "<"),
        ("b4", "é"),
        ("b16 p o", "·"),
        ("b16 o", "⏎"),
        ("b2 o", "\\xff"),
        ("b1 o", "\\x00"),
    ]
    assert inside[1].count("<br>") == 1
    assert 'title="byte c3, surprise 2.00 bits, entropy 1.00 bits"' in inside[1]
    assert ".b0{background:rgb(255,255,217);color:#000}" in cells.style_sheet()
    assert ".b16{background:rgb(8,29,88);color:#fff}" in cells.style_sheet()


def test_colours_can_be_told_apart_without_hue_and_text_can_be_read_on_them():
    light = [cells.luminance(cells.shade(i / 2)) for i in range(17)]
    assert all(before > after for before, after in itertools.pairwise(light))
    for level in light:
        ink = {"#000": 0.0, "#fff": 1.0}[cells.ink(cells.shade(light.index(level) / 2))]
        low, high = sorted((level, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG's level AA
    assert cells.shade(-1.0) == cells.shade(0.0) and cells.shade(float("inf")) == cells.shade(8.0)


def test_the_legend_explains_bars_only_where_there_are_patches():
    assert "a patch begins" in cells.legend(True) and "a patch begins" not in cells.legend(False)
    assert all(f'<i class="b{2 * bits}">{bits}' in cells.legend(False) for bits in range(9))


def test_who_reaches_an_address():
    assert all(server.is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"))
    assert not any(server.is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.7", "example"))


def test_models_that_see_their_bytes_are_not_served():
    with pytest.raises(ValueError, match=r"model.causal=False"):
        app.Service(Recipe(name="sees", model=LFByteConfig(causal=False)), {}, LIMITS)
    with pytest.raises(ValueError, match=r"seconds=0\.0: must be above 0"):
        app.Limits(seconds=0.0)


@pytest.fixture(scope="module")
def page(service, request):
    """The address of a page, made where proxies are set and no name can be looked up."""
    pytest.importorskip("gradio", reason="needs the extra app")
    here, look_up = {"127.0.0.1", "localhost", "::1", None}, socket.getaddrinfo

    def look_up_nothing(host, *rest, **options):
        assert host in here, f"{host} was looked up"
        return look_up(host, *rest, **options)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore", ResourceWarning)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        patch.setattr(socket, "getaddrinfo", look_up_nothing)
        server = app.launch(app.build_page(service), "127.0.0.1", 0, service.limits)
        request.addfinalizer(server.close)
        asyncio.set_event_loop(None)  # Gradio makes loops for this thread, and leaves them open
        gc.collect()
    return server.address.rstrip("/")


def test_requests_at_once_are_answered_in_order_and_refusals_are_shown(page):
    client_of = pytest.importorskip("gradio_client", reason="needs the extra app")
    client = client_of.Client(page, verbose=False)
    jobs = [
        client.submit(prompt=f"{i} ", max_new_bytes=24, seed=i, api_name="/generate")
        for i in range(4)
    ]
    answers = [job.result(timeout=120) for job in jobs]
    assert [text[:2] for text, _, _ in answers] == [f"{i} " for i in range(4)]
    assert [len(bare(cells)[0]) for _, cells, _ in answers] == [26] * 4
    (described,) = client.view_api(return_format="dict")["named_endpoints"].values()
    names = [one["parameter_name"] for one in described["parameters"]]
    assert names == ["prompt", "max_new_bytes", "temperature", "top_k", "top_p", "sampler", "seed"]
    for asked, says in ((("x" * 50,), "text: 50 bytes; at most 40"), (("x", 1.5), "whole number")):
        with pytest.raises(Exception, match=says):
            client.predict(*asked, api_name="/generate")


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("GET", "/", {}, None, 200),
        ("GET", "/", {"Host": "evil.example"}, None, 421),
        ("GET", "/", {"Host": "localhost:1"}, None, 200),
        ("POST", "/gradio_api/queue/join", {"Origin": "http://evil.example"}, b"{}", 403),
        ("POST", "/gradio_api/queue/join", {"Origin": "null"}, b"{}", 403),
        ("POST", "/gradio_api/upload", {}, b"file", 403),
        ("POST", "/gradio_api/run/generate", {}, b'{"data": []}', 403),
        ("POST", "/gradio_api/api/generate", {}, b'{"data": []}', 403),
        ("POST", "/gradio_api/queue/join", {}, b'{"fn_index": 999, "data": []}', 400),
        ("POST", "/gradio_api/queue/join", {}, b'{"fn_index": SCRIPT, "data": []}', 400),
        ("POST", "/gradio_api/queue/join", {}, b"[" * 50_000, 400),
        ("POST", "/gradio_api/queue/join", {}, b" " * 200_000, 413),
    ],
)
def test_what_the_page_does_not_need_is_refused(page, method, path, headers, body, status):
    if body and b"SCRIPT" in body:  # the number of a function that runs in the browser alone
        with urllib.request.urlopen(f"{page}/config", timeout=30) as config:
            functions = json.load(config)["dependencies"]
        body = body.replace(
            b"SCRIPT", b"%d" % next(x["id"] for x in functions if not x["backend_fn"])
        )
    connection = http.client.HTTPConnection(page.removeprefix("http://"), timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
    assert answer.status == status, text
    assert status == 200 or text.count(b"\n") == 1


def test_requests_that_never_end_are_closed(page, monkeypatch):
    monkeypatch.setattr(server, "_SECONDS", 0.2)
    host, port = page.removeprefix("http://").split(":")
    head = f"POST /gradio_api/queue/join HTTP/1.1\r\nHost: {host}\r\n"
    for part in ("", "GET / HT", head, f"{head}Content-Length: 9\r\n\r\n{{"):
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(part.encode())
            answer = b"".join(iter(lambda: slow.recv(4096), b""))  # until the server closes
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408"), answer


@contextlib.contextmanager
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if binary is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


def generate_in(tab, text, length=24):
    tab.get_by_label("Starting text").fill(text)
    tab.get_by_label("Length in bytes").fill(str(length))
    tab.get_by_role("button", name="Generate").click()


def text_of(tab):
    return tab.get_by_label("Text", exact=True).input_value()


def test_the_page_in_a_browser(page, tmp_path):
    with chromium() as browser:
        users = [browser.new_page(viewport={"width": 1280, "height": 900}) for _ in range(2)]
        foreign = []
        for number, tab in enumerate(users):
            tab.on("request", lambda sent: foreign.append(sent.url))
            tab.goto(page)
            tab.get_by_label("Seed").fill(str(number))
        for number, tab in enumerate(users):  # at once
            generate_in(tab, f"user {number} é ")
        for number, tab in enumerate(users):
            tab.wait_for_selector(".cells", timeout=60_000)
            data, marks, _ = bare(tab.inner_html(".cells"))
            assert data.startswith(f"user {number} é ".encode()) and len(data) == 34
            assert ["p" in mark for mark in marks] == [at % 4 == 0 for at in range(34)]
            (names,) = {
                one for one in tab.get_attribute(".cells span", "class").split() if one != "p"
            }
            style = "([part, of]) => getComputedStyle(document.querySelector('.p'), part)[of]"
            colour = tab.evaluate(style, [None, "backgroundColor"])
            assert colour == "rgb({}, {}, {})".format(*cells.shade(int(names[1:]) / 2))
            assert tab.evaluate(style, ["::before", "width"]) == "2px"  # the bar
            assert text_of(tab).startswith(f"user {number} é ")
            assert "bits of surprise a byte" in tab.inner_text("body")
            assert "a patch begins" in tab.inner_text(".legend")
        users[0].screenshot(path=tmp_path / "page.png", full_page=True)
        tab = users[1]
        generate_in(tab, "x" * 50)
        says = tab.get_by_text("starting text: 50 bytes; at most 40")
        says.first.wait_for(timeout=60_000)
        tab.wait_for_timeout(500)  # until it has slid in
        tab.screenshot(path=tmp_path / "refused.png")
        assert sum(one.is_visible() for one in tab.get_by_text("Error", exact=True).all()) == 1
        for user in users:
            user.close()
        local = (page, f"ws{page[4:]}", "data:", "blob:")
        assert foreign and not [url for url in foreign if not url.startswith(local)]


def test_stop_keeps_the_text_and_clear_removes_it(page, monkeypatch):
    with chromium() as browser:
        quick = app.stream

        def slow(*request, **options):
            for piece in quick(*request, **options):
                yield piece
                time.sleep(0.7)

        monkeypatch.setattr(app, "stream", slow)
        tab = browser.new_page()
        tab.goto(page)
        area = "document.querySelector('#out textarea').value"
        for button in ("Stop", "Clear"):
            generate_in(tab, "ab", 48)
            tab.wait_for_function(f"() => {area} && !document.querySelector('.cells')")
            tab.locator("#buttons").get_by_role("button", name=button).click()
            if button == "Stop":
                tab.wait_for_timeout(1000)
                soon = text_of(tab)
                tab.wait_for_selector(".cells", timeout=60_000)
                assert text_of(tab) == soon and "stopped by you" in tab.inner_text("#status")
                shown = bare(tab.inner_html(".cells"))[0]
                assert shown.startswith(b"ab") and 2 < len(shown) < 50
                tab.locator("#buttons").get_by_role("button", name=button).click()
                tab.wait_for_timeout(500)  # nothing is left to stop
                assert "stopped by you" in tab.inner_text("#status")
            else:
                tab.wait_for_function(f"() => !{area}")
                tab.wait_for_timeout(1500)  # two more pieces, if it went on
                assert text_of(tab) == tab.inner_text("#status").strip() == ""
                assert tab.locator(".cells").count() == 0
        assert tab.get_by_label("Starting text").input_value() == ""
        monkeypatch.setattr(app, "stream", quick)
        generate_in(tab, "again")  # what was stopped leaves nothing behind
        tab.wait_for_selector(".cells", timeout=60_000)
        assert len(bare(tab.inner_html(".cells"))[0]) == 29
        tab.close()


def test_settings_without_an_effect_are_off_and_generate_is_above_them(page):
    with chromium() as browser:
        context = browser.new_context(
            viewport={"width": 390, "height": 844},
            permissions=["clipboard-read", "clipboard-write"],
        )
        tab = context.new_page()
        tab.goto(page)
        names = ["Temperature", "Top-k", "Top-p", "Seed", "Length in bytes"]

        def wait_for(*off):
            for name in names:
                state = ":disabled" if name in off else ":enabled"
                tab.locator(f"#settings input[aria-label^='{name}']{state}").wait_for()

        wait_for()
        tab.get_by_label("Temperature").fill("0")
        wait_for("Top-k", "Top-p", "Seed")
        tab.get_by_label("Temperature").fill("1")
        for sampler, off in (("greedy", names[:4]), ("entropy", [])):
            tab.get_by_label("Sampler").click()
            tab.get_by_role("option", name=sampler).click()
            wait_for(*off)
        generate_in(tab, "<copied>")
        tab.wait_for_selector(".cells", timeout=60_000)
        tab.get_by_role("button", name="Copy").click()
        tab.get_by_role("button", name="Copied").wait_for()
        assert tab.evaluate("() => navigator.clipboard.readText()") == text_of(tab) != ""
        heights = [
            one.bounding_box()["y"]
            for one in (
                tab.get_by_role("button", name="Generate"),
                tab.get_by_label("Text", exact=True),
                tab.get_by_label("Length in bytes"),
            )
        ]
        assert heights == sorted(heights)
        assert tab.evaluate("() => document.documentElement.scrollWidth") == 390
        context.close()


def test_the_command(params, tmp_path, capsys, monkeypatch):
    pytest.importorskip("gradio", reason="needs the extra app")
    checkpoint.create_run(tmp_path / "run", RECIPE, params)
    asked = []

    stub = SimpleNamespace(address="http://somewhere/", close=lambda: asked.append("closed"))

    def launch(page, host, port, limits):
        asked.append((host, port))
        return stub

    monkeypatch.setattr(app, "build_page", lambda service: asked.append(service.limits))
    monkeypatch.setattr(app, "launch", launch)
    monkeypatch.setattr(command, "require_address", lambda *_: None)  # somebody may be using it
    monkeypatch.setattr(command, "wait_for_interrupt", lambda: asked.append("waited"))
    assert cli.main(["serve", str(tmp_path / "run")]) == 0
    limits = app.Limits(prompt_bytes=64, new_bytes=64)  # what the model takes
    assert asked == [limits, ("127.0.0.1", 7860), "waited", "closed"]
    assert "note:" not in capsys.readouterr().out
    argv = ["serve", str(tmp_path / "run"), "--host", "0.0.0.0", "--queue", "2"]
    assert cli.main(argv) == 0
    assert "note: whoever reaches http://somewhere/ can use this page" in capsys.readouterr().out
    assert asked[4:] == [replace(limits, queue=2), ("0.0.0.0", 7860), "waited", "closed"]
    run = str(tmp_path / "run")
    for argv, says in (
        ([str(tmp_path)], "no config.json there"),
        ([run, "--queue", "0"], "--queue 0: must be from 1 to"),
        ([run, "--no-page"], "--no-page: leaves nothing to serve; add --api"),
        ([run, "--api", "--slots", "0"], "--slots 0: must be from 1 to 4096"),
        ([run, "--api-key", "k"], "--api-key: is for --api"),
        ([run, "--api", "--api-key", "k"], "--api-key: guards the API and not the page"),
        ([run, "--api", "--no-page", "--api-key", "é"], "--api-key: must be printable ASCII"),
    ):
        assert cli.main(["serve", *argv]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("with_page", [True, False])
def test_the_command_with_an_api(params, tmp_path, capsys, monkeypatch, with_page):
    """One address answers programs and, if wanted, people."""
    for extra in ("gradio", "prometheus_client"):
        pytest.importorskip(extra, reason="needs the extras api and app")
    checkpoint.create_run(tmp_path / "run", RECIPE, params)
    seen = {}

    def visit():
        address = re.findall(r"at http://(\S+)/ until", capsys.readouterr().out)[0]
        for method, path, body in (
            ("GET", "/", None),
            ("POST", "/v1/completions", b'{"model": "run", "prompt": "a", "max_tokens": 5}'),
            ("GET", "/v1/models", None),
        ):
            connection = http.client.HTTPConnection(address, timeout=60)
            connection.request(method, path, body, {"Authorization": "Bearer k"})
            answer = connection.getresponse()
            seen[path] = answer.status, answer.read()
            connection.close()

    monkeypatch.setattr(command, "wait_for_interrupt", visit)
    argv = ["serve", str(tmp_path / "run"), "--api", "--port", "0", "--slots", "1"]
    argv += ["--max-prompt-bytes", "20", "--max-new-bytes", "20"]
    assert cli.main([*argv, *([] if with_page else ["--no-page", "--api-key", "k"])]) == 0
    asyncio.set_event_loop(None)  # Gradio makes loops for this thread, and leaves them open
    gc.collect()
    assert seen["/"][0] == (200 if with_page else 404)
    assert seen["/v1/completions"][0] == 200 and b'"finish_reason"' in seen["/v1/completions"][1]
    assert b'"id":"run"' in seen["/v1/models"][1]


def test_a_page_needs_gradio(service, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match="pip install 'bytelm\\[app\\]'"):
        app.build_page(service)


def test_heavy_packages_wait_until_they_are_needed():
    heavy = {"gradio", "matplotlib", "tensorboard", "tensorboardX", "wandb", "pandas", "playwright"}
    for path in Path(app.__file__).parent.rglob("*.py"):
        if "tests" in path.parts:
            continue
        for node in ast.parse(path.read_text("utf-8")).body:  # what runs as the module is imported
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not heavy & {name.split(".")[0] for name in names}, path
