"""Tutorials are notebooks: what they print was printed by a run, and is kept beside them.

    python docs/notebooks.py            executes every tutorial, in the order of the site
    python docs/notebooks.py NAME …     executes these alone, on what the others left

`docs/executed/NAME.ipynb` holds the cells of docs/NAME.md with their outputs. The site takes the
outputs from there, through a jupyter-cache that `fill_cache` makes, and executes nothing: a
tutorial whose cells are not those that were executed ends the build.

Cells run in docs/_build/tutorials, which looks like a clone of the repository to them.
"""

import itertools
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

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "SHELLOPTS": "braceexpand:errexit:hashall:pipefail",  # a command that fails ends its cell
    "COLUMNS": "100",
    "MPLBACKEND": "agg",
    "TTY_COMPATIBLE": "0",  # lines in place of a progress bar, though Jupyter claims a terminal
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's advice to install a widget
    "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA's alarm at a slow compilation tells of the machine alone
}
"""What the kernel, and so the commands, find in their environment."""

SECONDS = 3600
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
    tutorials = [DOCS / f"tutorial-{name}.md" for name in ORDER]
    return [page for page in tutorials if "file_format: mystnb" in page.read_text("utf-8")]


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
    """Runs the cells of a page, and writes them with their outputs.

    Where an earlier call failed, commands that had ended well are not run again.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook, begin = read(page), time.perf_counter()
    note = PLACE / f".{page.stem}.json"
    past = json.loads(note.read_text("utf-8")) if note.is_file() else {"made": [], "cells": []}
    same = _unchanged(notebook.cells, past["cells"])
    if not same:
        for path in map(Path, past["made"]):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    before = _made() - {Path(path) for path in past["made"]}
    os.environ |= ENVIRONMENT
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(PLACE)}})
    for cell, old in zip(notebook.cells[:same], past["cells"], strict=False):
        cell.outputs = [nbformat.from_dict(each) for each in old["outputs"]]
    made = past["made"]
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if index < same and cell.source.startswith("%%bash"):
                continue
            client.execute_cell(cell, index)
            cell.outputs = [_tidy(output) for output in _joined(cell.outputs)]
            made = sorted(map(str, _made() - before))
            so_far = notebook.cells[: max(index + 1, same)]
            cells = [{"source": each.source, "outputs": each.outputs} for each in so_far]
            note.write_text(json.dumps({"made": made, "cells": cells}), "utf-8")
    EXECUTED.mkdir(exist_ok=True)
    language = {"name": "python", "pygments_lexer": "ipython3"}  # colours %%bash cells, too
    metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": language}
    kept = nbformat.v4.new_notebook(metadata=metadata)
    for number, cell in enumerate(notebook.cells, 1):
        clean = nbformat.v4.new_code_cell(cell.source, execution_count=number, outputs=cell.outputs)
        clean.id = f"cell-{number}"
        kept.cells.append(clean)
    (EXECUTED / f"{page.stem}.ipynb").write_text(nbformat.writes(kept) + "\n", "utf-8")
    note.write_text(json.dumps({"made": made, "cells": []}), "utf-8")
    print(f"executed {page.stem} in {time.perf_counter() - begin:.0f} s", flush=True)


def _unchanged(cells: list[Any], past: list[dict[str, Any]]) -> int:
    """How many of the first cells were executed as they stand.

    Python is executed again in spite of it, since it leaves its names in the kernel.
    """
    pairs = zip(cells, past, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda p: p[0].source == p[1]["source"], pairs))


def _made() -> set[Path]:
    """What tutorials made in their folder: files, and folders of runs and exports."""
    folders = [PLACE, *(PLACE / name for name in ("runs", "exports"))]
    return {path for folder in folders if folder.is_dir() for path in folder.iterdir()
            if path.name not in ("runs", "exports") and not path.is_symlink()}  # fmt: skip


def _tidy(output: Any) -> Any:
    """An output without what differs from machine to machine and says nothing."""
    if output.output_type == "stream":
        output.text = shown(output.text.replace(f"{PLACE}/", ""))
    if "execution_count" in output:
        output.execution_count = None
    return output


def shown(text: str) -> str:
    """What a terminal shows in the end: without colours, and without lines that were replaced."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return re.sub(r"[^\n]*\r(?!\n)", "", text)


def _joined(outputs: list[Any]) -> list[Any]:
    """What a command prints as one piece, in the order in which it came, as on a terminal.

    Two streams would be shown one after the other, and errors in another colour.
    """
    joined: list[Any] = []
    for output in outputs:
        if output.output_type == "stream":
            output.name = "stdout"
            if joined and joined[-1].output_type == "stream":
                joined[-1].text += output.text
                continue
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
