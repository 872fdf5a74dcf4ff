"""Corpora, prepared files, the split, windows and batches: exact bytes, exact order."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import SupportsIndex

import numpy as np
import pytest

from bytelm import data
from bytelm.config import ByteVocab
from bytelm.data import MAGIC, Corpus, Windows, evaluation_batches, open_corpus, packing, prepared
from bytelm.data import corpus as corpus_files
from bytelm_jax.training import batches
from bytelm_jax.training.batches import training_batches

VOCAB = ByteVocab()
SHIFTED = ByteVocab(size=300, offset=3, pad_id=0, bos_id=1, eos_id=2)
FILES = {
    "b.txt": b"second",
    "a/z.bin": bytes(range(256)) * 3,
    "a/empty": b"",
    "a.txt": b"first",  # before a/z.bin: "." sorts before "/"
    "magic": b"a document that ends in " + MAGIC,
    ".hidden": b"never",
    ".git/config": b"never",
}
DOCUMENTS = [FILES[name] for name in ("a.txt", "a/z.bin", "b.txt", "magic")]
ROOT = Path(data.__file__).parents[1]


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "folder", FILES)


def corpus_of(folder: Path, documents: Sequence[bytes]) -> Corpus:
    """The corpus of these documents, through a prepared file."""
    write(folder / "in", {f"{index:04}": content for index, content in enumerate(documents)})
    data.prepare([folder / "in"], folder / "prepared.bytes")
    return open_corpus([folder / "prepared.bytes"])


def contents(corpus: Corpus) -> list[bytes]:
    lengths = corpus.lengths.tolist()
    return [corpus.read(index, 0, length).tobytes() for index, length in enumerate(lengths)]


def run_program(program: str, *arguments: Path) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, timeout=60, check=False, stdout=subprocess.PIPE)


def refuses(message: str) -> pytest.RaisesExc[ValueError]:
    """One line that matches `message`."""
    return pytest.raises(ValueError, match=message, check=lambda error: "\n" not in str(error))


def test_a_folder_gives_its_visible_files_in_order(folder: Path) -> None:
    (folder / "magic").unlink()
    corpus = open_corpus([folder])
    assert contents(corpus) == DOCUMENTS[:3]
    assert (corpus.documents, corpus.total_bytes) == (3, 779)
    assert (corpus.lengths.dtype, corpus.lengths.tolist()) == (np.int64, [5, 768, 6])
    named = open_corpus([folder / "b.txt", str(folder / "a")])
    assert contents(named) == [b"second", FILES["a/z.bin"]]


def test_read_gives_ranges_and_refuses_others(folder: Path) -> None:
    corpus = open_corpus([folder / "a.txt", folder / "b.txt"])
    piece = corpus.read(1, 2, 5)
    assert (piece.dtype, piece.tobytes()) == (np.uint8, b"con")
    assert not piece.flags.writeable
    assert corpus.read(0, 5, 5).shape == (0,)
    for start, stop in ((0, 6), (-1, 2), (3, 2)):
        with refuses(f"range {start} to {stop}: document 0 has 5 bytes"):
            corpus.read(0, start, stop)
    with refuses("document=2: the corpus has 2"):
        corpus.read(2, 0, 1)
    corpus = open_corpus([folder / "b.txt"])
    (folder / "b.txt").write_bytes(b"shrt")
    with refuses("b.txt: changed from 6 to 4 bytes since it was opened"):
        corpus.read(0, 0, 1)


def test_subset_and_cut(folder: Path) -> None:
    corpus = open_corpus([folder / "a.txt", folder / "b.txt", folder / "a"])
    assert contents(corpus.subset([2, 0])) == [FILES["a/z.bin"], b"first"]
    assert corpus.subset([]).documents == corpus.subset([]).total_bytes == 0
    for wrong in (-1, 3):
        with refuses("indices: choose from 0 to 2"):
            corpus.subset([wrong])
    whole = b"".join(contents(corpus))
    for position in (0, 1, 5, 7, 11, 12, len(whole)):
        head, tail = corpus.cut(position)
        assert b"".join(contents(head)) == whole[:position]
        assert b"".join(contents(tail)) == whole[position:]
    assert contents(corpus.cut(8)[0]) == [b"first", b"sec"]
    assert contents(corpus.cut(8)[1].cut(3)[1]) == [FILES["a/z.bin"]]
    assert [part.documents for part in corpus.cut(5)] == [1, 2]
    with refuses("position=780"):
        corpus.cut(780)


def test_few_maps_stay_open(tmp_path: Path) -> None:
    count = corpus_files._OPEN_MAPS + 20
    corpus = open_corpus([write(tmp_path, {f"{i:04}": b"%04d" % i for i in range(count)})])
    before = len(os.listdir("/proc/self/fd"))
    for index in [*range(count), *range(0, count, 7)]:
        assert corpus.read(index, 0, 4).tobytes() == b"%04d" % index
    assert len(os.listdir("/proc/self/fd")) - before <= corpus_files._OPEN_MAPS


def test_links_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    write(tmp_path, {"root/sub/file": b"inside", "other/file": b"outside", "beside": b"no"})
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "linked").symlink_to(other)
    (root / "again").symlink_to(other)
    (root / "sub" / "loop").symlink_to(root)
    (root / "sub" / "parent").symlink_to(tmp_path)
    (root / "self").symlink_to(".")
    (root / "zz-file").symlink_to(other / "file")
    os.mkfifo(root / "pipe")
    corpus = open_corpus([root])
    assert contents(corpus) == [b"outside", b"inside"]
    assert contents(open_corpus([root], once=False)) == [b"outside", b"inside", b"outside"]
    same = "root/zz-file: is the same file as .*root/again/file; each is read once"
    assert len(corpus.notes) == 1 and re.search(same, corpus.notes[0])


def test_bad_paths_are_named(tmp_path: Path) -> None:
    hidden = {"folder/.hidden/file": b"x", "folder/empty": b"", "folder/.file": b"x"}
    write(tmp_path, {"empty": b"", "good": b"x", "links/good": b"x", **hidden})
    (tmp_path / "links" / "circle").symlink_to("circle")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("missing", "missing: does not exist; check the spelling"),
        ("empty", "empty: holds no bytes; give"),
        ("folder", "folder: holds no bytes; give"),
        ("links", "circle: cannot be read .*symbolic links.*; fix it or leave it out"),
        ("dangling", "dangling: cannot be read .*No such file"),
        ("pipe", "pipe: is a pipe or a device; send its bytes to standard input"),
    ):
        for call in (open_corpus, lambda paths: data.prepare(paths, tmp_path / "out")):
            with refuses(message):
                call([tmp_path / "good", tmp_path / name])
    with refuses("give a list of paths"):
        open_corpus(str(tmp_path / "good"))


def test_the_default_is_the_standard_library() -> None:
    corpus = open_corpus([])
    names = [file.name for file in corpus._maps.files]
    assert corpus.total_bytes > 5_000_000
    assert names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "__pycache__"}
    assert {name[-3:] for name in names} == {".py"}
    assert not [name for name in names if name.startswith(("_sysconfigdata", "config-"))]
    for name in ("os.py", "json/decoder.py"):
        source = (Path(os.__file__).parent / name).read_bytes()
        assert contents(corpus.subset([names.index(name)])) == [source]


def test_the_fingerprint_follows_the_data_not_the_place(tmp_path: Path) -> None:
    def written(place: str, **files: bytes) -> Corpus:
        return open_corpus([write(tmp_path / place, files)])

    corpus = written("one", a=b"12", b=b"345")
    assert corpus.fingerprint() == written("two", a=b"12", b=b"345").fingerprint()
    others = [written("longer", a=b"12", b=b"3456"), written("moved", a=b"123", b=b"45")]
    others += [written("renamed", a=b"12", c=b"345"), written("more", a=b"12", b=b"345", c=b"6")]
    others += [corpus.subset([0]), corpus.subset([1, 0]), *corpus.cut(3)]
    assert len({each.fingerprint() for each in [corpus, *others]}) == 9


def test_prepared_round_trip(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.bytes"
    summary = data.prepare([folder], out)
    assert (summary.documents, summary.bytes) == (4, sum(map(len, DOCUMENTS)))
    assert contents(open_corpus([out])) == DOCUMENTS
    ends = np.cumsum([len(each) for each in DOCUMENTS]).tolist()
    digests = [hashlib.blake2b(each, digest_size=8).digest() for each in DOCUMENTS]
    numbers = struct.pack("<4q", *ends) + b"".join(digests) + struct.pack("<Q", 4)
    assert out.read_bytes() == b"".join(DOCUMENTS) + numbers + b"BYTELM02"
    assert open_corpus([out]).digests().astype("<u8").tobytes() == b"".join(digests)
    assert out.stat().st_mode & 0o777 == (folder / "a.txt").stat().st_mode & 0o777
    assert data.prepare([folder], out) == summary  # again, over the old one
    assert sorted(os.listdir(tmp_path)) == ["folder", "out.bytes"]


def test_prepared_files_merge_and_mix(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "_BUFFER", 6)  # documents below, at and above a chunk
    data.prepare([folder], tmp_path / "one")
    data.prepare([folder / "b.txt"], tmp_path / "two")
    summary = data.prepare([tmp_path / "two", folder / "a.txt", tmp_path / "one"], tmp_path / "all")
    expected = [b"second", b"first", *DOCUMENTS]
    assert summary.documents == 6
    assert contents(open_corpus([tmp_path / "all"])) == expected
    assert contents(open_corpus([tmp_path / "two", folder / "a.txt", tmp_path / "one"])) == expected


def test_shards_are_the_same_corpus(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index, size in enumerate((5, 3, 9, 1, 1)):
        (tmp_path / "in" / f"{index}.txt").write_bytes(bytes([65 + index]) * size)
    whole = data.prepare([tmp_path / "in"], tmp_path / "whole")
    assert data.prepare([tmp_path / "in"], tmp_path / "out", shard_bytes=6) == whole
    assert [f.stem for f in sorted((tmp_path / "out").iterdir())] == ["00000", "00001", "00002"]
    corpora = [open_corpus([tmp_path / name]) for name in ("whole", "out")]
    assert [list(each.lengths) for each in corpora] == [[5, 3, 9, 1, 1]] * 2
    np.testing.assert_array_equal(corpora[0].digests(), corpora[1].digests())
    with pytest.raises(ValueError, match="exists already; name a new folder"):
        data.prepare([tmp_path / "in"], tmp_path / "out", shard_bytes=6)
    (tmp_path / "in" / "z.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"z\.jsonl"):
        data.prepare([tmp_path / "in"], tmp_path / "none", shard_bytes=6)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out", "whole"]


def footer(*ends: int) -> bytes:
    """The index of a file without digests, as they were before."""
    return np.array(ends, "<i8").tobytes() + len(ends).to_bytes(8, "little") + b"BYTELM01"


DAMAGED = [MAGIC, b"12345" + MAGIC, *(n.to_bytes(8, "little") + MAGIC for n in (0, 99, 2**64 - 1))]
DAMAGED += [footer(1, 6)[:-8] + MAGIC]
DAMAGED += [footer(4, 5), footer(6, 6), footer(0, 6), footer(-(2**63), 6), footer(7, 6)]


@pytest.mark.parametrize("tail", DAMAGED)
def test_a_damaged_footer_is_refused(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "file").write_bytes(b"sixsix" + tail)
    for path in (tmp_path / "file", tmp_path):
        with refuses("file: ends like a prepared file, but its .* prepare it again"):
            open_corpus([path])


def test_footers_are_recognised(tmp_path: Path) -> None:
    plain = (b"x", MAGIC[:-1], MAGIC + b"\n", MAGIC.lower(), b"1234567" + MAGIC[1:])
    for content in (*plain, *(b"sixsix" + tail + b"\n" for tail in DAMAGED)):
        (tmp_path / "file").write_bytes(content)
        assert contents(open_corpus([tmp_path / "file"])) == [content]
    (tmp_path / "file").write_bytes(b"sixsix" + footer(1, 6))
    before = open_corpus([tmp_path / "file"])
    assert contents(before) == [b"s", b"ixsix"]
    data.prepare([tmp_path / "file"], tmp_path / "new")
    assert open_corpus([tmp_path / "new"]).digests().tolist() == before.digests().tolist()


def test_outputs_that_cannot_work_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mine").write_bytes(b"not to be lost")
    for paths, target, message in (
        ([folder], tmp_path, "is a folder; name a file"),
        ([folder], folder / "out", "lies in the input .*folder; choose a place outside it"),
        ([folder], tmp_path / "link" / "a" / "out", "lies in the input"),
        ([tmp_path / "link"], folder / "out", "lies in the input"),
        ([folder / "b.txt"], folder / "b.txt", "is one of the inputs"),
        ([tmp_path / "link"], tmp_path / "mine", "exists and is no prepared file; name another"),
        ([folder], tmp_path / "missing" / "out", "its folder does not exist; create it"),
        ([folder], tmp_path / "pipe", "is not a regular file"),
        ([], tmp_path / "out", "paths: give at least one file or folder"),
    ):
        with refuses(message):
            data.prepare(paths, target)
    assert (folder / "b.txt").read_bytes() == b"second"
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "mine", "pipe"]
    assert (tmp_path / "mine").read_bytes() == b"not to be lost"


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_prepare_leaves_the_old_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    def fail(handle: int) -> None:
        raise raised

    out = tmp_path / "out"
    data.prepare([folder / "b.txt"], out)
    before = out.read_bytes()
    monkeypatch.setattr(os, "fsync", fail)
    full = refuses("out: cannot be written .No space left on device.; choose")
    with full if isinstance(raised, OSError) else pytest.raises(KeyboardInterrupt):
        data.prepare([folder], out)
    assert out.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["folder", "out"]


def test_a_killed_prepare_leaves_the_old_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data.prepare([folder / "b.txt"], out)
    before = out.read_bytes()
    program = (
        "import os, signal, sys; from bytelm import data\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\n"
        "data.prepare([sys.argv[1]], sys.argv[2])"
    )
    killed = run_program(program, folder, out)
    assert killed.returncode == -signal.SIGKILL
    assert out.read_bytes() == before
    assert contents(open_corpus([out])) == [b"second"]


def test_a_source_that_shrinks_meanwhile_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = packing.read_spans

    def shrink(path: str, spans: Iterator) -> Iterator:
        (folder / "a" / "z.bin").write_bytes(b"short")
        return read(path, spans)

    monkeypatch.setattr(packing, "read_spans", shrink)
    with refuses(r"z\.bin: shrank while it was read; try again"):
        data.prepare([folder / "a" / "z.bin"], tmp_path / "out")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("vocab", [VOCAB, SHIFTED], ids=["offset0", "offset3"])
@pytest.mark.parametrize("append_eos", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 5000])
def test_windows_are_the_stream(
    folder: Path, vocab: ByteVocab, append_eos: bool, length: int
) -> None:
    paths = [folder / "b.txt", folder / "a", folder / "a.txt", folder / "b.txt"]
    documents = [b"second", FILES["a/z.bin"], b"first", b"second"]
    eos = [vocab.eos_id] * append_eos
    ids = [i for each in documents for i in [*(byte + vocab.offset for byte in each), *eos]]
    windows = Windows(open_corpus(paths, once=False), vocab, length, append_eos)
    assert len(windows) == -(-len(ids) // length)
    padded = ids + [vocab.pad_id] * (len(windows) * length - len(ids))
    rows = np.stack([windows[index] for index in range(len(windows))])
    assert (rows.dtype, rows.shape[1], rows.ravel().tolist()) == (np.int32, length, padded)


def test_windows_index_like_a_sequence(tmp_path: Path) -> None:
    windows = Windows(corpus_of(tmp_path, [b"abcde", b"g"]), VOCAB, 3, True)
    assert windows[-1].tolist() == [103, 258, 257]
    assert windows[np.int32(1)].tolist() == [100, 101, 258]
    assert len(list(windows)) == 3  # pyright: ignore[reportArgumentType]
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"window {index} of 3"):
            windows[index]
    with refuses("length=0: must be at least 1"):
        Windows(windows.corpus, VOCAB, 0, True)
    assert len(Windows(windows.corpus.subset([]), VOCAB, 3, True)) == 0


def test_very_large_corpora(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(5 << 30)
        file.seek(-3, os.SEEK_END)
        file.write(b"end")
    corpus = open_corpus([tmp_path / "sparse"])
    windows = Windows(corpus, VOCAB, 1 << 10, True)
    assert len(windows) == (5 << 20) + 1
    assert windows[np.int32((5 << 20) - 1)][-3:].tolist() == list(b"end")
    assert windows[5 << 20].tolist() == [VOCAB.eos_id] + [VOCAB.pad_id] * 1023
    with refuses("length=1: more than 2.*32 windows; choose longer ones"):
        training_batches(Windows(corpus, VOCAB, 1, False), 4, 0, 0)


@pytest.fixture
def numbered(tmp_path: Path) -> Windows:
    """50 windows of 4 ids, told apart by their first id."""
    return Windows(corpus_of(tmp_path, [bytes([n, 1, 2, 3]) for n in range(50)]), VOCAB, 4, False)


def first_ids(windows: Windows, batch_size: int, steps: int, start: int = 0) -> list[int]:
    taken = [b.ids for b in islice(training_batches(windows, batch_size, 3, start), steps)]
    assert all(b.shape == (batch_size, 4) and b.dtype == np.int32 for b in taken)
    assert all(b[:, 1:].tolist() == [[1, 2, 3]] * batch_size for b in taken)
    return np.concatenate(taken)[:, 0].tolist()


def test_every_window_once_an_epoch_newly_shuffled(numbered: Windows) -> None:
    order = first_ids(numbered, 8, 25)
    epochs = [order[begin : begin + 50] for begin in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    others = [batch.ids for batch in islice(training_batches(numbered, 10, 4, 0), 5)]
    other = np.concatenate(others)[:, 0].tolist()
    assert sorted(other) == list(range(50))
    assert len({tuple(each) for each in [*epochs, other, range(50)]}) == 6


@pytest.mark.parametrize("batch_size", [1, 5, 12, 64, 120])
def test_one_order_whatever_the_batch_size(numbered: Windows, batch_size: int) -> None:
    steps = -(-240 // batch_size)
    assert first_ids(numbered, batch_size, steps)[:240] == first_ids(numbered, 8, 30)
    single = Windows(numbered.corpus.subset([7]), VOCAB, 4, False)
    assert first_ids(single, batch_size, 2) == [7] * batch_size * 2


@pytest.mark.parametrize("start", [0, 1, 9, 10**9])
def test_restart_in_the_middle(numbered: Windows, start: int) -> None:
    undisturbed = first_ids(numbered, 12, 14, max(0, start - 4))
    skipped = 12 * min(start, 4)
    assert first_ids(numbered, 12, 10, start) == undisturbed[skipped : skipped + 120]


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_the_global_batch(numbered: Windows, process_count: int) -> None:
    for batch_size in (4, 12):
        whole = list(islice(training_batches(numbered, batch_size, 3, 5), 15))
        sizes = (batch_size, 3, 5)
        shares = [
            training_batches(numbered, *sizes, index, process_count)
            for index in range(process_count)
        ]
        for batch, *parts in zip(whole, *shares, strict=False):
            assert {part.ids.shape for part in parts} == {(batch_size // process_count, 4)}
            joined = np.concatenate([part.ids for part in parts])
            np.testing.assert_array_equal(joined, batch.ids)


def test_nothing_before_the_start_is_read(numbered: Windows) -> None:
    class Counting(Windows):
        def __getitem__(self, index: SupportsIndex) -> np.ndarray:
            reads.append(int(index))
            return super().__getitem__(index)

    reads: list[int] = []
    next(iter(training_batches(Counting(numbered.corpus, VOCAB, 4, False), 2, 3, 10**12)))
    assert 0 < len(reads) <= 2 * (1 + batches._READY_BATCHES)


@pytest.mark.parametrize("kind", [training_batches, evaluation_batches])
def test_batches_that_cannot_work_are_refused(numbered: Windows, kind: Callable) -> None:
    position = (0, 0) if kind is training_batches else (None,)
    with refuses("corpus: holds no bytes"):
        kind(Windows(numbered.corpus.subset([]), VOCAB, 4, True), 4, *position)
    for batch_size, count in ((6, 4), (2, 4), (0, 1), (-4, 2)):
        with refuses(f"batch_size={batch_size}: must be a positive multiple of .*={count}"):
            kind(numbered, batch_size, *position, 0, count)
    for index, count in ((2, 2), (-1, 2), (0, 0)):
        with refuses(f"process_index={index}: must be from 0 to {count - 1}"):
            kind(numbered, 4, *position, index, count)
    with refuses("shuffle_seed=-1: choose one from 0 to 4294967295"):
        training_batches(numbered, 4, -1, 0)
    with refuses("start_step=-2: must be at least 0"):
        training_batches(numbered, 4, 0, -2)
    with refuses("limit=0: must be at least 1"):
        evaluation_batches(numbered, 4, 0)


@pytest.mark.parametrize("size", [1, 7, 1_000_003])
@pytest.mark.parametrize("append_eos", [False, True])
def test_evaluation_counts_every_byte_once(tmp_path: Path, size: int, append_eos: bool) -> None:
    content = np.random.default_rng(size).bytes(size)
    (tmp_path / "file").write_bytes(content)
    windows = Windows(open_corpus([tmp_path / "file"]), SHIFTED, 4096, append_eos)
    taken = [batch.ids for batch in evaluation_batches(windows, 6)]
    assert all(batch.shape == (6, 4096) and batch.dtype == np.int32 for batch in taken)
    assert len(taken) == -(-len(windows) // 6)
    ids = np.concatenate(taken).ravel()
    assert (ids[ids >= 3] - 3).astype(np.uint8).tobytes() == content
    assert int((ids == SHIFTED.eos_id).sum()) == append_eos
    assert (ids[size + append_eos :] == SHIFTED.pad_id).all()


def test_evaluation_shares_and_limits(numbered: Windows) -> None:
    def rows(*sizes: int | None) -> list[np.ndarray]:
        return [batch.ids for batch in evaluation_batches(numbered, *sizes)]  # pyright: ignore

    whole = np.concatenate(rows(12))
    assert whole[:50, 0].tolist() == list(range(50))
    assert whole[50:].tolist() == [[VOCAB.pad_id] * 4] * 10
    for count in (2, 4):
        parts = [rows(12, None, i, count) for i in range(count)]
        joined = [np.concatenate(step) for step in zip(*parts, strict=True)]
        np.testing.assert_array_equal(np.concatenate(joined), whole)
    some = np.concatenate(rows(4, 10))
    assert some[:, 0].tolist() == [*range(0, 50, 5), VOCAB.pad_id, VOCAB.pad_id]
    assert len(rows(12, 1000)) == 5
