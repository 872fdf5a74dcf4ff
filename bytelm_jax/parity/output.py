"""A parity report for other programs: JSON, JUnit's XML, and one page of HTML."""

import json
import platform
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bytelm
from bytelm.files import replace_file, require_file_to_write
from bytelm_jax.parity.report import Report, Row

_PACKAGES = ("jax", "jaxlib", "flax", "torch", "numpy")
_GRADIENT = "gradient of "
_FOLDED = {
    "Gradients at inputs and outputs of layers": "gradient at ",
    "Prompt, layer by layer": "prefill: ",
    "Cached decoding, layer by layer": "decoding, round ",
}
"""Rows of the whole model that the page folds by what they begin with: there are hundreds."""


def check_files(**files: Path) -> None:
    """Raises `ValueError` for files, by option, that cannot be written; an empty path is none."""
    for option, file in files.items():
        if file != Path():
            require_file_to_write(file, f"--{option} {file}")


def write_files(report: Report, junit: Path, html: Path) -> None:
    """Writes the files that are not the empty path."""
    for file, form in (junit, to_junit), (html, to_html):
        if file != Path():
            replace_file(file, form(report).encode("utf-8"))


def about(report: Report) -> dict[str, Any]:
    """What was compared and by which versions."""
    return report.about | {"versions": _versions()}


def _versions() -> dict[str, str]:
    found = {"bytelm": bytelm.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def to_json(report: Report) -> str:
    """One object: `passed`, `verdict`, `first` and `seen` (null if passed), `rows`, and `about`."""
    rows = [
        {"what": row.what, "verdict": row.verdict, "passed": row.good, "blamed": row.blamed}
        for row in report.rows
    ]
    record = {"passed": report.passed, "verdict": report.verdict}
    record |= {"first": report.first, "seen": report.seen, "about": about(report), "rows": rows}
    return json.dumps(record, ensure_ascii=False)


def to_junit(report: Report) -> str:
    """A test suite with a test case for each row."""
    failures = sum(not row.good for row in report.rows)
    counts = {"tests": str(len(report.rows)), "failures": str(failures), "errors": "0"}
    suite = ElementTree.Element("testsuite", {"name": "bytelm parity"} | counts)
    properties = ElementTree.SubElement(suite, "properties")
    facts = about(report)
    for name, value in (facts | facts.pop("versions")).items():
        ElementTree.SubElement(properties, "property", name=name, value=str(value))
    for row in report.rows:
        case = ElementTree.SubElement(suite, "testcase", classname=_section(row), name=row.what)
        if not row.good:
            message = f"{row.verdict}: past tolerance; layer at fault: {row.blamed or row.what}"
            ElementTree.SubElement(case, "failure", message=message).text = report.verdict
    return ElementTree.tostring(suite, "utf-8", xml_declaration=True).decode() + "\n"


def _section(row: Row) -> str:
    name = row.what
    if name.startswith(("logits", "loss", "greedy", "generation", "cached")):
        return "bytelm.parity.whole"
    if name.startswith("gradient"):
        return "bytelm.parity.gradients"
    return "bytelm.parity." + ("decoding" if "decoding" in name else "layers")


# ---- the page -------------------------------------------------------------------------------


@dataclass
class _Node:
    """A layer in the tree: its rows, and the layers in it by name."""

    rows: list[Row] = field(default_factory=list)
    inside: dict[str, "_Node"] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return all(r.good for r in self.rows) and all(n.is_good for n in self.inside.values())


def _layer_of(row: Row, layers: set[str]) -> str | None:
    """The layer that a row belongs to; None for a row about the whole model."""
    name = row.what.removeprefix(_GRADIENT).removeprefix("input of ")
    name = name.split(" (call ")[0].split(", ")[0].split(": ")[0]
    if row.what.startswith(_GRADIENT):
        name = name.rpartition(".")[0]
    return name if name in layers else None


def _tree(report: Report) -> tuple[_Node, list[Row]]:
    """Layers by the parts of their names, and the rows that are about no layer alone."""
    gradients = {r.what for r in report.rows if r.what.startswith(_GRADIENT)}
    layers = {g.removeprefix(_GRADIENT).rpartition(".")[0] for g in gradients}
    whole = ("logits", "loss", "inputs and outputs", "gradients at", "gradient at", "layers in")
    whole += ("greedy", "generation", "cached decoding", "decoding", "prefill")
    for row in report.rows:
        if not row.what.startswith((*whole, _GRADIENT)):
            name = row.what.removeprefix("input of ").split(" (call ")[0]
            layers.add(name.split(", ")[0].split(": ")[0])
    root, rest = _Node(), []
    for row in report.rows:
        layer = _layer_of(row, layers)
        if layer is None:
            rest.append(row)
            continue
        node = root
        for part in layer.split(".") if layer else ():
            node = node.inside.setdefault(part, _Node())
        node.rows.append(row)
    return root, rest


def to_html(report: Report) -> str:
    """A page without anything from elsewhere: verdict, tree of layers, the rest, versions."""
    root, rest = _tree(report)
    facts = about(report)
    listed = ", ".join(f"{name} {value}" for name, value in facts.pop("versions").items())
    kept = ", ".join(f"{name} {value}" for name, value in facts.items())
    state = "good" if report.passed else "bad"
    fault = ""
    if not report.passed:
        fault = f"<p>Layer at fault: <a href='#first'><code>{escape(str(report.first))}</code></a>"
        fault += f"; first seen at <code>{escape(str(report.seen))}</code></p>"
    first = next((row for row in report.rows if not row.good), None)
    body = [
        f"<h1 class={state}>{escape(report.verdict)}</h1>{fault}",
        f"<p>{escape(kept)}<br>{escape(listed)}</p>",
        "<h2>Layers</h2>",
        *(_nested(name, node, first) for name, node in root.inside.items()),
        *_lines(root.rows, first),
        "<h2>The whole model</h2>",
        *_whole_model(rest, first),
    ]
    return _PAGE.format(title=escape(report.verdict), body="\n".join(body))


def _nested(name: str, node: _Node, first: Row | None) -> str:
    inside = [_nested(part, child, first) for part, child in node.inside.items()]
    lines = [*_lines(node.rows, first), *inside]
    return _details(f"<code>{escape(name)}</code>", node, lines, not node.is_good)


def _details(name: str, node: _Node, lines: list[str], is_open: bool) -> str:
    state, opened = "good" if node.is_good else "bad", " open" if is_open else ""
    label = f"<summary class={state}>{name} {escape(_worst(node))}</summary>"
    return "\n".join([f"<details{opened}>{label}", *lines, "</details>"])


def _whole_model(rows: list[Row], first: Row | None) -> list[str]:
    """Rows about no layer alone, and behind them the long lists, open where the fault is first."""
    left, folds = rows, []
    for name, prefix in _FOLDED.items():
        inside = [r for r in left if r.what.startswith(prefix) and not r.what.endswith(": logits")]
        left = [row for row in left if not any(row is other for other in inside)]
        if inside:
            is_open = any(row is first for row in inside)
            folds.append(_details(name, _Node(inside), _lines(inside, first), is_open))
    return [*_lines(left, first), *folds]


def _worst(node: _Node) -> str:
    """The largest relative error in a layer and in those within it."""
    errors: list[float] = []

    def collect(node: _Node) -> None:
        for row in node.rows:
            try:
                errors.append(float(row.verdict))
            except ValueError:
                continue
        for child in node.inside.values():
            collect(child)

    collect(node)
    return f"at most {max(errors):.1e}" if errors else ""


def _lines(rows: list[Row], first: Row | None) -> list[str]:
    lines = []
    for row in rows:
        mark = " id=first" if row is first else ""
        state = "good" if row.good else "bad"
        verdict, what = escape(row.verdict), escape(row.what)
        lines.append(f"<p class={state}{mark}><code>{verdict:>10}</code> {what}</p>")
    return lines


_PAGE = """<!DOCTYPE html>
<html lang=en><head><meta charset=utf-8><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  overflow-wrap: anywhere; }}
details {{ margin-left: 1.2em; }} details > p {{ margin-left: 1.2em; }}
p {{ margin: .1em 0; }} h1 {{ font-size: 1.3em; }} code {{ white-space: pre-wrap; }}
.good::before {{ content: "✓ "; color: #197a2e; }} .bad::before {{ content: "✗ "; }}
.bad {{ color: #b3261e; }} #first {{ background: #fff1a8; color: #7a120c; font-weight: bold; }}
</style></head><body>
{body}
</body></html>
"""
