"""Python source of the installed packages as text, some packages held out.

    python scripts/bench/python_source.py --out texts --valid-bytes 1000000

Writes `source_train.txt` and `source_valid.txt` into `--out`. A file that occurs twice counts once;
what two packages share belongs to training. Packages are held out whole, in the order of the
SHA-256 of their names, until their source has `--valid-bytes` bytes, of which the first so many are
kept. Only the text that is installed is read, so that what is written differs between machines:
the sums that it prints tell.
"""

import argparse
import hashlib
import json
import sysconfig
from collections import defaultdict
from pathlib import Path

LARGEST = 1_000_000
"""Bytes above which a file is a table rather than source."""


def packages(folder: Path) -> dict[str, list[Path]]:
    """The `.py` files of each package of a site folder, in the order of their names."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*.py")):
        if 0 < path.stat().st_size <= LARGEST:
            found[path.relative_to(folder).parts[0].removesuffix(".py").lower()].append(path)
    return dict(sorted(found.items()))


def held_out(names: list[str]) -> list[str]:
    """The names in the order in which they are held out."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def write(folders: list[Path], out: Path, valid_bytes: int) -> dict[str, object]:
    """Writes both texts; says how large they are and what is held out."""
    files: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        for name, paths in packages(folder).items():
            files[name] += paths
    owners: dict[bytes, set[str]] = defaultdict(set)
    texts: dict[str, dict[bytes, bytes]] = defaultdict(dict)
    for name, paths in files.items():
        for path in paths:
            text = path.read_bytes()
            digest = hashlib.sha256(text).digest()
            owners[digest].add(name)
            texts[name][digest] = text
    alone = {
        name: b"".join(text for digest, text in each.items() if len(owners[digest]) == 1)
        for name, each in texts.items()
    }
    valid, chosen = b"", []
    for name in held_out(list(alone)):
        # A large package is worth more in training, and alone would be all of the held-out text.
        if len(valid) >= valid_bytes or not 0 < len(alone[name]) <= max(valid_bytes // 4, 1):
            continue
        valid += alone[name]
        chosen.append(name)
    training = {d: t for n, each in texts.items() if n not in chosen for d, t in each.items()}
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {"packages": len(files), "held_out": chosen}
    for name, text in (("train", b"".join(training.values())), ("valid", valid[:valid_bytes])):
        (out / f"source_{name}.txt").write_bytes(text)
        report |= {f"{name}_bytes": len(text), f"{name}_sha256": hashlib.sha256(text).hexdigest()}
    return report


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--valid-bytes", type=int, default=1_000_000)
    parser.add_argument("--packages", type=Path, nargs="*", default=[], metavar="DIR")
    args = parser.parse_args()
    folders = args.packages or [Path(sysconfig.get_path("purelib"))]
    print(json.dumps(write(folders, args.out, args.valid_bytes)), flush=True)


if __name__ == "__main__":
    main()
