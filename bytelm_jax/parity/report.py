"""The report behind `bytelm parity`: both twins on the same bytes, layer by layer.

Imports both packages lazily, so that the rest of `bytelm_jax` never needs torch. The twins run one
after the other, torch first; its recording is kept in files, so that memory holds only one model at
a time, its gradients, and the activations of a training step on these rows.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bytelm import data, export, runs
from bytelm.config import ModelConfig, require
from bytelm.remote.copies import local_copy
from bytelm.tolerances import GRADIENTS, LOGITS
from bytelm_jax.interop import convert
from bytelm_jax.models import Params
from bytelm_jax.parity.hostile import hostile_rows
from bytelm_jax.parity.recording import ArrayStore, Tap
from bytelm_jax.parity.twins import Recording, make_twin, record_jax, record_torch
from bytelm_jax.training import checkpoint

_SMALL_BATCH = 1 << 16
"""Bytes that a comparison may take even of less data, the rest padded."""


class Row(NamedTuple):
    """One line of a report: what was compared, how they differ, whether that is within bounds."""

    what: str
    verdict: str
    good: bool
    blamed: str
    """The layer at fault, if this is not good; empty if no layer can be named."""


@dataclass
class Report:
    """The rows of a comparison, and the layer at fault for the first value past its tolerance."""

    rows: list[Row] = field(default_factory=list)
    first: str | None = None
    seen: str | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """What was compared: path, dtype, bytes, versions."""

    @property
    def lines(self) -> list[str]:
        """The rows as text."""
        return [f"{'ok  ' if r.good else 'PAST'} {r.verdict:>8}  {r.what}" for r in self.rows]

    @property
    def passed(self) -> bool:
        """Whether everything was within tolerance."""
        return self.first is None

    @property
    def text(self) -> str:
        """The report as text."""
        return "\n".join([*self.lines, self.verdict])

    @property
    def verdict(self) -> str:
        """The last line: whether all is equal, or the layer at fault."""
        if self.passed:
            return "equal: every tensor within tolerance"
        seen = "" if self.seen == self.first else f" (first seen: {self.seen})"
        return f"DIFFERENT from {self.first} on{seen}"

    def compare(
        self,
        what: str,
        ours: np.ndarray,
        theirs: np.ndarray,
        bound: float,
        blamed: str = "",
        floor: float = 0.0,
    ) -> None:
        """Adds one tensor; `blamed` is the layer at fault if it is the first that differs."""
        verdict, good = difference(ours, theirs, bound, floor)
        self.add(what, verdict, good, blamed)

    def compare_all(
        self, what: str, rows: Iterable[tuple[str, str, np.ndarray, np.ndarray]], bound: float
    ) -> None:
        """Adds one line for many tensors, (name, blamed, ours, theirs), and one per difference.

        Errors are relative to at least a thousandth of the largest norm: a tensor that should be
        zero is noise in both twins and has no digits to compare.
        """
        count, largest = 0, 0.0
        for name, blamed, ours, theirs in rows:
            count, largest = count + 1, max(largest, _norm(theirs))
            verdict, good = difference(ours, theirs, bound, floor=1e-3 * largest)
            if not good:
                self.add(name, verdict, good, blamed)
        self.add(f"{what}: {count} arrays", "compared", True)

    def add(self, what: str, verdict: str, good: bool, blamed: str = "") -> None:
        """Adds one line."""
        self.rows.append(Row(what, verdict, good, blamed))
        if not good and self.first is None:
            self.first, self.seen = blamed or what, what


def difference(
    ours: np.ndarray, theirs: np.ndarray, bound: float, floor: float = 0.0
) -> tuple[str, bool]:
    """The difference of two arrays as text, and whether it is within the bound."""
    if ours.shape != theirs.shape:
        return f"shape {ours.shape} against {theirs.shape}", False
    if theirs.dtype.kind in "iub":
        wrong = int((ours != theirs).sum())
        return (f"{wrong} of {theirs.size}" if wrong else "same"), not wrong
    error = relative_error(ours, theirs, floor)
    return f"{error:.1e}", error <= bound


def relative_error(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> float:
    """‖a − b‖ / ‖b‖ in float64; the absolute error if b is zero; infinite if not finite.

    `floor` replaces ‖b‖ where that is smaller.
    """
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.linalg.norm(a - b)) / (max(_norm(b), floor) or 1.0)


def _norm(value: np.ndarray) -> float:
    return float(np.linalg.norm(value.astype(np.float64)))


# ---- both twins -----------------------------------------------------------------------------


def compare(
    path: Path,
    dtype: str,
    corpus: data.Corpus,
    rows: int,
    length: int,
    which: str,
    kinds: str = "all",
) -> Report:
    """Compares the twins of a run folder or an export in `dtype` on `rows` windows of `corpus`.

    `kinds` are the bytes: "real" ones, the "hostile" ones of `bytelm_jax.parity.hostile`, or "all".
    `path` may be an address.

    Raises `ValueError` for files that cannot be read, and if torch is not installed.
    """
    try:
        import bytelm_torch  # noqa: F401
    except ImportError:
        raise ValueError("torch: not installed; install bytelm[torch]") from None
    with local_copy(path, which) as copy:
        report = _compare(copy, dtype, corpus, rows, length, which, kinds)
    report.about = {"model": str(path)} | report.about
    return report


def _compare(
    path: Path, dtype: str, corpus: data.Corpus, rows: int, length: int, which: str, kinds: str
) -> Report:
    import bytelm_torch

    require(path.exists(), f"{path}: does not exist; check the spelling")
    require(path.is_dir(), f"{path}: is a file; give a run folder or an export")
    exported = export.holds_weights(path)
    chosen = not exported or which == "latest"
    require(chosen, f"checkpoint={which}: {path} is not a run folder; leave it out")
    require(rows >= 1, f"rows={rows}: must be at least 1")
    config = export.read_description(path).config if exported else runs.load_recipe(path).model
    length = length or _default_length(config)
    limit = config.longest_input
    fits = limit is None or length <= limit
    require(fits, f"length={length}: must be at most the model's max_length={limit}")
    size = max(corpus.total_bytes, _SMALL_BATCH)
    fits = rows * length <= size
    require(fits, f"rows={rows}: times length={length} it must be at most the data's {size} bytes")
    ids, counted, names = _rows_of(config, corpus, rows, length, kinds)

    def load() -> Params:
        if exported:
            return convert.load_export(path, lambda _, array: array.astype(dtype))[1]
        return checkpoint.load_run(path, which)[1]

    def twin() -> Any:
        return bytelm_torch.from_pretrained(path) if exported else make_twin(config, load())

    with ArrayStore() as store:
        theirs = record_torch(config, twin(), ids, dtype, store, counted=counted)
        ours = partial(record_jax, config, load, ids, dtype, counted=counted)
        tied = config.has_tied_gradients and kinds == "hostile"
        report = compare_recordings(config, dtype, theirs, ours, names, not tied)
    report.about = {"dtype": dtype, "bytes": kinds, "rows": len(ids), "length": length}
    return report


def _rows_of(
    config: ModelConfig, corpus: data.Corpus, rows: int, length: int, kinds: str
) -> tuple[np.ndarray, np.ndarray | None, dict[str, int]]:
    """The ids, what of them is counted, and the rows of hostile bytes by name.

    Hostile rows are not counted beside real ones where their gradients depend on rounding.
    """
    hostile = {} if kinds == "real" else hostile_rows(config.vocab, length)
    if kinds == "hostile":
        return np.stack(list(hostile.values())), None, {name: i for i, name in enumerate(hostile)}
    windows = data.Windows(corpus, config.vocab, length, append_eos=False)
    batch = next(data.evaluation_batches(windows, rows, rows))
    counted = np.ones(batch.ids.shape, bool) if batch.counted is None else batch.counted
    wrong = f"rows={rows}: no byte of these windows is counted; take more, or longer ones"
    require(bool(counted.any()), wrong)
    ids = np.concatenate([batch.ids, *(row[None] for row in hostile.values())])
    rest = np.full((len(hostile), length), not config.has_tied_gradients)
    return ids, np.concatenate([counted, rest]), {name: rows + i for i, name in enumerate(hostile)}


def _default_length(config: ModelConfig) -> int:
    """An odd number just over four patches; with resets enough for several lines."""
    length = 131 if config.reset_on == "newline" else config.parity_length
    return min(length, config.longest_input or length)


def compare_twins(
    config: ModelConfig, params: Params, twin: Any, ids: np.ndarray, dtype: str
) -> Report:
    """Compares layers, logits, loss, gradients and greedy generation on ids int[B, T]."""
    theirs = record_torch(config, twin, ids, dtype)
    ours = partial(record_jax, config, lambda: params, ids, dtype)
    return compare_recordings(config, dtype, theirs, ours)


# ---- comparison -----------------------------------------------------------------------------


def compare_recordings(
    config: ModelConfig,
    dtype: str,
    theirs: Recording,
    record_ours: Callable[[Mapping[str, tuple[int, ...]]], Recording],
    names: Mapping[str, int] | None = None,
    gradients: bool = True,
) -> Report:
    """The report of two recordings, in the order of execution.

    `names` are rows whose logits are also compared alone. `gradients=False` leaves those out.
    """
    report, ours = Report(), record_ours(theirs.moving)
    forward, backward = LOGITS[dtype], GRADIENTS[dtype]
    _compare_taps(report, ours, theirs, forward)
    for name in ("logits", "loss"):
        report.compare(name, ours.values[name], theirs.values[name], forward)
    for name, row in (names or {}).items():
        logits = ours.values["logits"][row], theirs.values["logits"][row]
        report.compare(f"logits on {name}", *logits, forward)
    if gradients:
        _compare_gradients(report, ours, theirs, backward, float(np.finfo(dtype).eps))
    else:
        why = "a maximum of equal values goes where rounding says"
        report.add(f"gradients on hostile bytes alone: {why}", "left out", True)
    if not config.causal:
        report.add("generation: causal=False, an encoder does not generate", "left out", True)
    elif theirs.texts is not None and ours.texts is not None:
        if ours.cached and theirs.cached:
            _compare_decoding(report, ours, theirs, forward)
        else:
            same, one = ours.cached == theirs.cached, "JAX" if ours.cached else "torch"
            why = "the model has none" if same else f"only that of {one} has it"
            report.add(f"cached decoding: {why}", "left out" if same else "differ", same)
        count, same = sum(map(len, theirs.texts)), ours.texts == theirs.texts
        report.add(f"greedy generation, {count} bytes", "same" if same else "differ", same)
    return report


def _shared(ours: Recording, theirs: Recording, taps: list[Tap]) -> list[Tap]:
    """The taps that both recordings have; inputs may be passed as different numbers of arrays."""
    return [p for p in taps if p.key in ours.values and p.key in theirs.values]


def _compare_taps(report: Report, ours: Recording, theirs: Recording, bound: float) -> None:
    count, unseen = 0, {tap.key for tap in ours.taps if not tap.entering}
    for tap in theirs.taps:  # in torch's order of execution
        key = tap.key
        if key not in ours.values:
            if not tap.entering:
                report.add(key, "only torch", False, tap.blamed)
            continue
        a, b = ours.values[key], theirs.values[key]
        if tap.entering:  # an axis of length 1 is nobody's fault
            a, b = a.squeeze(), b.squeeze()
        count += 1
        if not tap.entering or not difference(a, b, bound)[1]:
            report.compare(key, a, b, bound, tap.blamed)
        unseen.discard(key)
    for key in sorted(unseen):
        report.add(key, "only JAX", False)
    report.add(f"inputs and outputs of layers: {count} arrays", "compared", True)


def _compare_gradients(
    report: Report, ours: Recording, theirs: Recording, bound: float, rounding: float
) -> None:
    """Backwards from the loss: first at every tap, then for every parameter.

    A gradient that nearly vanishes, as under a saturated softmax, is a difference of terms that do
    not: what it is off by may reach `rounding`, one unit in the last place, of the largest.
    """

    def rows() -> Iterable[tuple[str, str, np.ndarray, np.ndarray]]:
        for tap in reversed(_shared(ours, theirs, theirs.taps)):
            key = f"gradient at {tap.key}"
            if key in ours.values and tap.key in theirs.moving:
                gradient = ours.values[key]
                yield key, tap.backward_blamed, gradient, _or_zero(theirs.values, key, gradient)

    report.compare_all("gradients at inputs and outputs of layers", rows(), bound)
    keys = sorted(key for key in ours.values if key.startswith("gradient of "))
    floor = rounding / bound * max((_norm(ours.values[key]) for key in keys), default=0.0)
    for key in keys:
        blamed = key.removeprefix("gradient of ").rpartition(".")[0]
        gradient = ours.values[key]
        if key in theirs.values:
            report.compare(key, gradient, theirs.values[key], bound, blamed, floor)
        else:  # frozen: torch has none, so ours must be zero to the last bit
            moved = bool(np.any(gradient))
            report.add(key, "not zero" if moved else "none", not moved, blamed)


def _or_zero(values: MutableMapping[str, np.ndarray], key: str, template: np.ndarray) -> np.ndarray:
    return values[key] if key in values else np.zeros_like(template)


def _compare_decoding(report: Report, ours: Recording, theirs: Recording, bound: float) -> None:
    def rows() -> Iterable[tuple[str, str, np.ndarray, np.ndarray]]:
        for tap in _shared(ours, theirs, theirs.decoding):
            a, b = ours.values[tap.key], theirs.values[tap.key]
            if a.shape == b.shape or not tap.entering:  # JAX masks what torch cuts off
                yield tap.key, tap.blamed, a, b

    report.compare_all("layers in cached decoding", rows(), bound)
    for key in [key for key in theirs.values if key.endswith(": logits")]:
        report.compare(key, ours.values[key], theirs.values[key], bound)
