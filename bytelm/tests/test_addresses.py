"""Data on stores: the same documents by whatever address; one line for what cannot be read."""

from __future__ import annotations

import gzip
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fsspec.config import conf

from bytelm import data
from bytelm.data import open_corpus
from bytelm.storage import fetch, stores
from bytelm.tests.test_data import contents, refuses, write
from parity_tests import servers

FILES = {
    "b.txt": b"second" * 1000,
    "a/z.bin": bytes(range(256)) * 3,
    "a/empty": b"",
    "a.jsonl.gz": gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'),
    ".hidden": b"never",
}


@pytest.fixture(scope="module")
def store() -> Iterator[servers.Flaky]:
    with servers.stores() as flaky:
        yield flaky["gs"]


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "_PAUSES", (0.01,) * 5)
    monkeypatch.setattr(fetch, "_PIECE", 1000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", FILES)


def upload(folder: Path, address: str) -> str:
    for name, content in FILES.items():
        if content:
            stores.open_store(address).pipe_file(f"{address}/{name}", content)
    return address


@pytest.mark.parametrize("protocol", ["gs", "s3"])
def test_a_folder_on_a_store_is_that_folder(
    protocol: str, folder: Path, store: servers.Flaky
) -> None:
    address, local = (
        upload(folder, f"{protocol}://{servers.BUCKET}/{protocol}"),
        open_corpus([folder]),
    )
    store.failing, store.count, failed = 8, 0, store.failed  # every eighth request to gs://
    corpus = open_corpus([f"{address}/"])
    store.failing = 0
    assert (contents(corpus), corpus.fingerprint()) == (contents(local), local.fingerprint())
    assert protocol == "s3" or store.failed > failed  # and nothing was lost
    globbed = open_corpus(
        [Path(f"{address}/b*"), f"{address}/a/*.bin"]
    )  # a Path has one slash less
    assert contents(globbed) == [FILES["b.txt"], FILES["a/z.bin"]]
    (folder / "list").write_text(f"{address}/b.txt\n{folder}/a.jsonl.gz\n")
    listed = open_corpus([f"@{folder}/list"])
    assert contents(listed) == [FILES["b.txt"], b"one", b"two"]
    assert (
        listed.fingerprint() == open_corpus([folder / "b.txt", folder / "a.jsonl.gz"]).fingerprint()
    )
    prepared = data.prepare([address], folder / "out.bytes")
    assert prepared.documents == local.documents


def test_an_object_is_downloaded_once_and_again_when_it_has_changed(
    store: servers.Flaky, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = upload(folder, f"gs://{servers.BUCKET}/once") + "/b.txt"
    downloaded = []
    get = fetch._get
    monkeypatch.setattr(fetch, "_get", lambda one, *rest: downloaded.append(one) or get(one, *rest))
    for _ in range(2):
        assert contents(open_corpus([address])) == [FILES["b.txt"]]
    assert len(downloaded) == 1
    stores.open_store(address).pipe_file(address, FILES["b.txt"].upper())  # as long as before
    assert contents(open_corpus([address])) == [FILES["b.txt"].upper()]
    [one], _ = fetch.list_objects(address)
    with refuses(r"^gs://bucket/once/b.txt: 6000 bytes came instead of 5999; leave data alone"):
        fetch.download([replace(one, size=5999, whole=True)], lambda _: folder / "x", "reading")
    with refuses(r"^gs://bucket/once/b.txt: changed while it was read"):
        fetch.download([replace(one, version="older")], lambda _: folder / "x", "reading")
    assert not (folder / "x").exists()


def test_a_web_server(folder: Path) -> None:
    with servers.web(folder) as port:
        corpus = open_corpus(
            [f"http://127.0.0.1:{port}/{name}" for name in ("b.txt", "a.jsonl.gz")]
        )
        assert contents(corpus) == [FILES["b.txt"], b"one", b"two"]
        with refuses(r"^http://127\.0\.0\.1:\d+/nowhere: does not exist; check the spelling$"):
            open_corpus([f"http://127.0.0.1:{port}/nowhere"])


def test_a_data_set_of_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: content for name, content in FILES.items() if content}
    files |= {"README.md": b"a card", ".gitattributes": b""}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with servers.hub("owner/name", files) as port:
        monkeypatch.setitem(conf, "hf", {"endpoint": f"http://127.0.0.1:{port}"})
        address = "hf://datasets/owner/name"
        assert contents(open_corpus([address])) == [
            b"one",
            b"two",
            FILES["a/z.bin"],
            FILES["b.txt"],
        ]
        assert contents(open_corpus([f"{address}/a"])) == [FILES["a/z.bin"]]
        with refuses(f"^{address}/none: does not exist; check the spelling$"):
            open_corpus([f"{address}/none"])
    monkeypatch.setattr(fetch, "_PIECE", 4000)
    with servers.hub("owner/other", files, ranges=False) as port:
        monkeypatch.setitem(conf, "hf", {"endpoint": f"http://127.0.0.1:{port}"})
        with refuses(
            r"^hf://datasets/owner/other/b\.txt: came damaged \(its hash is another\); run"
        ):
            open_corpus(["hf://datasets/owner/other/b.txt"])
    with refuses("^owner/name: does not exist; check the spelling, or write hf://datasets/owner/n"):
        open_corpus(["owner/name"])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://bucket/nowhere", "does not exist; check"),
        ("gs://bucket/nowhere/*.txt", "matches no object; check"),
        ("s3://nobucket/x", "does not exist; check"),
        ("http://127.0.0.1:1/x", r"no answer after 6 attempts \(Cannot connect .*; check the addr"),
        ("xyz://b/x", "xyz:// is no kind of store; use gs://"),
        ("hf://datasets/a/b/c", r"no answer after 6 attempts \(.*offline mode"),
    ],
)
@pytest.mark.usefixtures("store")
def test_what_cannot_be_read_is_named(address: str, message: str) -> None:
    with refuses(f"^{address.replace('*', '.')}: {message}"):
        open_corpus([address])


@pytest.mark.usefixtures("store")
def test_damage_is_named_by_its_address(folder: Path) -> None:
    address = f"gs://{servers.BUCKET}/bad.jsonl"
    stores.open_store(address).pipe_file(address, b'{"text": "one"}\n{"txt": "two"}\n')
    with refuses("^gs://bucket/bad.jsonl, line 2: "):
        open_corpus([address])
    with refuses("^gs://bucket/bad.jsonl, line 2: "):
        data.prepare([address], folder / "out.bytes")


@pytest.mark.parametrize(
    ("address", "extra"), [("gs://b/x", "gcs"), ("s3://b/x", "s3"), ("hf://x", "data")]
)
def test_a_missing_package_is_named(
    address: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsspec.filesystem", lambda *_, **__: __import__("no_such_package"))
    with refuses(rf"^{address}: needs a package .*no_such_package.*'bytelm\[{extra}\]'$"):
        open_corpus([address])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with refuses(rf"^{address}: needs the package fsspec; pip install 'bytelm\[{extra}\]'$"):
        open_corpus([address])


def test_what_looks_like_an_address_and_exists_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write(tmp_path, {"gs:/x": b"here"}))
    assert contents(open_corpus(["gs:/x"])) == [b"here"]
    assert os.path.exists("gs:/x")
