"""The tutorials are notebooks: what they print was printed by a run, and is kept beside them.

    python docs/notebooks.py            executes every tutorial, in the order of the site
    python docs/notebooks.py NAME …     executes these alone, on what the others left

`docs/executed/NAME.ipynb` holds the cells of docs/NAME.md with their outputs. The site takes the
outputs from there, through a jupyter-cache that `fill_cache` makes, and executes nothing: a
tutorial whose cells are not those that were executed ends the build.

Cells run in docs/_build/tutorials, which looks like a clone of the repository to them.
"""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
EXECUTED = DOCS / "executed"
PLACE = DOCS / "_build" / "tutorials"
SEEN = ("LICENSE", "README.md", "bytelm", "bytelm_jax", "docs", "examples")
"""What of the repository the tutorials name."""

ORDER = ("train", "convert", "blt", "names", "fine-tune", "pytorch")
"""The tutorials in the order in which they are executed: later ones use the first one's model."""

SECONDS = 1800
"""The longest that a cell may take."""

CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def sources(page: str) -> list[str]:
    """The code of a page's cells; without nbformat, for the tests."""
    found = []
    for body in CELL.findall(page):
        lines = body.splitlines()
        while lines and (lines[0].startswith(":") or not lines[0].strip()):
            lines.pop(0)
        found.append("\n".join(lines).rstrip())
    return found


def pages() -> list[Path]:
    """The pages that are notebooks, in the order of execution."""
    return [DOCS / f"tutorial-{name}.md" for name in ORDER]


def stale() -> list[str]:
    """A line for each page whose cells are not those that were executed."""
    wrong = []
    for page in pages():
        file = EXECUTED / f"{page.stem}.ipynb"
        cells = json.loads(file.read_text("utf-8"))["cells"] if file.is_file() else []
        executed = ["".join(cell["source"]) for cell in cells]
        if executed != sources(page.read_text("utf-8")):
            hint = f"run scripts/docs --execute {page.stem}"
            wrong.append(f"docs/{page.name}: its cells differ from those executed; {hint}")
    return wrong


def read(page: Path) -> Any:
    """A page as a notebook, its code cells alone: read as the site does."""
    from myst_nb.core.read import read_myst_markdown_notebook

    notebook = read_myst_markdown_notebook(page.read_text("utf-8"), path=page)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return notebook


def execute(page: Path) -> None:
    """Runs the cells of a page, and writes them with their outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook, begin = read(page), time.perf_counter()
    before = _made()
    for path in _remembered(page):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    # A command that fails ends its cell, and an example runs on the CPU as the commands do.
    settings = {"SHELLOPTS": "braceexpand:errexit:hashall:pipefail", "COLUMNS": "100"}
    os.environ |= settings | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(PLACE)}})
    try:
        client.execute()
    finally:
        made = sorted(str(path) for path in (_made() - before) | set(_remembered(page)))
        (PLACE / f".{page.stem}").write_text("\n".join(made))
    EXECUTED.mkdir(exist_ok=True)
    kept = nbformat.v4.new_notebook(metadata={"kernelspec": notebook.metadata.kernelspec})
    for number, cell in enumerate(notebook.cells, 1):
        outputs = _joined([_tidy(output) for output in cell.outputs])
        clean = nbformat.v4.new_code_cell(cell.source, execution_count=number, outputs=outputs)
        clean.id = f"cell-{number}"
        kept.cells.append(clean)
    text = nbformat.writes(kept)
    (EXECUTED / f"{page.stem}.ipynb").write_text(text + "\n", "utf-8")
    print(f"executed {page.stem} in {time.perf_counter() - begin:.0f} s", flush=True)


def _made() -> set[Path]:
    """What tutorials made in their folder: files, and folders of runs and exports."""
    folders = [PLACE, *(PLACE / name for name in ("runs", "exports"))]
    return {path for folder in folders if folder.is_dir() for path in folder.iterdir()
            if path.name not in ("runs", "exports") and not path.is_symlink()}  # fmt: skip


def _remembered(page: Path) -> list[Path]:
    """What an earlier execution of the page made."""
    note = PLACE / f".{page.stem}"
    return [Path(line) for line in note.read_text().splitlines()] if note.is_file() else []


def _tidy(output: Any) -> Any:
    """An output without what differs from machine to machine and says nothing."""
    if output.output_type == "stream":
        output.text = output.text.replace(f"{PLACE}/", "")
    if "execution_count" in output:
        output.execution_count = None
    return output


def _joined(outputs: list[Any]) -> list[Any]:
    """Neighbouring pieces of one stream as one: a run writes them as they come."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == "stream" == last.output_type and last.name == output.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def fill_cache(folder: Path) -> None:
    """Makes a jupyter-cache of what was executed; raises `ValueError` for a stale page."""
    from jupyter_cache import get_cache

    shutil.rmtree(folder, ignore_errors=True)
    if wrong := stale():
        raise ValueError("\n".join(wrong))
    cache = get_cache(folder)
    for page in pages():
        cache.cache_notebook_file(str(EXECUTED / f"{page.stem}.ipynb"), uri=str(page))
        try:
            cache.match_cache_notebook(read(page))
        except KeyError:
            raise ValueError(f"docs/{page.name}: read otherwise than when executed") from None


def main(names: list[str]) -> int:
    """Executes all tutorials in a fresh folder, or the named ones in the folder that is there."""
    wanted = [page for page in pages() if not names or page.stem in names]
    if unknown := set(names) - {page.stem for page in wanted}:
        print(f"{', '.join(sorted(unknown))}: no such tutorial", file=sys.stderr)
        return 2
    if not names:
        shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True, exist_ok=True)
    for name in SEEN:
        if not (PLACE / name).is_symlink():
            (PLACE / name).symlink_to(DOCS.parent / name)
    for page in wanted:
        execute(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
