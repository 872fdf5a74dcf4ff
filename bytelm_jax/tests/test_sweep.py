"""`bytelm sweep`: its points, what it runs, what it skips, and its table."""

import csv
import json

import pytest

from bytelm import runs
from bytelm.config import QLearningSGDConfig
from bytelm.metrics import METRIC
from bytelm.runs import DivergedError, Outcome
from bytelm.sweeps import points, report
from bytelm_jax.cli import main as cli
from bytelm_jax.training import loop


@pytest.fixture
def trained(monkeypatch):
    """The rates of the runs; `train` is a formula of the learning rate that notes it."""
    rates = []

    def train(recipe, run_dir):
        rate = recipe.optimizer.learning_rate
        rates.append(rate)
        run_dir.mkdir(parents=True)
        runs.save_recipe(run_dir, recipe)
        lines = [{"step": recipe.train.steps, METRIC: 3 + abs(rate - 0.1)}]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        if rate == 9:
            raise DivergedError("step 7: the loss is nan")
        return Outcome(recipe.train.steps, rate == 8)

    monkeypatch.setattr(loop, "train", train)
    return rates


@pytest.mark.slow
def test_a_grid_is_trained_once_and_ranked(trained, tmp_path, capsys):
    call = ["sweep", "megabyte_tiny", "--out", str(tmp_path), "--vary", "learning_rate=9,0.3,0.1"]
    call += ["optimizer=sgd,q_learning_sgd", "--steps", "7", "--momentum", "0.8"]
    assert cli.main(call) == 0
    assert trained == [9, 9, 0.3, 0.3, 0.1, 0.1]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["learning_rate"] for row in rows] == ["0.1", "0.1", "0.3", "0.3", "9", "9"]
    assert [row["outcome"] for row in rows[3:]] == ["finished", "diverged", "diverged"]
    assert rows[0][METRIC] == 3 and rows[0]["step"] == 7
    with open(tmp_path / "results.csv", newline="") as file:
        assert [row["optimizer"] for row in csv.DictReader(file)][:2] == ["sgd", "q_learning_sgd"]
    saved = runs.load_recipe(tmp_path / "learning_rate=0.3,optimizer=q_learning_sgd")
    assert isinstance(saved.optimizer, QLearningSGDConfig) and saved.optimizer.momentum == 0.8
    assert "3.2000" in capsys.readouterr().out

    trained.clear()
    assert cli.main(call) == 0 and trained == []
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_a_point_without_a_finite_validation_is_ranked_last(tmp_path):
    scores = {"1": None, "2": 3.0, "3": 2.0}
    rows = [
        ({"learning_rate": rate}, {"outcome": "finished", METRIC: score})
        for rate, score in scores.items()
    ]
    report(rows, tmp_path)
    ranked = json.loads((tmp_path / "results.json").read_text())
    assert [row["learning_rate"] for row in ranked] == ["3", "2", "1"]


@pytest.mark.slow
def test_a_signal_stops_the_sweep_at_its_point(trained, tmp_path):
    call = ["sweep", "megabyte_tiny", "--out", str(tmp_path), "--vary", "learning_rate=1,8,2"]
    assert cli.main(call) == 0
    assert trained == [1, 8]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1


def test_random_points_lie_in_their_ranges():
    vary = ["a=1e-4:1e-1:log", "b=2:5", "c=x,y", "d=0.5:1"]
    drawn_points = points(vary, 300, 1)
    assert drawn_points == points(vary, 300, 1) != points(vary, 300, 2)
    assert all(1e-4 <= float(p["a"]) <= 1e-1 and 0.5 <= float(p["d"]) <= 1 for p in drawn_points)
    assert sum(float(p["a"]) < 1e-2 for p in drawn_points) > 150  # two of three decades
    assert {p["b"] for p in drawn_points} == {"2", "3", "4", "5"} and {
        p["c"] for p in drawn_points
    } == {"x", "y"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--vary: name the fields to vary"),
        (["--vary", "learning_rate=1", "--run-dir", "x"], "every point has its own"),
        (["--vary", "learning_rate=1", "train.step=1"], "did you mean --train.steps?"),
        (["--vary", "learning_rate=1:2"], "learning_rate: a range needs --random N"),
        (["--vary", "learning_rate=2:1", "--random", "3"], "needs LOW < HIGH"),
        (["--vary", "learning_rate=a:b", "--random", "3"], "must be numbers"),
        (["--vary", "learning_rate"], "write FIELD=A,B,…"),
        (["--vary", "lerning_rate=1"], "did you mean --learning-rate?"),
        (["--vary", "learning_rate=1,-1"], "learning_rate=-1.0: must be above 0"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_runs(trained, tmp_path, capsys, arguments, says):
    assert cli.main(["sweep", "megabyte_tiny", "--out", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert trained == [] and not any(tmp_path.iterdir())
