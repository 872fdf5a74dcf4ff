"""What the lines of `bench_donor.py` say: a table, the curves, and how many bytes a donor saves.

    python scripts/bench/donor_report.py donor-runs/lines.jsonl --figure donor.svg

Only seeds count for which every arm of the file has ended, so that it also reports runs that were
cut short. Needs nothing but Python, and matplotlib for a figure.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SCRATCH, SECONDS, TARGET = "from scratch", ", equal seconds", 0.2
_PART = re.compile(r"(.*?)(, equal seconds)?, seed (\d+)")

Lines = Mapping[str, dict[str, Any]]
"""Part → its line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lines", type=Path, metavar="OUT/lines.jsonl")
    parser.add_argument("--figure", type=Path, help="draw the curves of all seeds")
    asked = parser.parse_args()
    lines = read_lines(asked.lines)
    print_report(lines)
    if asked.figure:
        draw(lines, asked.figure)


def read_lines(file: Path) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    return {record["part"]: record for record in records}


def complete(lines: Lines, how: str = "") -> tuple[list[str], list[int]]:
    """The arms that have lines, and the seeds for which all of them have."""
    found = [
        match for part in lines if (match := _PART.fullmatch(part)) and (match[2] or "") == how
    ]
    arms = list(dict.fromkeys(match[1] for match in found))
    seeds = sorted({int(match[3]) for match in found})
    whole = [seed for seed in seeds if all(f"{arm}{how}, seed {seed}" in lines for arm in arms)]
    return arms, whole


def finals(lines: Lines, arm: str, seeds: Sequence[int], how: str = "") -> list[float]:
    return [lines[f"{arm}{how}, seed {seed}"]["bits"] for seed in seeds]


def best_arms(lines: Lines, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Arms by their mean bits per byte on equal bytes, the lowest first."""
    return sorted(arms, key=lambda arm: statistics.mean(finals(lines, arm, seeds)))


def bytes_to(curve: list[list[float]], bits: float) -> float | None:
    """After how many bytes a curve, straight between its points, is at `bits`; None if never.

    The true curve lies below these lines, and learning rates have not fallen to the end there: both
    make the number of bytes too large rather than too small.
    """
    before: list[float] | None = None
    for point in curve:
        if point[2] <= bits:
            if before is None:
                return point[0]
            part = (before[2] - bits) / (before[2] - point[2])
            return before[0] + part * (point[0] - before[0])
        before = point
    return None


def saved(lines: Lines, arm: str, seeds: Sequence[int]) -> list[float | None]:
    """For each seed, which share of its bytes an arm did not need to get to where scratch ends."""
    shares = list[float | None]()
    for seed in seeds:
        scratch, curve = lines[f"{SCRATCH}, seed {seed}"], lines[f"{arm}, seed {seed}"]["curve"]
        needed = bytes_to(curve, scratch["bits"])
        shares.append(None if needed is None else 1 - needed / scratch["curve"][-1][0])
    return shares


def curves(lines: Lines, arms: Sequence[str], seeds: Sequence[int], how: str = "") -> str:
    """Every arm's curves, one for each seed, as JSON: points of bytes, seconds, bits per byte."""
    found = {arm: [lines[f"{arm}{how}, seed {s}"]["curve"] for s in seeds] for arm in arms}
    rounded = {
        arm: [
            [[size, round(used, 2), round(bits, 4)] for size, used, bits in curve] for curve in each
        ]
        for arm, each in found.items()
    }
    return json.dumps({f"curves{how}": rounded})


def print_report(lines: Lines) -> None:
    arms, seeds = complete(lines)
    if SCRATCH not in arms or not seeds:
        sys.exit(f"no seed has ended for all arms, and one of them must be {SCRATCH!r}")
    donor, read = lines["donor"], lines[f"{SCRATCH}, seed {seeds[0]}"]["curve"][-1][0]
    print(
        f"donor: {donor['parameters']:,} parameters, {donor['bytes']:,} bytes in "
        f"{donor['seconds'] / 60:.1f} minutes, {donor['bits']:.4f} bits per byte"
    )
    print(
        f"{read:,.0f} bytes of text for every arm, alignment included, the donor's own not; "
        f"means over the seeds {', '.join(map(str, seeds))}, and their range"
    )
    print("| arm | bits per byte | bytes saved to where scratch ends | seconds |")
    print("| --- | --- | --- | --- |")
    for arm in arms:
        shares = shares_text(saved(lines, arm, seeds)) if arm != SCRATCH else ""
        seconds = statistics.mean(lines[f"{arm}, seed {seed}"]["seconds"] for seed in seeds)
        print(f"| {arm} | {spread(finals(lines, arm, seeds))} | {shares} | {seconds:.0f} |")
    timed, timed_seeds = complete(lines, SECONDS)
    for arm in timed if timed_seeds else []:
        records = [lines[f"{arm}{SECONDS}, seed {seed}"] for seed in timed_seeds]
        used = statistics.mean(record["seconds"] for record in records)
        bits = spread([record["bits"] for record in records])
        print(f"{used:.1f} seconds, {arm}: {bits}, seeds {', '.join(map(str, timed_seeds))}")
    print(curves(lines, arms, seeds))
    print(curves(lines, timed, timed_seeds, SECONDS))
    print_claim(lines, [arm for arm in arms if arm != SCRATCH], seeds)


def print_claim(lines: Lines, arms: list[str], seeds: Sequence[int]) -> None:
    """The arm that saves most, and whether that is the target."""
    reached = {arm: saved(lines, arm, seeds) for arm in arms}
    means = {
        arm: statistics.mean(share for share in shares if share is not None)
        for arm, shares in reached.items()
        if None not in shares
    }
    target = f"target {TARGET:.0%}"
    if not means:
        print(f"no arm gets to what {SCRATCH} reaches at its end with every seed: {target} missed")
        return
    best = max(means, key=lambda arm: means[arm])
    verdict = "met" if means[best] >= TARGET else "missed"
    print(f"bytes to what {SCRATCH} reaches at its end: {best} needs {means[best]:.1%} fewer")
    print(f"with single seeds: {shares_text(reached[best])}; {target} {verdict}")


def draw(lines: Lines, path: Path) -> None:
    """All seeds' held-out bits per byte: by bytes, and by seconds where seconds were equal."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "donor"  # the same file from the same lines
    figure = Figure(figsize=(9, 4), layout="constrained")
    arms, seeds = complete(lines)
    timed, timed_seeds = complete(lines, SECONDS)
    by_seconds = [
        (arm, SECONDS if arm in timed else "") for arm in dict.fromkeys([*arms[:1], *timed])
    ]
    panels = (
        ([(arm, "") for arm in arms], seeds, 0, 1e6, "MB of text, alignment included"),
        (by_seconds, timed_seeds or seeds, 1, 1.0, "seconds of training"),
    )
    for axes, (shown, of_seeds, place, unit, label) in zip(
        figure.subplots(1, 2, sharey=True), panels, strict=True
    ):
        for arm, how in shown:
            for seed in of_seeds:
                curve = lines[f"{arm}{how}, seed {seed}"]["curve"]
                places, bits = [point[place] / unit for point in curve], [p[2] for p in curve]
                named = arm if seed == of_seeds[0] else None
                axes.plot(places, bits, color=f"C{arms.index(arm)}", linewidth=1, label=named)
        ends = [bits for arm in arms for bits in finals(lines, arm, seeds)]
        axes.set(xlabel=label, ylim=(min(ends) - 0.05, min(ends) + 0.45))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("bits per byte, held out")
    figure.savefig(path, metadata={"Date": None})


def shares_text(shares: Sequence[float | None]) -> str:
    each = ", ".join("not reached" if share is None else f"{share:.1%}" for share in shares)
    known = [share for share in shares if share is not None]
    return f"{statistics.mean(known):.1%} ({each})" if len(known) == len(shares) else each


def spread(bits: Sequence[float]) -> str:
    return f"{statistics.mean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})"


if __name__ == "__main__":
    main()
