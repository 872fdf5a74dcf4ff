"""Sweeps over hyperparameters: the points of a grid, random points, and the table of results.

A field goes by its name on the command line of `bytelm train`. FIELD=A,B,… lists values.
FIELD=LOW:HIGH is a range, FIELD=LOW:HIGH:log one with an even logarithm; ranges of whole numbers
stay whole.
"""

import csv
import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bytelm.files import replace_file
from bytelm.metrics import METRIC

Point = dict[str, str]


def points(vary: Sequence[str], count: int, seed: int) -> list[Point]:
    """The grid of `vary`, or `count` random points of it; raises `ValueError`."""
    axes = dict(_axis(text) for text in vary)
    if not count:
        ranges = [name for name, values in axes.items() if isinstance(values, tuple)]
        if ranges:
            raise ValueError(f"{ranges[0]}: a range needs --random N, or list its values")
        return [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]
    source = random.Random(seed)
    return [{name: _draw(values, source) for name, values in axes.items()} for _ in range(count)]


def _axis(text: str) -> tuple[str, list[str] | tuple[str, ...]]:
    name, _, values = text.partition("=")
    if not name or not values:
        raise ValueError(
            f"--vary {text}: write FIELD=A,B,… or FIELD=LOW:HIGH or FIELD=LOW:HIGH:log"
        )
    ends = tuple(values.split(":"))
    if len(ends) == 1:
        return name, values.split(",")
    try:
        low, high = map(float, ends[:2])
    except ValueError:
        raise ValueError(f"--vary {text}: LOW and HIGH must be numbers") from None
    logarithmic = ends[2:] == ("log",)
    if not (low < high and (ends[2:] == () or (logarithmic and low > 0))):
        raise ValueError(f"--vary {text}: needs LOW < HIGH, above 0 for log")
    return name, ends


def _draw(values: list[str] | tuple[str, ...], source: random.Random) -> str:
    if isinstance(values, list):
        return source.choice(values)
    low, high = map(float, values[:2])
    if len(values) == 3:
        value = math.exp(source.uniform(math.log(low), math.log(high)))
    else:
        value = source.uniform(low, high)
    whole = all(end.lstrip("-").isdigit() for end in values[:2])
    return str(round(value)) if whole else f"{value:.4g}"


def report(rows: list[tuple[Point, dict[str, Any]]], out: Path) -> None:
    """Prints what the points gave as a table, best first; writes it as JSON and CSV in `out`."""
    from rich.console import Console
    from rich.table import Table

    def rank(row: tuple[Point, dict[str, Any]]) -> float:
        _, result = row
        best = result.get(METRIC, result.get("bits_per_byte"))
        return math.inf if result["outcome"] != "finished" or best is None else best

    records = [point | result for point, result in sorted(rows, key=rank)]
    columns = list(dict.fromkeys(name for record in records for name in record))
    table = Table(*(name for name in columns if name != "message"))
    for record in records:
        values = (record.get(name, "") for name in columns if name != "message")
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in values))
    Console().print(table)
    replace_file(out / "results.json", (json.dumps(records, indent=1) + "\n").encode())
    with open(out / "results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)
