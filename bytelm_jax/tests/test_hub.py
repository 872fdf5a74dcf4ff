"""`bytelm export --push` against a stand-in of the Hub's HTTP calls on this machine."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bytelm import hub
from bytelm.config import Recipe
from bytelm_jax.cli import main as cli
from bytelm_jax.models import define_model
from bytelm_jax.tests.exports import PAPER
from bytelm_jax.tests.test_cli import refused
from bytelm_jax.training import checkpoint

TOKEN, NAME = "hf_right", "me/tiny"


class Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for when a folder is uploaded, with large files in LFS."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]
    visibility: dict[str, Any]
    large: dict[str, bytes]
    calls: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def handle_call(self) -> None:
        body = self.body()
        path = self.path.partition("?")[0]
        self.calls.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):
            self.large[path[5:]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        repository = self.repositories.get(NAME)
        match self.command, path:
            case "GET", "/api/whoami-v2":
                self.answer({"name": "me", "auth": {}})
            case "POST", "/api/repos/create":
                self.create(json.loads(body))
            case "POST", "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            case "GET", p if p.startswith(f"/api/models/{NAME}/tree/") and repository is not None:
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0"}
                    for name, content in repository.items()
                ]
                self.answer(listed)
            case "GET", p if p.startswith(f"/api/models/{NAME}") and repository is not None:
                siblings = [{"rfilename": name} for name in repository]
                self.answer({"id": NAME, "_id": "0", "sha": "0" * 40, "siblings": siblings})
            case "POST", p if p == f"/api/models/{NAME}/preupload/main":
                files = [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
                self.answer({"files": files})
            case "POST", p if p == f"/{NAME}.git/info/lfs/objects/batch":
                place = f"http://127.0.0.1:{self.server.server_port}/lfs"  # type: ignore[attr-defined]
                objects = [
                    each | {"actions": {"upload": {"href": f"{place}/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                self.answer({"transfer": "basic", "objects": objects})
            case "POST", p if p == f"/api/models/{NAME}/commit/main":
                self.commit(body)
            case _:
                self.answer({"error": "Repository not found"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_call

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name != NAME:
            self.answer({"error": "You don't have the rights to create a model here"}, 403)
            return
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, {})
        self.visibility.setdefault(name, asked.get("visibility", asked.get("private")))
        self.answer({"url": f"http://127.0.0.1/{name}", "error": "exists"}, status)

    def commit(self, body: bytes) -> None:
        held = self.repositories[NAME]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    held[value["path"]] = self.large[value["oid"]]
                    assert hashlib.sha256(self.large[value["oid"]]).hexdigest() == value["oid"]
                case "deletedFile":
                    del held[value["path"]]
        place = f"https://huggingface.co/{NAME}/commit/{'0' * 40}"
        self.answer({"commitUrl": place, "commitOid": "0" * 40, "success": True})


@pytest.fixture
def stand_in(monkeypatch, request):
    """The handler's class, whose server huggingface_hub takes for the Hub."""
    from huggingface_hub import constants

    shared = {"repositories": {}, "visibility": {}, "large": {}, "calls": []}
    handler = type("Handler", (Hub,), shared)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for close in (lambda: thread.join(10), server.server_close, server.shutdown):
        request.addfinalizer(close)  # the last one first
    return handler


@pytest.fixture
def run(tmp_path):
    params = dict(define_model(PAPER)[1](0))
    checkpoint.create_run(tmp_path / "run", Recipe(name="tiny", model=PAPER), params)
    return str(tmp_path / "run")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own
def test_an_export_is_uploaded_whole(run, stand_in, tmp_path, capsys):
    out = tmp_path / "hub"
    options = ["--format", "hf", "--out", str(out), "--push", NAME]
    assert cli.main(["export", run, *options, "--max-shard-size", "2KB"]) == 0
    assert f"uploaded {out} to http://127.0.0.1:" in capsys.readouterr().out
    assert stand_in.visibility[NAME] in ("private", True)
    held = stand_in.repositories[NAME]
    assert held == {file.name: file.read_bytes() for file in out.iterdir()} and len(held) > 8
    # Fewer files of weights: those of before go.
    assert cli.main(["export", run, *options]) == 0
    held.pop(".gitattributes", None)
    assert set(held) == {file.name for file in out.iterdir()} and "model.safetensors" in held
    capsys.readouterr()
    assert "--public: says how" in refused(
        capsys, "export", run, "--format", "hf", "--out", str(out), "--public"
    )
    assert "--push: needs --format hf or hf-blt" in refused(
        capsys, "export", run, "--out", str(out), "--push", NAME
    )


def test_what_the_hub_refuses_is_one_line(run, stand_in, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    out = tmp_path / "hub"

    def line(name: str = NAME) -> str:
        return refused(capsys, "export", run, "--format", "hf", "--out", str(out), "--push", name)

    for name in ("tiny", "me/", "me/ti ny", "me/tiny/x"):
        assert f"push='{name}': " in line(name)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the Hub does not know the token" in line()
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token for the Hub; log in with" in line()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in line()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with monkeypatch.context() as away:
        away.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        assert "the Hub does not answer" in line()
    with monkeypatch.context() as without:
        without.setattr(hub, "find_spec", lambda name: None)
        assert "pip install 'bytelm[hub]'" in line()
    assert not out.exists() and not stand_in.repositories
    assert (
        cli.main(["export", run, "--format", "hf", "--out", str(out), "--push", "them/tiny"]) == 2
    )
    output = capsys.readouterr()  # what was to be uploaded is there, and said so
    assert output.out.startswith("wrote README.md") and (out / "config.json").is_file()
    assert "the token may not write there (You don't have the rights" in output.err
