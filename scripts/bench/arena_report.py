"""The tables and figures of an arena, from the lines that `arena.py` wrote.

    python scripts/bench/arena_report.py arena.jsonl --figures docs/figures

Prints tables in Markdown: each arm's best run at equal seconds, at equal bytes, and every run.
`--figures` writes `arena_seconds.svg`, `arena_bytes.svg` and `arena_flops.svg`: the curves of the
best run of each arm on 64 windows of the first held-out set.
"""

import argparse
import math
import re
import statistics
from pathlib import Path
from typing import Any

from arena import Cell, bits

from bytelm.files import read_json_lines

AXES = {
    "seconds": ("seconds of training", lambda line, point: point[0]),
    "bytes": ("megabytes read", lambda line, point: point[1] / 1e6),
    "flops": ("PFLOP of the model", lambda line, point: point[1] * line["flops_per_byte"] / 1e15),
}
"""What the curves are drawn over: its name, and its value at a point."""


def cell(line: dict[str, Any]) -> Cell:
    """Which run a line is of."""
    return Cell(*line["cell"])


def name(arm: str) -> str:
    """An arm as tables show it."""
    return re.sub(r" --(model[.])?", ", ", arm)


def best_of_arms(lines: list[dict[str, Any]], optimizer: str = "") -> list[dict[str, Any]]:
    """The best of the longest runs of each arm that its seconds ended, best first."""
    timed = [x for x in lines if not cell(x).bytes and optimizer in ("", cell(x).optimizer)]
    longest = max(cell(line).seconds for line in timed)
    found: dict[str, dict[str, Any]] = {}
    for line in sorted(timed, key=bits):
        if cell(line).seconds == longest:
            found.setdefault(cell(line).arm, line)
    return list(found.values())


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def shown(value: float | None) -> str:
    """Bits per byte."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "diverged"


def at_equal_seconds(lines: list[dict[str, Any]]) -> str:
    """The best run of each arm, with the spread over the seeds of its rate and optimizer."""
    rows = []
    for line in best_of_arms(lines):
        run = cell(line)
        twins = [bits(x) for x in lines if cell(x)._replace(seed=run.seed) == run]
        spread = f"{statistics.stdev(twins):.4f} of {len(twins)}" if len(twins) > 1 else "one seed"
        share = "" if line["mfu"] is None else f", {100 * line['mfu']:.1f} %"
        rows.append(
            [name(run.arm), f"{line['parameters']:,}", run.optimizer, f"{line['learning_rate']:g}"]
            + [f"{line['seconds']:g}", f"{line['bytes'] / 1e6:.1f}", f"{line['passes']:.2f}"]
            + [f"{line['bytes_per_second'] / 1e3:,.0f} kB/s{share}"]
            + [shown(value) for value in line["bits_per_byte"].values()]
            + [spread]
        )
    sets = list(lines[0]["bits_per_byte"])
    head = ["arm", "parameters", "optimizer", "rate", "seconds", "MB read", "passes", "speed"]
    return table([*head, *sets, "deviation over seeds"], rows)


def at_equal_bytes(lines: list[dict[str, Any]]) -> str:
    """Runs that were given as many bytes as the first arm read in its time, and that one."""
    read = max((cell(line).bytes for line in lines), default=0)
    if not read:
        return "no runs at equal bytes yet"
    same = [x for x in lines if cell(x).bytes == read]
    same += [x for x in lines if not cell(x).bytes and x["bytes"] == read][:1]
    rows = [
        [name(cell(line).arm), f"{line['bytes'] / 1e6:.1f}", f"{line['seconds']:g}"]
        + [f"{line['bytes'] * line['flops_per_byte'] / 1e15:.1f}"]
        + [shown(value) for value in line["bits_per_byte"].values()]
        for line in sorted(same, key=bits)
    ]
    return table(["arm", "MB read", "seconds", "PFLOP", *lines[0]["bits_per_byte"]], rows)


def every_run(lines: list[dict[str, Any]]) -> str:
    """One row a run."""
    rows = []
    for line in lines:
        run, read = cell(line), f"{line['bytes'] / 1e6:.1f}"
        row = [name(run.arm), run.optimizer, f"{line['learning_rate']:g}", str(run.seed)]
        rows.append([*row, f"{line['seconds']:g}", read, shown(bits(line))])
    return table(["arm", "optimizer", "rate", "seed", "seconds", "MB read", "bits per byte"], rows)


def draw(lines: list[dict[str, Any]], axis: str, path: Path) -> None:
    """The curves of the best run of each arm, held out, and behind them those of training."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "arena"  # the same file from the same lines
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, (label, value) = figure.subplots(), AXES[axis]
    ends = []
    for number, line in enumerate(best_of_arms(lines)):
        points = [point for point in line["curve"] if None not in point]
        if not points:
            continue
        places = [value(line, point) for point in points]
        legend = f"{name(cell(line).arm)}: {shown(bits(line))}"
        axes.plot(places, [point[2] for point in points], color=f"C{number}", label=legend)
        training = [point[3] for point in points]
        axes.plot(places, training, color=f"C{number}", linewidth=0.8, alpha=0.4)
        ends += [point[2] for point in points]
    if ends:
        axes.set_ylim(min(ends) - 0.1, min(max(ends), min(ends) + 1.5))
    axes.set(xlabel=label, ylabel="bits per byte (thin: training)")
    axes.set_title(f"Held-out text, {lines[0]['device']}, {lines[0]['date']}")
    axes.grid(alpha=0.3)
    axes.legend(title="at the end, all held-out bytes")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Prints the tables, and draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("lines", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--figures", type=Path, metavar="DIR")
    args = parser.parse_args()
    lines = read_json_lines(args.lines)
    if not any(math.isfinite(bits(line)) for line in lines):
        parser.error(f"{args.lines}: holds no run that ended well")
    for title, text in (
        ("At equal seconds, up to one pass", at_equal_seconds(lines)),
        ("At equal bytes", at_equal_bytes(lines)),
        ("Every run", every_run(lines)),
    ):
        print(f"### {title}\n\n{text}\n")
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        for axis in AXES:
            draw(lines, axis, args.figures / f"arena_{axis}.svg")


if __name__ == "__main__":
    main()
