"""The collectives of a compiled program, read from its text: kinds, counts, bytes, seconds.

`all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` and `collective-permute`, with their
asynchronous forms; those in the body of a loop count once per iteration.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
"""Collective operations by their names in XLA."""

_FOUND = re.compile(rf"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """The collectives of one kind, in one step, over groups of equal size."""

    kind: str
    group: int
    count: int
    bytes: int
    """Bytes of the whole arrays: those to be summed, those gathered, those to be scattered."""

    def seconds(self, bytes_per_second: float) -> float:
        """Seconds in a ring in which every device sends and receives this many bytes per second."""
        turns = 2.0 if self.kind == "all-reduce" else 1.0
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return turns * share * self.bytes / bytes_per_second


def read_collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a program for `devices` devices, `compiled.as_text()`, largest first."""
    bodies, entry = computations(text)
    times = run_counts(bodies, entry)
    count, size = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for name, lines in bodies.items():
        for line in lines if times[name] else ():
            match = _FOUND.match(line)
            if match:
                key = _kind(name, match[2]), _group(line, devices)
                count[key] += times[name]
                size[key] += times[name] * _bytes(match[1], match[2], bool(match[3]), key[1])
    collectives = [Collective(*key, count[key], size[key]) for key in count]
    return sorted(collectives, key=lambda each: -each.bytes)


def _kind(computation: str, kind: str) -> str:
    """A TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and a slice of it."""
    fused = computation.startswith("all-reduce-scatter") and kind == "all-reduce"
    return "reduce-scatter" if fused else kind


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies, entry


def run_counts(bodies: dict[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs; a loop of unknown length counts as one iteration."""
    times = Counter({entry: 1})
    for name in reversed(_in_order(bodies, entry)):
        for line in bodies[name]:
            for role, called in _calls(line):
                turns = _TURNS.search(line) if role == "body" else None
                times[called] += times[name] * (int(turns[1]) if turns else 1)
    return times


def _calls(line: str) -> Iterable[tuple[str, str]]:
    yield from _CALLED.findall(line)
    for several in _BRANCHES.findall(line):
        yield from (("branch", name.strip().lstrip("%")) for name in several.split(","))


def _in_order(bodies: dict[str, list[str]], entry: str) -> list[str]:
    """The computations reachable from `entry`, each after all that it calls."""
    done: dict[str, None] = {}
    waiting = [(entry, False)]
    while waiting:
        name, entered = waiting.pop()
        if entered:
            done.setdefault(name)
        elif name in bodies and name not in done:
            waiting.append((name, True))
            waiting += [(called, False) for line in bodies[name] for _, called in _calls(line)]
    return list(done)


def _group(line: str, devices: int) -> int:
    """The number of devices in each instance of the collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    grid = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
    if listed:
        return listed[1].count(",") + 1
    if grid:
        return int(grid[1])
    if mesh:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        group = 1
        # An axis may be split: 'axis_0':(2)4 is a factor of 4 of it.
        for name, part in re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", mesh[2]):
            group *= int(part or sizes[name])
        return group
    return devices


def _bytes(shape: str, kind: str, start: bool, group: int) -> int:
    arrays = [_array_bytes(*match) for match in _ARRAY.findall(shape)]
    # A TPU's compiler writes the outputs of other kinds alone, a GPU's ((inputs), outputs).
    if start and (kind == "all-gather" or shape.startswith("((")):
        arrays = arrays[len(arrays) // 2 :]
    elif start and kind == "collective-permute":  # and two counters
        arrays = arrays[1:2]
    return sum(arrays) * (group if kind == "reduce-scatter" else 1)


def _array_bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
    count = 1
    for length in filter(None, shape.split(",")):
        count *= int(length)
    return -(-count * bits // 8)
