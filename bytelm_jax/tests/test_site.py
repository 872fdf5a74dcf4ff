"""What the site is made from: generated reference pages, drawings, executed tutorials, examples.

`scripts/docs` builds it.
"""

import ast
import doctest
import http.server
import importlib
import json
import re
import socket
import sys
import threading
from dataclasses import fields
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

from bytelm.config import MODEL_CONFIGS, OPTIMIZER_CONFIGS
from bytelm_jax.cli import main as cli

ROOT = Path(__file__).parents[2]


def load(path: str):
    """The module in a file of the repository that is in no package."""
    loader = SourceFileLoader(path.replace("/", "_").removesuffix(".py"), str(ROOT / path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference():
    return load("docs/generate_reference.py")


def test_every_command_and_option_is_explained(reference):
    page = reference.commands_page()
    for name in cli.COMMANDS:
        assert f"\n## bytelm {name}\n" in page
    rows = re.findall(r"^\| (`[-A-Z].*?) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 80
    assert not [option for option, _, meaning in rows if not meaning.strip()]


def test_every_field_of_a_configuration_is_listed(reference):
    page = reference.configuration_page()
    for kind in (*MODEL_CONFIGS, *OPTIMIZER_CONFIGS.values()):
        section = page.split(f"\n## {kind.__name__}\n")[1].split("\n## ")[0]
        for field in fields(kind):
            assert not field.init or f"\n| `{field.name}` |" in section, (kind, field.name)


def test_every_public_name_is_in_the_reference(reference):
    import bytelm_jax
    import bytelm_torch

    page = reference.api_page()
    for package in (bytelm_jax, bytelm_torch):
        for name in package.__all__:
            assert re.search(rf":: \w+\.(\w+\.)?{name}\n", page), name


def test_the_drawings_are_those_of_the_code():
    for draw in load("scripts/figures").DRAWINGS:
        path = ROOT / "docs" / "figures" / f"{draw.__name__}.svg"
        assert path.read_text("utf-8") == draw().svg(), f"{path.name}: run scripts/figures"


def test_the_tutorials_are_those_that_were_executed(tmp_path, monkeypatch):
    notebooks = load("docs/notebooks.py")
    assert not notebooks.stale()
    ordered = {f"tutorial-{name}.md" for name in notebooks.ORDER}
    assert ordered == {page.name for page in (ROOT / "docs").glob("tutorial-*.md")}
    head, cell = "---\nfile_format: mystnb\n---\n", "```{code-cell}\n:tags: [x]\n\nprint(1)\n```\n"
    (tmp_path / "tutorial-train.md").write_text(f"{head}# Page\n{cell}text\n{cell}")
    cells = [{"source": ["print(1)"]}, {"source": ["print(1)"]}]
    (tmp_path / "tutorial-train.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.setattr(notebooks, "DOCS", tmp_path)
    monkeypatch.setattr(notebooks, "EXECUTED", tmp_path)
    monkeypatch.setattr(notebooks, "ORDER", ("train",))
    assert not notebooks.stale()
    (tmp_path / "tutorial-train.ipynb").write_text(json.dumps({"cells": cells[:1]}))
    hint = "its cells differ from those executed; run scripts/docs --execute tutorial-train"
    assert notebooks.stale() == [f"docs/tutorial-train.md: {hint}"]
    bar = "\x1b[32mstep 1\x1b[0m\r\x1b[2Kvalidation\nstep 2\r"
    assert notebooks.shown(bar) == "validation\n"


@pytest.mark.parametrize("package", ["bytelm", "bytelm_jax", "bytelm_torch"])
def test_the_examples_in_docstrings_run(package):
    attempted = 0
    for file in sorted((ROOT / package).rglob("*.py")):
        if ">>>" not in file.read_text("utf-8") or "tests" in file.parts:
            continue
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        importlib.import_module(name)
        result = doctest.testmod(sys.modules[name])
        assert not result.failed, name
        attempted += result.attempted
    assert attempted >= 5


def test_every_command_that_is_not_run_has_a_reason_that_applies():
    commands = load("docs/run_commands.py")
    lines = [
        line for page in commands.pages() for kind, line in commands.blocks(page) if kind == "bash"
    ]
    for pattern in commands.NOT_RUN:
        assert any(re.search(pattern, line) for line in lines), pattern
    assert sum(not commands.reason(line) for line in lines) > 100


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers with the status that the path names."""

    def do_GET(self):
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, format, *args):
        pass


def test_an_address_that_cannot_be_reached_is_not_called_broken(tmp_path, capsys):
    links = load("docs/check_links.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    page = tmp_path / "page.md"
    page.write_text(f"[a]({here}/200#part) [b]({here}/503) [c]({closed})\n")
    try:
        assert links.main([str(page)]) == 0
        output = capsys.readouterr().out
        assert f"unreachable: {here}/503 (status 503; in page.md)" in output
        assert f"unreachable: {closed} (" in output
        assert output.endswith("1 ok, 0 broken, 2 unreachable\n")
        page.write_text(f"[a]({here}/200) <{here}/404>\n")
        assert links.main([str(page)]) == 1
        assert f"broken: {here}/404 (status 404; in page.md)" in capsys.readouterr().out
    finally:
        server.shutdown()
        server.server_close()


def test_every_error_message_of_the_guide_is_one_of_the_code():
    constants = set()
    for package in ("bytelm", "bytelm_jax", "bytelm_torch"):
        for file in (ROOT / package).rglob("*.py"):
            if "tests" not in file.parts:
                nodes = ast.walk(ast.parse(file.read_text("utf-8")))
                values = (node.value for node in nodes if isinstance(node, ast.Constant))
                constants |= {" ".join(v.split()) for v in values if isinstance(v, str)}
    page = (ROOT / "docs" / "faq.md").read_text("utf-8").split("## Error messages")[1]
    messages = re.findall(r"^\| (``?)(.*?)\1(?: \(|,| \|)", page, re.MULTILINE)
    assert len(messages) > 50
    for _, message in messages:
        parts = [part.strip() for part in re.split(r"…|\S*[=:'\d]\S*", message)]
        told = [text for text in constants if len(text) >= 10 and " " in text and text in message]
        told += [part for part in parts if len(part) >= 10 and any(part in c for c in constants)]
        assert told, message
