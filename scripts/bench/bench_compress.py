"""Size and speed of `bytelm compress` beside xz -9, zstd -19 and brotli -11.

    python scripts/bench/bench_compress.py README.md --model runs/megabyte_tiny

Prints one JSON object per file and program. Every result is restored and compared. A program that
is not installed is named and left out. With `--package torch`, MODEL is an export.
"""

import argparse
import importlib
import importlib.util
import json
import lzma
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Program(NamedTuple):
    """A compressor: both functions take a path and give bytes."""

    compress: Callable[[bytes], bytes]
    decompress: Callable[[bytes], bytes]


def main() -> int:
    """Prints the table; 1 if something did not come back as it was."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", required=True, help="a run folder or an export")
    parser.add_argument("--package", choices=("jax", "torch"), default="jax")
    parser.add_argument("--window", type=int, default=0, help="0 is as long as in the training")
    parser.add_argument("--streams", type=int, default=64)
    options = parser.parse_args()
    programs = {f"bytelm {options.package}": model_program(options), **others()}
    failed = 0
    for file in options.files:
        content = file.read_bytes()
        for name, program in programs.items():
            begin = time.perf_counter()
            packed = program.compress(content)
            middle = time.perf_counter()
            same = program.decompress(packed) == content
            row = {"file": file.name, "program": name, "bytes": len(content)}
            row |= {"compressed": len(packed), "ratio": round(len(packed) / len(content), 4)}
            row["bits_per_byte"] = round(8 * len(packed) / len(content), 4)
            row |= rates(len(content), middle - begin, time.perf_counter() - middle)
            print(json.dumps(row | {"same": same}), flush=True)
            failed += not same
    return int(failed > 0)


def rates(size: int, down: float, up: float) -> dict[str, float]:
    """kB a second of compressing and restoring."""
    seconds = {"compress_kB_per_second": down, "decompress_kB_per_second": up}
    return {name: round(size / value / 1e3, 1) for name, value in seconds.items()}


def others() -> dict[str, Program]:
    """What people have, at its strongest usual level."""
    found = {"xz -9": Program(lambda data: lzma.compress(data, preset=9), lzma.decompress)}
    for module, name in ("zstandard", "zstd -19"), ("brotli", "brotli -11"):
        if importlib.util.find_spec(module) is None:
            print(f"{name}: left out, since Python's {module} is not installed", file=sys.stderr)
            continue
        found[name] = _programs(importlib.import_module(module))[module]()
    return found


def _programs(module: Any) -> dict[str, Callable[[], Program]]:
    return {
        "zstandard": lambda: Program(
            module.ZstdCompressor(level=19).compress, module.ZstdDecompressor().decompress
        ),
        "brotli": lambda: Program(
            lambda data: module.compress(data, quality=11), module.decompress
        ),
    }


def model_program(options: argparse.Namespace) -> Program:
    """The model, whose programs are compiled before anything is timed."""
    from bytelm.compression import codec
    from bytelm.config import default_length

    if options.package == "jax":
        from bytelm_jax import from_pretrained
        from bytelm_jax.inference.compression import compression_place
    else:
        from bytelm_torch import from_pretrained
        from bytelm_torch.inference.compression import compression_place
    model = from_pretrained(options.model)
    window = options.window or default_length(model.config, model.training_length)
    place = compression_place(model)

    def through(data: bytes, run: Callable[[Path, Path], Any]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder) / "before", Path(folder) / "after"
            before.write_bytes(data)
            run(before, after)
            return after.read_bytes()

    def compress(data: bytes) -> bytes:
        return through(
            data,
            lambda a, b: codec.compress_file(a, b, place, window, options.streams),
        )

    def decompress(data: bytes) -> bytes:
        return through(data, lambda a, b: codec.decompress_file(a, b, place))

    compress(b" " * (options.streams * window))
    return Program(compress, decompress)


if __name__ == "__main__":
    sys.exit(main())
