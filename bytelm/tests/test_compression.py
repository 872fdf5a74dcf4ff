"""Compression without a model: the range coder, the file format, and what is refused."""

import math
import os
from pathlib import Path

import numpy as np
import pytest

from bytelm.compression import codec
from bytelm.compression.coder import Decoder, Encoder, shares
from bytelm.compression.container import Header, read_header, short
from bytelm.compression.options import default_out
from bytelm.files import replace_file

STREAMS = 5


def tables(kind: str, steps: int) -> np.ndarray:
    """Cumulative counts uint32[steps, S, 256]."""
    rng = np.random.default_rng(1)
    shape = (steps, STREAMS, 256)
    chances = {
        "spread": lambda: rng.dirichlet(np.full(256, 0.05), shape[:2]),
        "even": lambda: np.full(shape, 1 / 256),
        "sure": lambda: np.eye(256)[np.full(shape[:2], 7)],
        "halves": lambda: np.broadcast_to(np.eye(256)[0] / 2 + np.eye(256)[255] / 2, shape),
    }[kind]()
    counts = np.floor(chances.astype(np.float32) * 2.0**30).astype(np.uint32) + np.uint32(1)
    return np.cumsum(counts, axis=2, dtype=np.uint32)


@pytest.mark.parametrize("kind", ["spread", "even", "sure", "halves"])
def test_the_coder_restores_every_value_at_the_length_of_the_model(kind):
    steps = 300
    rng, counts = np.random.default_rng(2), tables(kind, steps)
    limits = rng.integers(0, counts[..., -1].astype(np.int64), (steps, STREAMS))
    values = (counts <= limits[..., None]).sum(axis=2)
    values[::50] = rng.integers(0, 256, values[::50].shape)  # what is least likely as well
    encoder, pieces, nats = Encoder(STREAMS), [], np.zeros(STREAMS)
    for step in range(steps):
        most = STREAMS if step < 200 else 3  # streams end at different times
        part = counts[step, :most], values[step, :most]
        _, size, total = shares(*part)
        nats[:most] -= np.log(size / total)
        encoder.encode(*part)
        if step % 40 == 0:
            pieces.append(encoder.take())
    pieces.append(encoder.finish())
    for stream in range(STREAMS):
        length = sum(len(piece[stream]) for piece in pieces)
        assert length <= nats[stream] / math.log(2) / 8 * 1.00001 + 2
    waiting = iter(pieces)
    decoder = Decoder(STREAMS, lambda: next(waiting, None))
    for step in range(steps):
        most = STREAMS if step < 200 else 3
        assert (decoder.decode(counts[step, :most]) == values[step, :most]).all()


def test_a_carry_passes_through_all_words_that_are_ones():
    """An interval around a number of many ones: the last value decides whether it overflows."""
    half = np.array([[2**29, *[2**29] * 254, 2**30]], np.uint32)  # 0 below the half, 255 above
    for last in (0, 255):
        # 0, then ones: 0.0111…; what comes after may still make it 0.1000…
        start = np.array([[2**29 - 1, *[2**29 + 1] * 254, 2**30]], np.uint32)
        steps = [(start, 1)] + [(half, 0 if last else 255)] * 100 + [(half, last)] * 3
        encoder, pieces = Encoder(1), []
        for table, value in steps:
            encoder.encode(table, np.array([value]))
            pieces.append(encoder.take())
        waiting = iter([*pieces, encoder.finish()])
        decoder = Decoder(1, lambda waiting=waiting: next(waiting, None))
        assert [int(decoder.decode(table)[0]) for table, _ in steps] == [v for _, v in steps]


class Counting:
    """A predictor without a model: the next byte is likely to be one more than the last."""

    model_digest = b"a counting model"

    def __init__(self, streams: int, window: int):
        self.streams = streams

    def restart(self) -> None:
        self.first = True

    def advance(self, before: np.ndarray) -> np.ndarray:
        counts = np.ones((self.streams, 256), np.uint32)
        if not self.first:
            counts[np.arange(self.streams), before + np.uint8(1)] = 2**20
        self.first = False
        return np.cumsum(counts, axis=1, dtype=np.uint32)


PLACE = codec.Place(lambda: {"backend": "none 1", "cpu": "x"}, Counting)
LIKELY = bytes(range(256)) * 8


def packed(folder: Path, content: bytes, **sizes: int) -> Path:
    """A compressed file of that content."""
    (folder / "plain").write_bytes(content)
    codec.compress_file(folder / "plain", folder / "x.blm", PLACE, **{"window": 64} | sizes)
    return folder / "x.blm"


@pytest.mark.parametrize("content", [b"", b"a", LIKELY, LIKELY[:-37], LIKELY[:64], LIKELY[:65]])
@pytest.mark.parametrize("streams", [1, 4, 64])
def test_files_come_back_as_they_were(tmp_path, content, streams):
    file = packed(tmp_path, content, streams=streams)
    summary = codec.decompress_file(file, tmp_path / "back", PLACE)
    assert (tmp_path / "back").read_bytes() == content
    assert summary.size == len(content) and summary.compressed == file.stat().st_size
    if len(content) > 1500:
        assert summary.compressed < len(content) / 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "plain", "x.blm"]


def test_blocks_are_written_as_they_fill_and_memory_does_not_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "_PIECE_BYTES", 16)
    content = np.random.default_rng(3).integers(0, 2, 6000).cumsum().astype(np.uint8).tobytes()
    written = []
    write = codec.write_block
    monkeypatch.setattr(codec, "write_block", lambda f, p: (written.append(len(p)), write(f, p)))
    file = packed(tmp_path, LIKELY * 6 + content, streams=32)
    assert len(written) > 3
    codec.decompress_file(file, tmp_path / "back", PLACE)
    assert (tmp_path / "back").read_bytes() == LIKELY * 6 + content


def test_what_the_model_would_make_longer_is_stored(tmp_path):
    content = np.random.default_rng(0).bytes(5000)
    file = packed(tmp_path, content)
    assert file.stat().st_size <= len(content) + 256
    assert not codec.inspect_file(file).is_coded
    codec.decompress_file(file, tmp_path / "back", codec.NO_MODEL)  # needs no model
    assert (tmp_path / "back").read_bytes() == content


def refused(file: Path, place: codec.Place = PLACE) -> str:
    """The line with which a file is refused, after which its target is as before."""
    target = file.with_name("target")
    target.write_bytes(b"before")
    with pytest.raises(ValueError) as error:
        codec.decompress_file(file, target, place)
    assert target.read_bytes() == b"before"
    names = {"plain", "x.blm", "target"}
    assert {p.name for p in file.parent.iterdir()} == names
    line = str(error.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("content", [LIKELY, np.random.default_rng(0).bytes(500)])
def test_every_kind_of_damage_is_refused_by_name(tmp_path, content):
    file = packed(tmp_path, content, streams=4)
    good = file.read_bytes()
    for at in {*range(0, len(good), 37), *range(20), len(good) - 1}:
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        file.write_bytes(bytes(bad))
        assert str(file) in refused(file)
    for length in {0, 3, 60, 100, len(good) // 2, len(good) - 1}:
        file.write_bytes(good[:length])
        assert str(file) in refused(file)
    file.write_bytes(good + b"x")
    assert "cut short" in refused(file) or "goes on" in refused(file)


def test_another_model_or_machine_is_refused_by_name(tmp_path):
    file = packed(tmp_path, LIKELY)
    elsewhere = codec.Place(lambda: {"backend": "none 1", "cpu": "y"}, Counting)
    assert "compressed with cpu=x, and here it is y" in refused(file, elsewhere)

    class Other(Counting):
        model_digest = b"some other model"

    assert "another model" in refused(file, codec.Place(PLACE.machine, Other))


def test_a_header_has_at_most_256_bytes_and_says_what_it_was_given(tmp_path):
    machine = {"backend": short("b" * 300), "cpu": short("c" * 300), "settings": short("d" * 300)}
    header = Header(7, bytes(range(16)), True, 3, 9, bytes(16), machine)
    packed = header.pack()
    assert len(packed) <= 256
    (tmp_path / "x").write_bytes(packed)
    with open(tmp_path / "x", "rb") as source:
        assert read_header(source, tmp_path / "x") == header
    assert short("b" * 300) != short("b" * 299) and len(short("b" * 300)) == 36
    with pytest.raises(ValueError, match="machine"):
        Header(7, bytes(16), True, machine={"cpu": "x" * 300}).pack()


def test_requests_that_make_no_sense_are_refused(tmp_path):
    (tmp_path / "plain").write_bytes(b"some")
    for field, sizes in ("streams", {"streams": 0}), ("window", {"window": 0}):
        with pytest.raises(ValueError, match=f"{field}=0"):
            packed(tmp_path, b"some", **sizes)
    for out in (tmp_path / "plain", tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(ValueError, match="out="):
            codec.compress_file(tmp_path / "plain", out, PLACE, 64)
    (tmp_path / "x.blm").write_bytes(b"")
    assert default_out(tmp_path / "plain", Path()) == tmp_path / "plain.blm"
    assert default_out(tmp_path / "y.blm", Path(), True) == tmp_path / "y"
    for file, why in ("plain.blm", "exists"), ("plain", "does not end in .blm"):
        with pytest.raises(ValueError, match=why):
            default_out(tmp_path / file, Path(), True)


def test_a_pipe_or_a_device_is_not_replaced_by_a_file_and_a_link_stays_one(tmp_path):
    plain, pipe, link = (tmp_path / name for name in ("plain", "pipe", "link"))
    plain.write_bytes(LIKELY)
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for out in pipe, link:  # a link, as /dev/stdout is one
        with pytest.raises(ValueError, match=f"out={out}: is a pipe or a device"):
            codec.compress_file(plain, out, PLACE, 64)
        with pytest.raises(ValueError, match="is a pipe or a device"):  # whoever did not ask
            replace_file(out, b"")
    assert pipe.is_fifo() and link.is_symlink()
    link.unlink()
    link.symlink_to(tmp_path / "target")
    replace_file(link, b"new")
    assert link.is_symlink() and (tmp_path / "target").read_bytes() == b"new"
    with pytest.raises(OSError, match="no/file"):  # and not the name of a file beside it
        replace_file(tmp_path / "no" / "file", b"")


def test_a_model_that_is_not_finite_is_refused(tmp_path):
    class Broken(Counting):
        def advance(self, before: np.ndarray) -> np.ndarray:
            return np.zeros((self.streams, 256), np.uint32)

    (tmp_path / "plain").write_bytes(LIKELY)
    place = codec.Place(PLACE.machine, Broken)
    with pytest.raises(ValueError, match="not finite"):
        codec.compress_file(tmp_path / "plain", tmp_path / "x.blm", place, 64)
    assert not (tmp_path / "x.blm").exists()
