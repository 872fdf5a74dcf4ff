"""One text in every form gives the same documents; what cannot be read is named in one line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bytelm import data, recipes
from bytelm.config import ByteVocab, DataConfig, from_dict, to_dict
from bytelm.data import cache, formats, open_corpus, prepared, records
from bytelm.data.windows import Windows
from bytelm.progress import GuessWarning
from bytelm.run_data import RunData, first_lines, open_windows
from bytelm.runs import keep_rules

ROOT = Path(data.__file__).parents[2]
ZSTD = zstandard.ZstdCompressor()


def documents() -> list[str]:
    """Some 200 kB: long and short, beyond ASCII, with line ends, quotes and brackets."""
    dice = random.Random(7)
    words = ["byte", "Größe", "字节", "🙂", '"', "{", "]", "\\", "\n", "\t", "\u2028", "a,b"]
    return [" ".join(dice.choices(words, k=dice.choice((1, 30, 300, 3000)))) for _ in range(60)] + [
        "x"
    ]


TEXTS = documents()
RECORDS = [{"id": number, "text": text, "other": None} for number, text in enumerate(TEXTS)]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "bytelm"


def contents(corpus: data.Corpus) -> list[bytes]:
    lengths = corpus.lengths.tolist()
    return [corpus.read(index, 0, length).tobytes() for index, length in enumerate(lengths)]


# ---- every form -----------------------------------------------------------------------------


def table(start: int = 0, stop: int | None = None, kind: Any = None) -> pa.Table:
    part = pa.array(TEXTS[start:stop], kind or pa.string())
    return pa.table({"id": pa.array(range(len(part))), "text": part})


def ipc(new: Callable[..., Any], content: pa.Table) -> bytes:
    sink = io.BytesIO()
    with new(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=13)
    return sink.getvalue()


def parquet(content: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(content, sink, row_group_size=17, **options)
    return sink.getvalue()


def tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def samples() -> bytes:
    members = list[tuple[str, bytes]]()
    for number, text in enumerate(TEXTS):
        members += [(f"a.b/{number:06}.jpg", b"\xff\xd8"), (f"a.b/._{number:06}.txt", b"mac")]
        forms = {"txt": text.encode(), "text": text.encode()}
        forms["json"] = json.dumps(RECORDS[number]).encode()
        extension = list(forms)[number % 3]
        members.append((f"a.b/{number:06}.{extension}", forms[extension]))
    return tar(members)


def data_set(folder: Path) -> Path:
    """As `datasets.save_to_disk` writes it, with names whose order is not that of `state.json`."""
    folder.mkdir()
    shards = {"data-1.arrow": table(20), "data-2.arrow": table(0, 20)}
    for name, content in shards.items():
        (folder / name).write_bytes(ipc(pa.ipc.new_stream, content))
    files = [{"filename": "data-2.arrow"}, {"filename": "data-1.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def array_record(path: Path) -> Path:
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    return path


def two_frames(content: bytes) -> bytes:
    return ZSTD.compress(content[:1000]) + ZSTD.compress(content[1000:])


FILES: dict[str, Callable[[], bytes]] = {
    "x.jsonl": lambda: JSONL,
    "x.ndjson": lambda: b"\xef\xbb\xbf" + JSONL.replace(b"\n", b"\r\n \r\n"),
    "list.json": lambda: json.dumps([*RECORDS, {"text": ""}, {"text": None}], indent=1).encode(),
    "lines.json": lambda: JSONL.rstrip(),
    "x.jsonl.gz": lambda: gzip.compress(JSONL[:5000]) + gzip.compress(JSONL[5000:]),
    "x.jsonl.xz": lambda: lzma.compress(JSONL),
    "x.jsonl.bz2": lambda: bz2.compress(JSONL),
    "x.jsonl.zst": lambda: two_frames(JSONL),
    "x.json.gz": lambda: gzip.compress(json.dumps(RECORDS, ensure_ascii=False).encode()),
    "x.parquet": lambda: parquet(table(), compression="zstd"),
    "large.parquet": lambda: parquet(table(kind=pa.large_string()), use_dictionary=False),
    "bytes.parquet": lambda: parquet(table(kind=pa.binary())),
    "by content": lambda: parquet(table()),
    "x.parquet.gz": lambda: gzip.compress(parquet(table())),
    "file.arrow": lambda: ipc(pa.ipc.new_file, table()),
    "dictionary.arrow": lambda: ipc(
        pa.ipc.new_stream, pa.table({"text": table()["text"].dictionary_encode()})
    ),
    "stream.arrow": lambda: ipc(pa.ipc.new_stream, table()),
    "x.arrow.zst": lambda: two_frames(ipc(pa.ipc.new_file, table())),
    "x.tar": samples,
    "x.tgz": lambda: gzip.compress(samples()),
    "x.tar.zst": lambda: two_frames(samples()),
}


def write_form(form: str, folder: Path) -> Path:
    match form:
        case "data set":
            return data_set(folder / "ds")
        case "x.array_record":
            return array_record(folder / form)
    (folder / form).write_bytes(FILES[form]())
    return folder / form


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> data.Corpus:
    folder = tmp_path_factory.mktemp("plain")
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return open_corpus([folder])


@pytest.mark.parametrize("form", [*FILES, "data set", "x.array_record"])
def test_every_form_gives_the_same_documents_and_windows(
    form: str, tmp_path: Path, plain: data.Corpus, own_cache: Path
) -> None:
    path = write_form(form, tmp_path)
    corpus = open_corpus([path])
    assert contents(corpus) == contents(plain)
    assert corpus.digests().tolist() == plain.digests().tolist()
    for ours, theirs in zip(data.split(corpus, 0.1, 0), data.split(plain, 0.1, 0), strict=True):
        rows, wanted = (Windows(part, ByteVocab(), 128, True) for part in (ours, theirs))
        assert len(rows) == len(wanted) > 10
        assert all((rows[index] == wanted[index]).all() for index in range(len(rows)))
    held = sorted(os.listdir(own_cache))
    assert all(name.endswith(".bytes") for name in held)
    assert open_corpus([path]).fingerprint() == corpus.fingerprint()
    assert sorted(os.listdir(own_cache)) == held
    data.prepare([path], tmp_path / "out.bytes")
    assert contents(open_corpus([tmp_path / "out.bytes"])) == contents(plain)
    assert sorted(os.listdir(own_cache)) == held


@pytest.mark.parametrize("suffix", ["gz", "xz", "bz2", "zst"])
def test_a_compressed_text_is_one_document(suffix: str, tmp_path: Path) -> None:
    packed = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": two_frames}
    content = b"".join(text.encode() for text in TEXTS)
    (tmp_path / f"x.txt.{suffix}").write_bytes(packed[suffix](content))
    (tmp_path / "no name to go by").write_bytes(packed[suffix](content))
    assert contents(open_corpus([tmp_path])) == [content, content]
    raw = (tmp_path / f"x.txt.{suffix}").read_bytes()
    assert contents(open_corpus([tmp_path / f"x.txt.{suffix}"], raw=True)) == [raw]


def test_long_records_pass_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_CHUNK", 7)
    monkeypatch.setattr(formats, "_CHUNK", 5)
    monkeypatch.setattr(prepared, "_BUFFER", 3)
    texts = ["one", "zwei 🙂", '{"text": "]"}', '\\\\"']
    for name, content in (
        ("a.json", json.dumps([{"text": text} for text in texts]).encode()),
        ("b.json", "\n".join(json.dumps({"text": t}, indent=3) for t in texts).encode()),
    ):
        (tmp_path / name).write_bytes(content)
        assert contents(open_corpus([tmp_path / name])) == [text.encode() for text in texts]


def test_paths_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a1", "a2", "b*"):
        (tmp_path / name).write_text(name)
    (tmp_path / "list").write_text("a2\n\n  b*\na?\n")
    assert contents(open_corpus(["a*"])) == [b"a1", b"a2"]
    listed = ["b*", "@list"]
    assert contents(open_corpus(listed, once=False)) == [b"b*", b"a2", b"b*", b"a1", b"a2"]
    assert contents(open_corpus(listed)) == [b"b*", b"a2", b"a1"]
    for path, message in (
        ("c*", r"c\*: matches no file"),
        ("@none", "@none: cannot be read .No such file"),
        ("c", "c: does not exist; check the spelling"),
    ):
        with pytest.raises(ValueError, match=message):
            open_corpus([path])


@pytest.mark.parametrize("form", ["lines", "zstd", "text", "raw", "parquet"])
def test_standard_input(form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = {"zstd": two_frames(JSONL), "text": b"some { text", "parquet": parquet(table())}
    piped = sent.get(form, JSONL)
    for read in (open_corpus, lambda paths, **options: prepare_and_open(paths, options, tmp_path)):
        cache.prepared_input.cache_clear()
        reader, writer = os.pipe()
        with open(reader, "rb") as source, subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"],
            stdin=subprocess.PIPE, stdout=writer,
        ) as feeder:  # fmt: skip
            os.close(writer)
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(source))
            assert feeder.stdin is not None
            feeder.stdin.write(piped)
            feeder.stdin.close()
            found = contents(read(["-"], raw=form == "raw"))
        whole = form in ("text", "raw")
        assert found == ([piped] if whole else [text.encode() for text in TEXTS])


def prepare_and_open(paths: Sequence[str], options: dict[str, Any], folder: Path) -> data.Corpus:
    data.prepare(paths, folder / "out", **options)
    return open_corpus([folder / "out"])


# ---- what cannot be read --------------------------------------------------------------------


def arrow_of(columns: dict[str, Any]) -> bytes:
    return parquet(pa.table(columns))


def not_utf8() -> bytes:
    broken = pa.array([b"fine", b"caf\xe9"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, broken.buffers())
    return ipc(pa.ipc.new_file, pa.table({"text": column}))


def line(number: int, text: bytes) -> bytes:
    lines = JSONL.splitlines(keepends=True)[:40]
    lines[number - 1] = text + b"\n"
    return b"".join(lines)


BROKEN: list[tuple[str, Callable[[], bytes], str]] = [
    ("x.jsonl.gz", lambda: gzip.compress(JSONL)[:-50], "is damaged or cut short .*; fetch"),
    ("x.jsonl.xz", lambda: lzma.compress(JSONL)[:-50], "is damaged or cut short"),
    ("x.jsonl.bz2", lambda: bz2.compress(JSONL)[:-50], "is damaged or cut short"),
    ("x.jsonl.zst", lambda: ZSTD.compress(JSONL)[:-50], "is damaged or cut short .*ends within"),
    ("y.gz", lambda: gzip.compress(JSONL)[:90] + b"\xff" * 900, "is damaged or cut short"),
    ("y.bz2", lambda: bz2.compress(JSONL)[:90] + b"\xff" * 900, "is damaged or cut short"),
    ("y.zst", lambda: ZSTD.compress(JSONL)[:90] + b"\xff" * 900, "is damaged or cut short"),
    ("x.parquet", lambda: parquet(table())[:-9], "is damaged or cut short"),
    ("file.arrow", lambda: ipc(pa.ipc.new_file, table())[:-9], "is damaged or cut short"),
    ("stream.arrow", lambda: ipc(pa.ipc.new_stream, table())[:9000], "is damaged or cut short"),
    ("x.tar", lambda: samples()[:7000], "is damaged or cut short .unexpected end"),
    ("name.parquet", lambda: b"text", "is called .parquet but is no Parquet file; .* --raw"),
    ("name.gz", lambda: b"text", "is called .gz but is no gzip file; fetch it again, or"),
    ("x.jsonl", lambda: line(7, b'{"text": 1'), "x.jsonl, line 7: not JSON .*; repair it, or"),
    ("x.jsonl", lambda: line(8, b'{"text": "\xe9"}'), "line 8: not UTF-8 .byte 0xe9.; repair"),
    ("x.jsonl", lambda: line(9, b"[1]"), "line 9: is no object with a field 'text'"),
    ("x.jsonl", lambda: line(9, b'{"text": 7}'), "line 9: its field 'text' is no text .int.; nam"),
    ("x.jsonl", lambda: line(9, b'{"text": "\\ud800"}'), "line 9: .* surrogate pair"),
    ("x.jsonl", lambda: line(9, b'{"txt": 1, "n": 2}'), r"line 9: has no field .*: txt, n.; name"),
    ("x.json", lambda: b'{"a": 1}', r"record 1: has no field 'text' .its fields: a.; .* --raw"),
    ("x.json", lambda: b'[{"text": "a"}, {"text": }]', "record 2: not JSON .Expecting value"),
    ("x.json", lambda: b'[{"text": "a"}, {"text": "b"', "record 2: not JSON"),
    ("x.json", lambda: b'[{"text": "a"},', "its list does not end after record 1"),
    ("x.json", lambda: b'[{"text": "a\xff"}]', "record 1 or later: not UTF-8 .byte 0xff"),
    ("a.parquet", lambda: arrow_of({"n": [1]}), "has no column 'text' .its columns: n int64.; na"),
    ("a.parquet", lambda: arrow_of({"text": [1]}), "its column 'text' holds int64, no text; name"),
    ("a.arrow", not_utf8, "a.arrow, row 2: its column 'text' is not UTF-8 .byte 0xe9"),
    ("a.tar", lambda: tar([("d/1.jpg", b"x"), ("d/1.cls", b"2")]), "sample d/1: .* .it has .jpg, "),
    ("a.tar", lambda: tar([("1.json", b"{}")]), "sample 1.json: has no field 'text'"),
    ("a.array_record", lambda: b"x" * 99, "is damaged or no ArrayRecord file"),
    ("a.jsonl", lambda: b'{"text": ""}\n', "a.jsonl: holds no bytes"),
    ("a.gz", lambda: gzip.compress(b""), "a.gz: holds no bytes"),
    ("a.jsonl", lambda: b"", "a.jsonl: holds no bytes"),
    ("a.jsonl", lambda: b"hello\n" + JSONL, "a.jsonl: is called .jsonl but does not begin"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"), BROKEN, ids=[f"{n} {m[:20]}" for n, _, m in BROKEN]
)
def test_what_cannot_be_read_is_named_in_one_line(
    name: str, content: Callable[[], bytes], message: str, tmp_path: Path, own_cache: Path
) -> None:
    (tmp_path / name).write_bytes(content())
    for call in (open_corpus, lambda paths: data.prepare(paths, tmp_path / "out")):
        with pytest.raises(ValueError, match=message) as caught:
            call([tmp_path / name])
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == [name]
    left = os.listdir(own_cache) if own_cache.is_dir() else []
    assert not [each for each in left if not each.endswith(".bytes")]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet", "x.jsonl"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    path = write_form(name, tmp_path)
    read = formats.read_stream

    def grow(*arguments: Any) -> Iterator[bytes | None]:
        for number, piece in enumerate(read(*arguments)):
            if number == 9:
                with open(path, "ab") as file:
                    file.write(b"more")
            yield piece

    monkeypatch.setattr(formats, "read_stream", grow)
    with pytest.raises(ValueError, match=f"{name}: changed while it was read; try again when"):
        open_corpus([path])
    assert not os.listdir(own_cache)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, form in (("pyarrow", "x.parquet"), ("zstandard", "x.jsonl.zst")):
        path = write_form(form, tmp_path)
        monkeypatch.setitem(sys.modules, package, None)
        install = rf"takes the package {package}; pip install 'bytelm\[data\]'"
        with pytest.raises(ValueError, match=f"{form}: reading it {install}"):
            open_corpus([path])


def test_the_splits_of_a_data_set_are_listed(tmp_path: Path) -> None:
    data_set(tmp_path / "train")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"several splits .*name one: .*/train, .*/test$"):
        open_corpus([tmp_path])
    assert len(contents(open_corpus([tmp_path / "train"]))) == len(TEXTS)
    (tmp_path / "train" / "data-1.arrow").unlink()
    with pytest.raises(ValueError, match=r"state.json: .*data-1.arrow.* is missing beside it"):
        open_corpus([tmp_path / "train"])


def test_what_looks_binary_is_said_and_raw_is_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "b").write_bytes(b"\0\1")
    (tmp_path / "c.jsonl").write_bytes(JSONL)
    corpus = open_corpus([tmp_path])
    (note,) = corpus.notes
    assert "a.png: looks binary (PNG), and so do 1 more files; its bytes are taken" in note
    assert data.split(corpus, 0.1, 0)[0].notes == corpus.notes
    (note,) = data.prepare([tmp_path / "b"], tmp_path / "out").notes
    assert note.startswith(f"{tmp_path / 'b'}: looks binary (it has zero bytes); its bytes are")
    (tmp_path / "out").unlink()
    raw = open_corpus([tmp_path], raw=True)
    assert not raw.notes and contents(raw)[2] == JSONL


# ---- cache ----------------------------------------------------------------------------------


def test_another_field_or_content_is_another_copy(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "title": "b"}')
    status = path.stat()
    assert contents(open_corpus([path])) == [b"a"]
    assert contents(open_corpus([path], "title")) == [b"b"]
    path.write_text('{"text": "c", "title": "d"}')
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert contents(open_corpus([path])) == [b"c"]
    assert len(os.listdir(own_cache)) == 3
    elsewhere = tmp_path / "elsewhere"
    assert contents(open_corpus([path], cache_dir=str(elsewhere))) == [b"c"]
    assert len(os.listdir(elsewhere)) == 1
    with pytest.raises(ValueError, match=r"cache_dir=.*: cannot be created .*--cache-dir"):
        open_corpus([path], cache_dir=str(path))
    with pytest.raises(ValueError, match=r"cache_dir=/proc: cannot be written .*--cache-dir"):
        open_corpus([path], cache_dir="/proc")


@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_prepare_a_file_once(tmp_path: Path, killed: bool) -> None:
    """The second waits for the first, and goes on itself where that one was killed."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(JSONL)
    program = (
        "import os, sys, time; from bytelm.data import cache, open_corpus\n"
        "read = cache.read_documents\n"
        "def slowly(*arguments):\n"
        "    print('reading', flush=True)\n"
        "    while not os.path.exists(sys.argv[3]): time.sleep(0.05)\n"
        "    yield from read(*arguments)\n"
        "cache.read_documents = slowly\n"
        "print(open_corpus([sys.argv[1]], cache_dir=sys.argv[2]).documents)"
    )

    def start(waits_for: Path) -> subprocess.Popen:
        argv = [sys.executable, "-c", program, path, tmp_path / "cache", waits_for]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(argv, cwd=ROOT, **pipes)

    first = start(tmp_path / "go")
    assert first.stdout is not None and first.stdout.readline() == "reading\n"
    second = start(path)
    assert second.stderr is not None
    waits = second.stderr.readline()
    assert waits == "x.jsonl: another process is reading it; waiting\n"
    first.kill() if killed else (tmp_path / "go").touch()
    outputs = [each.communicate(timeout=60)[0] for each in (first, second)]
    count = f"{len(TEXTS)}\n"
    assert outputs == (["", f"reading\n{count}"] if killed else [count, count])
    (held,) = os.listdir(tmp_path / "cache")
    assert held.endswith(".bytes")


# ---- runs -----------------------------------------------------------------------------------


def test_runs_of_before_keep_bytes_and_ranks() -> None:
    written = to_dict(DataConfig())
    new = ("text_field", "raw", "cache_dir", "split_rule", "order")
    old = from_dict(DataConfig, {k: v for k, v in written.items() if k not in new})
    assert (old.raw, old.split_rule, old.order) == (True, "rank", "grain")
    assert from_dict(DataConfig, {"paths": ["x"]}) == DataConfig(paths=("x",))


def test_a_run_reads_what_its_recipe_says(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"body": f"{n:03}" * 20}) + "\n" for n in range(100)))
    recipe = recipes.megabyte_tiny()

    def open_with(**changes: Any) -> RunData:
        config = replace(recipe.data, paths=(str(path),), text_field="body", **changes)
        config = replace(config, validation_fraction=0.1)
        return open_windows(replace(recipe, data=config))

    def lines(**changes: Any) -> str:
        config = replace(recipe.data, paths=(str(path),))
        shown = first_lines(replace(recipe, data=config), open_with(**changes), 9999, "2 cpu")
        return "\n".join(shown)

    train, held_out = open_with().windows, open_with().validation[""]
    assert isinstance(train, Windows)
    assert train.corpus.documents + held_out.corpus.documents == 100
    assert "9,999 parameters, on 2 cpu" in lines()
    assert f"x.jsonl: 6,000 bytes; {train.corpus.total_bytes:,} in " in lines()
    assert f"{held_out.corpus.documents} documents held out by content" in lines()
    assert "the last 730 held out (fewer than 50 documents)" in lines(raw=True)
    by_rank = open_with(split_rule="rank").validation[""].corpus
    assert contents(by_rank) != contents(held_out.corpus)
    (tmp_path / "run").mkdir()
    old = to_dict(recipe)
    del old["data"]["split_rule"], old["data"]["raw"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(old))
    kept = keep_rules(tmp_path / "run", recipe).data
    assert kept == replace(recipe.data, split_rule="rank", raw=True)


def test_a_loss_above_that_of_a_guess_is_said_once() -> None:
    recipe = recipes.megabyte_tiny()
    warning, after = GuessWarning(recipe), recipe.optimizer.warmup_steps + 1
    guess = math.log(recipe.model.vocab.size)
    assert warning.look(after - 1, 99.0) is None and warning.look(after, guess) is None
    assert f"step {after}: the loss of 99 nats is above" in (warning.look(after, 99.0) or "")
    assert warning.look(after + 1, 99.0) is None
