"""Round trips of 30 files of every kind through `bytelm compress`, in both packages.

    python scripts/check/compress.py --data books.txt --steps 300 --keep work

Trains a tiny recipe of each architecture with the command, then compresses every file in one
process and restores it in another, and compares bit for bit; damages a compressed file in three
ways, asks another model for it, and expects one line each time. Prints one JSON object per file,
with the seconds there and back (compilation included) and the sizes that xz -9, zstd -19 and
brotli -11 make of it, and a total per model. Files that a model makes longer are stored and not
`coded`: train on many languages. The first model reads the largest file whole, the others its
beginning. `--model NAME=RUN` takes runs that exist. With `--keep`, a check that was interrupted
goes on from the files that it has done.
"""

import argparse
import gzip
import importlib
import importlib.util
import json
import lzma
import math
import random
import struct
import subprocess
import sys
import sysconfig
import tempfile
import unicodedata
import wave
import zlib
from pathlib import Path

RECIPES = ("megabyte_tiny", "transformer_tiny", "lfbyte_tiny", "blt_tiny")
PHRASES = {
    "latin": "All human beings are born free and equal in dignity and rights. ",
    "greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι. ",
    "cyrillic": "Все люди рождаются свободными и равными. ",
    "hebrew": "כל בני אדם נולדו בני חורין ושווים. ",
    "arabic": "يولد جميع الناس أحرارا متساوين في الكرامة. ",
    "devanagari": "सभी मनुष्यों को गौरव और अधिकारों में समानता प्राप्त है। ",
    "bengali": "সমস্ত মানুষ স্বাধীনভাবে জন্মগ্রহণ করে। ",
    "tamil": "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர். ",
    "thai": "มนุษย์ทั้งปวงเกิดมามีอิสระและเสมอภาคกัน ",
    "georgian": "ყველა ადამიანი იბადება თავისუფალი. ",
    "ethiopic": "የሰው ልጅ ሁሉ ሲወለድ ነጻ ነው። ",
    "han": "人人生而自由，在尊嚴和權利上一律平等。",
    "kana": "すべての人間は、生まれながらにして自由である。",
    "hangul": "모든 인간은 태어날 때부터 자유롭다. ",
    "emoji": "👩‍👩‍👧‍👦🎉🇺🇳✌🏽 ",
}

SCRIPTS = (
    "LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC", "SYRIAC", "THAANA", "NKO",
    "DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU", "KANNADA",
    "MALAYALAM", "SINHALA", "THAI", "LAO", "TIBETAN", "MYANMAR", "GEORGIAN", "HANGUL", "ETHIOPIC",
    "CHEROKEE", "CANADIAN", "KHMER", "MONGOLIAN", "HIRAGANA", "KATAKANA", "BOPOMOFO", "CJK",
)  # fmt: skip
"""The 34 scripts of one of the files, as the first words of their letters' names."""


def main() -> int:
    """Runs everything, or one of the two parts that it starts as processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="*", default=[], help="training data")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--source-bytes", type=int, default=5_000_000, help="of the largest file")
    parser.add_argument("--file-bytes", type=int, default=8_000, help="of most other files")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--window", type=int, default=0, help="0 is as long as in the training")
    parser.add_argument("--model", nargs="*", default=[], help="NAME=RUN in place of training")
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--packages", nargs="*", default=["jax", "torch"])
    parser.add_argument("--keep", type=Path, help="where to write everything, which then stays")
    parser.add_argument("--part", nargs=5, help="for the processes that this one starts")
    options = parser.parse_args()
    if options.part:
        package, verb, model, source, target = options.part
        return run_part(package, verb, model, source, target, options.window, options.streams)
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        return check(options, root)


def check(options: argparse.Namespace, root: Path) -> int:
    """Both packages with every model on every file; 1 if anything went wrong."""
    known = dict(pair.split("=", 1) for pair in options.model)
    failed, source_bytes = 0, options.source_bytes
    for recipe in known or options.recipes:
        files = root / f"files{source_bytes}"
        files.mkdir(exist_ok=True)
        for name, content in contents(options.file_bytes, source_bytes).items():
            (files / name).write_bytes(content)
        run = Path(known[recipe]) if recipe in known else train(recipe, options, root)
        export = root / f"{recipe}.export"
        bytelm("export", run, "--out", export)
        for package in options.packages:
            model = run if package == "jax" else export
            failed += round_trip(package, recipe, model, files, root, options)
        source_bytes = min(source_bytes, 8 * options.file_bytes)
    print(json.dumps({"failed": failed}))
    return int(failed > 0)


def train(recipe: str, options: argparse.Namespace, root: Path) -> Path:
    """A run folder of that recipe, trained by the command."""
    run = root / recipe
    data = ["--data", *options.data] if options.data else []
    patches = ["--patcher", "space"] if recipe.startswith("blt") else []  # needs no entropy model
    bytelm("train", recipe, "--run-dir", run, "--steps", options.steps, *patches, *data)
    return run


def round_trip(
    package: str, name: str, model: Path, files: Path, root: Path, options: argparse.Namespace
) -> int:
    """Compresses in one process, restores in another; returns the number of failures."""
    from bytelm.compression.codec import inspect_file

    work = f"{name}.{package}.{files.name}"
    packed, restored = root / f"{work}.packed", root / f"{work}.restored"
    there = part(package, "compress", model, files, packed, options)
    back = part(package, "decompress", model, packed, restored, options)
    failed = before = after = 0
    coded = list[Path]()  # what is stored needs no model, and any other one restores it as well
    for file in sorted(files.iterdir()):
        size, small = file.stat().st_size, (packed / file.name).stat().st_size
        same = (restored / file.name).read_bytes() == file.read_bytes()
        failed, before, after = failed + (not same), before + size, after + small
        row = {"package": package, "model": name, "file": file.name, "bytes": size}
        is_coded = inspect_file(packed / file.name).is_coded
        row |= {"compressed": small, "coded": is_coded, "same": same}
        row |= other_sizes(file.read_bytes())
        row["seconds"] = [there[file.name], back[file.name]]
        coded += [packed / file.name] if is_coded else []
        print(json.dumps(row), flush=True)
    total = {"package": package, "model": name, "files": len(there), "coded": len(coded)}
    total |= {"bytes": before, "compressed": after, "ratio": round(after / before, 4)}
    total["kB_per_second"] = [round(before / sum(s.values()) / 1e3, 1) for s in (there, back)]
    print(json.dumps(total | {"failed": failed}), flush=True)
    size_of = lambda each: each.stat().st_size  # noqa: E731
    smallest = min(coded, key=size_of, default=packed / "latin.txt")
    return failed + damages(package, model, smallest, root)


def other_sizes(content: bytes) -> dict[str, int]:
    """What other programs make of a file, as far as Python has them here."""
    sizes = {"xz -9": len(lzma.compress(content, preset=9))}
    if importlib.util.find_spec("zstandard"):
        zstandard = importlib.import_module("zstandard")
        sizes["zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(content))
    if importlib.util.find_spec("brotli"):
        brotli = importlib.import_module("brotli")
        sizes["brotli -11"] = len(brotli.compress(content, quality=11))
    return sizes


def damages(package: str, model: Path, packed: Path, root: Path) -> int:
    """Files that cannot be restored, and one by another model: a line each, nothing written."""
    good, failed = packed.read_bytes(), 0
    flipped = bytearray(good)
    flipped[len(good) * 3 // 4] ^= 1
    out = root / "damaged.out"
    for what, content, by in (
        ("flipped", bytes(flipped), model),
        ("cut", good[:-3], model),
        ("longer", good + b"x", model),
        ("another model", good, another(root)),
    ):
        (root / "damaged").write_bytes(content)
        program = ["bytelm_jax", "decompress"] if package == "jax" else ["bytelm_torch.decompress"]
        done = subprocess.run(
            [sys.executable, "-m", *program, root / "damaged", "--model", by, "--out", out],
            capture_output=True,
            text=True,
            timeout=600,
        )
        good_answer = done.returncode == 2 and done.stderr.count("\n") == 1 and not out.exists()
        failed += not good_answer
        print(json.dumps({"damage": what, "as_expected": good_answer, "line": done.stderr.strip()}))
    return failed


def another(root: Path) -> Path:
    """An export of a model that compressed nothing."""
    run, export = root / "another", root / "another.export"
    if not export.exists():
        code = "print('another')\n" * 200
        (root / "another.txt").write_text(code, "utf-8")
        sizes = ("--batch-size", 1, "--sequence-length", 64, "--steps", 1)
        bytelm("train", "megabyte_tiny", "--run-dir", run, *sizes, "--data", root / "another.txt")
        bytelm("export", run, "--out", export)
    return export


def part(
    package: str, verb: str, model: Path, source: Path, target: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Runs one process over the files that are not done yet; the seconds of every file."""
    target.mkdir(exist_ok=True)
    program = [sys.executable, __file__, "--part", package, verb, model, source, target]
    program += ["--window", options.window, "--streams", options.streams]
    subprocess.run([*map(str, program)], check=True, stdout=sys.stderr, timeout=36_000)
    return done_in(target)


def done_in(target: Path) -> dict[str, float]:
    """The files that stand in `target` whole, and the seconds that each took."""
    notes = target.with_name(f"{target.name}.jsonl")
    lines = notes.read_text("utf-8").splitlines() if notes.exists() else []
    return dict(map(json.loads, lines))


def run_part(
    package: str, verb: str, model: str, source: str, target: str, window: int, streams: int
) -> int:
    """What those processes do; writes a line a file."""
    from bytelm.compression import codec
    from bytelm.config import default_length

    if package == "jax":
        from bytelm_jax import from_pretrained
        from bytelm_jax.inference.compression import compression_place
    else:
        from bytelm_torch import from_pretrained
        from bytelm_torch.inference.compression import compression_place
    opened = from_pretrained(model)
    window = window or default_length(opened.config, opened.training_length)
    place, done = compression_place(opened), done_in(Path(target))
    with open(f"{target}.jsonl", "a", encoding="utf-8") as notes:
        for file in sorted(Path(source).iterdir(), key=lambda each: each.stat().st_size):
            if file.name in done:
                continue
            out = Path(target) / file.name
            if verb == "compress":
                summary = codec.compress_file(file, out, place, window, streams)
            else:
                summary = codec.decompress_file(file, out, place)
            print(json.dumps([file.name, round(summary.seconds, 3)]), file=notes, flush=True)
    return 0


def bytelm(*arguments: object) -> None:
    """Runs the command; its output goes to standard error."""
    program = [sys.executable, "-m", "bytelm_jax", *map(str, arguments)]
    subprocess.run(program, check=True, stdout=sys.stderr, timeout=36_000)


# ---- files ----------------------------------------------------------------------------------


def contents(size: int, source_size: int) -> dict[str, bytes]:
    """Thirty files by name, most of about `size` bytes."""
    rng = random.Random(0)
    text = {f"{name}.txt": repeated(phrase, size) for name, phrase in PHRASES.items()}
    source = python_source(source_size)
    return text | {
        "empty": b"",
        "one": b"\x00",
        "scripts.txt": scripts(size),
        "zeros": bytes(size),
        "newlines": b"\n" * size,
        "all_values": bytes(range(256)) * (size // 256),
        "random": rng.randbytes(size),
        "window": source[:512],
        "window_and_one": source[:513],
        "broken_utf8": repeated(PHRASES["han"], size)[1:-1],
        "utf16": repeated(PHRASES["greek"], size).decode("utf-8", "ignore").encode("utf-16"),
        "image.png": png(64),
        "sound.wav": wav(size // 2),
        "text.gz": gzip.compress(source[: 4 * size], mtime=0),
        "source.py": source,
    }


def repeated(phrase: str, size: int) -> bytes:
    """The phrase again and again, each time with another number after it."""
    count = size // len(phrase.encode()) + 1
    return "".join(f"{phrase}{i}\n" for i in range(count)).encode()[:size]


def scripts(size: int) -> bytes:
    """Words of letters of each of 34 scripts, in turn, a line each."""
    rng, lines, length = random.Random(1), [], 0
    letters = {script: letters_of(script) for script in SCRIPTS}
    while length < size:
        for each in letters.values():
            words = ("".join(rng.choices(each, k=rng.randint(2, 7))) for _ in range(5))
            lines.append(" ".join(words) + "\n")
            length += len(lines[-1].encode())
    return "".join(lines).encode()


def letters_of(script: str) -> list[str]:
    """The letters whose names in Unicode begin with that word; of the many Chinese ones, some."""
    points = range(0x4E00, 0x4F00) if script == "CJK" else range(0x20, 0x3200)
    points = range(0xAC00, 0xAD00) if script == "HANGUL" else points
    named = ((chr(p), unicodedata.name(chr(p), "")) for p in points if chr(p).isalpha())
    return [letter for letter, name in named if name.startswith(f"{script} ")]


def python_source(size: int) -> bytes:
    """The first bytes of Python's standard library."""
    found, length = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        found.append(file.read_bytes())
        length += len(found[-1])
        if length >= size:
            break
    return b"".join(found)[:size]


def png(width: int) -> bytes:
    """A square image of a gradient."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(
        b"\0" + bytes((x * y) % 251 for x in range(width) for _ in range(3)) for y in range(width)
    )
    size = struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", size), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def wav(samples: int) -> bytes:
    """A rising tone of 16-bit samples."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        with wave.open(file.name, "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            tone = (int(9000 * math.sin(i * i / 20000)) for i in range(samples))
            sound.writeframes(b"".join(struct.pack("<h", x) for x in tone))
        return Path(file.name).read_bytes()


if __name__ == "__main__":
    sys.exit(main())
