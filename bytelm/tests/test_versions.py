"""The workflow of CI runs what is there: the suite, and every cell of the versions."""

import importlib.machinery
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/check/versions"


def test_the_workflow_runs_every_cell(monkeypatch):
    loader = importlib.machinery.SourceFileLoader("versions", str(SCRIPT))
    spec = importlib.util.spec_from_loader("versions", loader)
    assert spec is not None
    versions = importlib.util.module_from_spec(spec)
    loader.exec_module(versions)
    monkeypatch.setattr(versions, "latest", lambda uv, package: "5.24.0")
    cells = versions.cells("uv")
    assert all((ROOT / file).is_file() for file in versions.FILES)
    assert [cell.limits for cell in cells] == [
        (),
        ("transformers<5.24",),
        ("transformers==5.24.0",),
    ]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    listed = re.search(r"cell: \[(.*)\]", workflow)
    assert listed and listed[1].split(", ") == [cell.name for cell in cells]
    for command in re.findall(r"- run: (?:bash )?(\S+/\S+)", workflow):
        assert (ROOT / command).is_file(), command
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    known = set(re.findall(r"Python :: (3\.\d+)", project))
    assert {cell.python for cell in cells} == known
