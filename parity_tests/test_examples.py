"""The examples run. That of transformers' Trainer stands in `test_hf_trainer.py`."""

import re
from pathlib import Path

import pytest

from parity_tests.examples import EXAMPLES, run_example


@pytest.mark.slow
def test_a_model_is_trained_and_looked_into(tmp_path, monkeypatch, capsys):
    data = tmp_path / "text"
    data.write_bytes(b"def main(argument):\n    return argument\n" * 30)
    options = ("--data", data, "--length", 32, "--steps", 3, "--out", tmp_path / "export")
    run_example("train_with_optax", *options, monkeypatch=monkeypatch)
    assert re.search(r"step 2: \d\.\d+ bits per byte\nheld out: \d\.\d+", capsys.readouterr().out)

    run_example("look_inside", tmp_path / "export", "def main():\n", monkeypatch=monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert "12 bytes: " in lines[0] and "patcher space" in lines[0]
    patches = [line.split("'")[1] for line in lines[2:]]
    assert "".join(patches) == r"def main():\n" and len(patches) > 2


def test_every_example_is_run():
    tests = [Path(__file__), Path(__file__).with_name("test_hf_trainer.py")]
    text = "".join(path.read_text("utf-8") for path in tests)
    assert all(f'"{path.stem}"' in text for path in EXAMPLES.glob("*.py"))
