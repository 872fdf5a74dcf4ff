"""scripts/bench/equal_time.py and the benchmarks on it: times, steps, curves, processes, tables."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bytelm import data, recipes
from bytelm.config import MegabyteConfig

SCRIPTS = Path(__file__).parent.parent.parent / "scripts" / "bench"
SIZES = dict.fromkeys(("global_heads", "local_heads", "global_layers", "local_layers"), 1)
MODEL = MegabyteConfig(patch_size=4, global_dim=8, local_dim=8, max_length=16, **SIZES)


@pytest.fixture
def equal_time(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("equal_time")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 50)
    return path


def test_the_clock_ends_a_run_and_the_rate_ends_with_it(equal_time, text, monkeypatch):
    recipe = recipes.megabyte_tiny()
    recipe = replace(
        recipe,
        model=MODEL,
        data=replace(recipe.data, paths=(str(text),), sequence_length=16, validation_fraction=0.0),
        optimizer=replace(recipe.optimizer, warmup_steps=5),
        train=replace(recipe.train, batch_size=2),
    )
    held_out = data.Windows(data.open_corpus([text]), MODEL.vocab, 16, append_eos=False)
    now, planned = [0.0], []
    build = equal_time.build_optimizer

    def step(state, ids):
        now[0] += 1  # second
        assert ids.shape == (2, 16)
        return state._replace(step=state.step + 1), {"loss": now[0]}

    def build_optimizer(config, steps, **rest):
        planned.append(steps)
        return build(config, steps, **rest)

    monkeypatch.setattr(equal_time.steps, "make_train_step", lambda *_: step)
    monkeypatch.setattr(equal_time, "build_optimizer", build_optimizer)
    trained = equal_time.Trainer(recipe, held_out).train(0, 40.0, lambda: now[0], points=4)
    assert trained.seconds == 40
    assert trained.steps == 42  # two programs, whose first steps are not timed
    assert planned[-1] == 42
    assert [point[0] for point in trained.curve] == [5, 15, 26, 40]
    assert trained.evaluation.count == text.stat().st_size
    means = [bits * math.log(2) for _, _, bits in trained.curve]
    assert means == pytest.approx([4, 12.5, 23, 35.5])  # of the losses 1 to 7, 8 to 17, …


def test_processes_side_by_side_print_rows_and_may_fail(equal_time):
    show = "import json, os; print(json.dumps({'gpu': os.environ['CUDA_VISIBLE_DEVICES']}))"
    rows = list(equal_time.side_by_side([["-c", show], ["-c", "raise SystemExit(3)"]], 1))
    assert len(rows) == 2
    assert {"failed": "-c 'raise SystemExit(3)'"} in rows and any("gpu" in row for row in rows)


def test_the_curves_are_drawn(equal_time, tmp_path):
    pytest.importorskip("matplotlib")
    five = importlib.import_module("bench_five_minutes")
    curve = [[1.0, 3.0, 3.1], [2.0, 2.5, float("nan")]]
    row = {"row": "a --b 1", "bits_per_byte": 2.4, "device": "cpu", "date": "today", "curve": curve}
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(r) + "\n" for r in (row, {"failed": "x"})))
    five.draw(five.read_json_lines(lines), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_windows_of_tokens_count_each_once(equal_time):
    table = importlib.import_module("bench_seed_table")
    rows = table.windows(np.arange(10, dtype=np.int32), 4, 99)
    assert rows.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8], [99, 9, -100, -100]]
