"""What the donor's benchmark says of its lines, on curves that a reader can follow."""

import importlib
import json
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
SCRATCH = [[50, 1.0, 4.0], [100, 2.0, 2.0]]
LINES = {
    "donor": {"parameters": 7, "bytes": 300, "seconds": 60.0, "bits": 1.5},
    "from scratch, seed 0": {"bits": 2.0, "seconds": 2.0, "curve": SCRATCH},
    "donor, seed 0": {"bits": 1.0, "seconds": 3.0, "curve": [[50, 1, 3.0], [100, 3, 1.0]]},
    "frozen, seed 0": {"bits": 2.5, "seconds": 2.0, "curve": [[50, 1, 3.0], [100, 2, 2.5]]},
    "from scratch, seed 1": {"bits": 2.0, "seconds": 2.0, "curve": SCRATCH},
}


@pytest.fixture
def donor_report(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("donor_report")


def test_bytes_saved_are_read_off_the_curve(donor_report):
    """Halfway between 50 bytes at 3.0 and 100 bytes at 1.0 are 75 bytes at 2.0."""
    assert donor_report.bytes_to(LINES["donor, seed 0"]["curve"], 2.0) == 75
    assert donor_report.saved(LINES, "donor", [0]) == [0.25]
    assert donor_report.saved(LINES, "frozen", [0]) == [None]
    assert donor_report.bytes_to([[50, 1.0, 1.9]], 2.0) == 50  # its first point is no guess
    assert donor_report.best_arms(LINES, ["frozen", "donor"], [0]) == ["donor", "frozen"]


def test_a_run_that_was_cut_short_is_reported_by_its_whole_seeds(donor_report, tmp_path, capsys):
    file = tmp_path / "lines.jsonl"
    lines = [json.dumps({"part": part, **line}) + "\n" for part, line in LINES.items()]
    file.write_text("".join(lines))
    held = donor_report.read_lines(file)
    assert donor_report.complete(held) == (["from scratch", "donor", "frozen"], [0])
    donor_report.print_report(held)
    said = capsys.readouterr().out
    assert "donor: 7 parameters, 300 bytes in 1.0 minutes, 1.5000 bits per byte" in said
    assert "| donor | 1.0000 (1.0000 to 1.0000) | 25.0% (25.0%) | 3 |" in said
    assert "| frozen | 2.5000 (2.5000 to 2.5000) | not reached | 2 |" in said
    assert "donor needs 25.0% fewer" in said and "target 20% met" in said
    with pytest.raises(SystemExit, match="no seed has ended"):
        donor_report.print_report({part: held[part] for part in ("donor", "donor, seed 0")})
