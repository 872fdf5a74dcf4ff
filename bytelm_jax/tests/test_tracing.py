"""A traced run, and its count of time, across a restart and in both packages."""

import json
import shlex

import pytest

from bytelm_jax.cli.main import main

TINY = "megabyte_tiny --global-layers 1 --local-layers 1 --global-dim 32 --local-dim 16"
TINY += " --global-heads 2 --local-heads 2 --sequence-length 32 --batch-size 4"
TINY += " --devices 1 --validation-fraction 0 --log-every 1 --profile-steps 2:3"


@pytest.mark.slow
def test_some_steps_are_traced_and_all_time_is_counted(tmp_path, capsys):
    text, run = tmp_path / "text", tmp_path / "run"
    text.write_bytes(b"a few bytes to learn from; " * 40)
    command = ["train", *shlex.split(TINY), "--data", str(text), "--run-dir", str(run)]
    assert main([*command, "--steps", "3"]) == 0
    said = capsys.readouterr().err
    assert f"the trace of steps 2 to 3 is in {run / 'profile'}" in said
    assert "goodput " in said and "; the rest: " in said
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1

    assert main([*command, "--steps", "5"]) == 0
    assert "traces nothing" in capsys.readouterr().err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 3, 4, 5, 5]
    totals = [record["wall_seconds"] for record in records]
    assert totals == sorted(totals) and totals[0] > 0
    end = records[-1]
    parts = [value for name, value in end.items() if name.startswith("wall_seconds/")]
    assert abs(sum(parts) - end["wall_seconds"]) < 0.01
    assert 0 < end["goodput"] < 1 and end["wall_seconds/lost"] == 0
    assert end["wall_seconds/start"] > records[0]["wall_seconds/start"]  # of both starts
