"""One text of 20 MB in twelve forms: the same documents and the same losses, bit for bit.

    python scripts/check/forms.py TEXT.xz [--bytes 20e6]

TEXT.xz is any text, of which paragraphs are put together to documents of some 10 kB. Each form is
written, opened, compared document by document with the text, and trained on for 20 steps by the
command. Prints one line per form; the status is 1 if one differs from the first.
"""

import argparse
import contextlib
import hashlib
import io
import json
import lzma
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

STEPS, DOCUMENT = 20, 10_000
RUN = (
    "megabyte_tiny --model.patch-size 4 --model.global-dim 16 --model.local-dim 16 "
    "--model.global-layers 1 --model.local-layers 1 --model.global-heads 2 --model.local-heads 2 "
    "--model.max-length 256 --sequence-length 256 --batch-size 8 --eval-windows 8 --log-every 1 "
    f"--steps {STEPS} --eval-every 0 --checkpoint-every 0 --devices 1"
)
FORMS = (
    "a file per document", "x.jsonl", "list.json", "x.jsonl.gz", "x.jsonl.xz", "x.jsonl.bz2",
    "x.jsonl.zst", "x.parquet", "file.arrow", "data set", "x.tar", "x.array_record",
)  # fmt: skip


def read_texts(path: Path, size: int) -> list[str]:
    """Documents of whole paragraphs, from the first `size` bytes of a compressed text."""
    with lzma.open(path) as file:
        text = file.read(size).rpartition(b"\n\n")[0].decode("utf-8")
    texts, part, length = [], list[str](), 0
    for paragraph in text.split("\n\n"):
        part, length = [*part, paragraph], length + len(paragraph)
        if length >= DOCUMENT:
            texts, part, length = [*texts, "\n\n".join(part)], [], 0
    return texts + ["\n\n".join(part)] * bool(part)


def write(form: str, texts: list[str], folder: Path) -> Path:
    """The texts in a form, as the tests write it."""
    from bytelm.tests import test_formats

    if form != FORMS[0]:
        return test_formats.write_form(form, folder)
    (folder / "files").mkdir()
    for number, text in enumerate(texts):
        (folder / "files" / f"{number:06}.txt").write_bytes(text.encode())
    return folder / "files"


def digest_of(documents: Iterable[bytes]) -> str:
    """A digest of documents and where they end."""
    whole = hashlib.sha256()
    for each in documents:
        whole.update(hashlib.sha256(each).digest())
    return whole.hexdigest()


def trained(path: Path, run: Path) -> list[float]:
    """The losses of `bytelm train` on a path."""
    from bytelm_jax.cli.main import main as bytelm

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = bytelm(["train", *RUN.split(), "--data", str(path), "--run-dir", str(run)])
    assert status == 0, said.getvalue()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def main() -> int:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path, help="a text, compressed by xz")
    parser.add_argument("--bytes", type=float, default=20e6, help="how much of it")
    options = parser.parse_args()
    texts = read_texts(options.text, int(options.bytes))
    good, first = True, list[float]()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        os.environ |= {"XDG_CACHE_HOME": f"{made}/cache", "JAX_PLATFORMS": "cpu"}
        # Otherwise each run compiles the same step.
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{made}/compiled"}
        os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        from bytelm.data import open_corpus
        from bytelm.tests import test_formats

        test_formats.TEXTS = texts
        test_formats.RECORDS = [{"id": n, "text": text} for n, text in enumerate(texts)]
        lines = [json.dumps(record) + "\n" for record in test_formats.RECORDS]
        test_formats.JSONL = "".join(lines).encode()
        wanted = digest_of(text.encode() for text in texts)
        for form in FORMS:
            path = write(form, texts, folder)
            corpus = open_corpus([path])
            lengths = enumerate(corpus.lengths.tolist())
            digest = digest_of(corpus.read(n, 0, length).tobytes() for n, length in lengths)
            losses = trained(path, folder / f"run of {form}")
            first = first or losses
            same = digest == wanted, losses == first and len(losses) == STEPS
            good &= all(same)
            size = f"{corpus.documents:,} documents, {corpus.total_bytes:,} bytes"
            line = f"{form}: {size}, the same: {same[0]}; {STEPS} losses, {losses[0]} to "
            print(f"{'ok  ' if all(same) else 'FAIL'} {line}{losses[-1]}, the same: {same[1]}")
            sys.stdout.flush()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
