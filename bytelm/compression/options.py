"""What the commands `compress` and `decompress` of both packages do, once a model can be opened."""

from collections.abc import Callable
from pathlib import Path

from bytelm.compression import codec
from bytelm.compression.codec import SUFFIX
from bytelm.config import ModelConfig, default_length, require


def default_out(path: Path, out: Path, is_compressed: bool = False) -> Path:
    """`out`, or for the empty path the usual name, which for a restored file must be free."""
    if out != Path():
        return out
    if not is_compressed:
        return path.with_name(path.name + SUFFIX)
    named = path.suffix == SUFFIX
    require(named, f"FILE={path}: does not end in {SUFFIX}; name the file to write with --out")
    restored = path.with_suffix("")
    require(not restored.exists(), f"{restored}: exists; name the file to write with --out")
    return restored


def run_compress(
    file: Path,
    out: Path,
    window: int,
    streams: int,
    open_model: Callable[[], tuple[ModelConfig, int, codec.Place]],
) -> int:
    """The command `compress`; returns its exit code.

    `open_model()` is called when all else is checked. It gives the model's configuration, the bytes
    of its training windows, 0 if they are not known, and where it predicts.
    """
    codec.check_request(streams, window)
    out = default_out(file, out)
    codec.check_paths(file, out)
    config, trained, place = open_model()
    window = window or default_length(config, trained)
    summary = codec.compress_file(file, out, place, window, streams)
    print(f"wrote {out}: {summary.line}")
    return 0


def run_decompress(file: Path, out: Path, open_place: Callable[[codec.Header], codec.Place]) -> int:
    """The command `decompress`; returns its exit code.

    `open_place(header)` compares this machine with the one of the header before it opens the model;
    a stored file needs neither.
    """
    header = codec.inspect_file(file)
    out = default_out(file, out, is_compressed=True)
    codec.check_paths(file, out)
    place = open_place(header) if header.is_coded else codec.NO_MODEL
    summary = codec.decompress_file(file, out, place)
    print(f"wrote {out}: {summary.line}")
    return 0
