"""Corpora larger than memory: what preparing one costs, and how long a run on one takes to start.

    python scripts/check/large_data.py --records 5e9 --sparse 50e9

First a `.jsonl.zst` with --records bytes of text, made on the fly, goes through `bytelm prepare -`:
the rate is text a second of processor time, of the process itself, and the peak is of its resident
memory. Then a prepared file of --sparse bytes, most of which no disk holds, is trained on for one
step, and so is a small one; what the large one takes more is its start. Prints a JSON line each.
The status is 1 if preparing was slower than 100 MB/s or took more than 1 GB, or the start took more
than 10 s of processor time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread
from typing import IO, Any

import numpy as np
import zstandard

from bytelm.data.prepared import MAGIC

BYTELM = [sys.executable, "-m", "bytelm_jax"]
DOCUMENT = 50_000  # bytes of the sparse file's documents


def feed(pipe: IO[bytes], size: float) -> None:
    """Writes records with `size` bytes of text, compressed, and closes the pipe."""
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 123, random.integers(2, 9)).tolist()) for _ in range(5000)]
    texts = [b" ".join(words[i] for i in random.integers(0, 5000, 600)) for _ in range(2000)]
    with zstandard.ZstdCompressor(1).stream_writer(pipe) as sink:
        written = 0
        while written < size:
            for index in random.integers(0, len(texts), 500):
                sink.write(b'{"text": "%d %s"}\n' % (written, texts[index]))
                written += len(str(written)) + 1 + len(texts[index])


def spent(command: list[str], records: float = 0.0) -> dict[str, Any]:
    """Processor seconds, peak GB and last line of a command, which is fed records on its input."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin and process.stdout
    if records:
        Thread(target=feed, args=(process.stdin, records), daemon=True).start()
    else:
        process.stdin.close()
    output = process.stdout.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, output
    return {
        "processor_s": round(usage.ru_utime + usage.ru_stime, 1),
        "wall_s": round(time.monotonic() - start, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "says": output.strip().splitlines()[-1],
    }


def make_sparse(path: Path, size: float) -> None:
    """A prepared file of documents of zeros, whose digests are drawn."""
    count = int(size) // DOCUMENT
    ends = np.arange(1, count + 1, dtype="<i8") * DOCUMENT
    digests = np.random.default_rng(0).integers(0, 2**63, count).astype("<u8")
    with open(path, "wb") as file:
        file.truncate(count * DOCUMENT)
        file.seek(0, os.SEEK_END)
        file.write(ends.tobytes() + digests.tobytes() + count.to_bytes(8, "little") + MAGIC)


def start_of_a_run(folder: Path, size: float) -> dict[str, Any]:
    """What one step on a sparse corpus of `size` bytes costs."""
    make_sparse(folder / "sparse.bytes", size)
    run = folder / f"run-{size:.0f}"
    command = [*BYTELM, "train", "megabyte_tiny", "--data", str(folder / "sparse.bytes")]
    command += ["--steps", "1", "--eval-windows", "8", "--run-dir", str(run)]
    return {"sparse_bytes": size} | spent(command)


def main() -> int:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=float, default=5e9, help="bytes of text in records")
    parser.add_argument("--sparse", type=float, default=50e9, help="bytes of the prepared file")
    parser.add_argument("--work", type=Path, help="a folder on a disk with room for --records")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        folder = Path(name)
        command = [*BYTELM, "prepare", "-", "--out", str(folder / "records.bytes")]
        prepared = {"records_bytes": options.records} | spent(command, options.records)
        prepared["mb_per_processor_s"] = round(options.records / 1e6 / prepared["processor_s"], 1)
        print(json.dumps(prepared), flush=True)
        (folder / "records.bytes").unlink()
        small, large = start_of_a_run(folder, 1e7), start_of_a_run(folder, options.sparse)
        print(json.dumps(small), json.dumps(large), sep="\n", flush=True)
    extra = large["processor_s"] - small["processor_s"]
    print(f"the start on {options.sparse:.3g} bytes takes {extra:.1f} s more than on 1e7")
    good = prepared["mb_per_processor_s"] >= 100 and prepared["peak_gb"] <= 1
    return 0 if good and extra <= 10 else 1


if __name__ == "__main__":
    sys.exit(main())
