"""scripts/bench/equal_time.py and the benchmarks on it: times, steps, curves, processes, tables."""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


@pytest.mark.slow
def test_a_run_ends_with_its_time_or_its_text(equal_time, text, monkeypatch):
    recipe = recipes.megabyte_tiny()
    recipe = replace(
        recipe,
        model=MODEL,
        data=replace(recipe.data, paths=(str(text),), sequence_length=16, validation_fraction=0.0),
        train=replace(recipe.train, batch_size=2),
    )
    held_out = {"a": data.Windows(data.open_corpus([text]), MODEL.vocab, 16, append_eos=False)}
    now, rates = [0.0], []

    def step(state, ids):
        now[0] += 1  # second
        assert ids.shape == (2, 16)
        rates.append(float(state.opt_state.rate))
        return state._replace(step=state.step + 1), {"loss": now[0]}

    monkeypatch.setattr(equal_time.steps, "make_train_step", lambda *_: step)
    trainer = equal_time.Trainer(recipe, held_out, warmup=0.25)
    trained = trainer.train(0, 40.0, lambda: now[0], points=4, rate=0.5)
    assert (trained.seconds, trained.steps, trained.bytes) == (40, 40, 40 * 32)
    assert rates[0] == 0  # the step that compiles
    assert max(rates) == pytest.approx(0.5) == rates[11]
    assert rates[6] == pytest.approx(0.25) and 0.05 < rates[-1] < 0.06
    assert [point[:2] for point in trained.curve] == [(5, 160), (15, 480), (26, 832), (40, 1280)]
    means = [bits * math.log(2) for *_, bits in trained.curve]
    assert means == pytest.approx([4, 11.5, 22, 34.5])  # of the losses 2 to 6, 7 to 16, …
    assert trained.evaluations["a"].count == text.stat().st_size

    rates.clear()
    trained = trainer.train(0, 1e6, lambda: now[0], rate=0.5)
    assert trained.steps == trainer.steps_of_a_pass == 69  # of 138 windows
    assert rates[-1] == pytest.approx(0.05)
    assert trainer.train(0, 1e6, lambda: now[0], rate=0.5, most_steps=3).steps == 3


def test_the_rate_of_a_paced_optimizer_is_the_one_in_its_state(equal_time):
    usual, unit = optax.adamw(0.3, weight_decay=0.1), optax.adamw(1.0, weight_decay=0.1)
    paced = equal_time.paced(optax.with_extra_args_support(unit))
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.array([1.0, -2.0, 0.5])}
    state = paced.init(params)._replace(rate=jnp.float32(0.3))
    ours, _ = paced.update(grads, state, params)
    expected, _ = usual.update(grads, usual.init(params), params)
    np.testing.assert_allclose(*map(jax.tree.leaves, (ours, expected)), rtol=1e-6)


def test_processes_side_by_side_print_rows_and_may_fail(equal_time):
    show = "import json, os; print(json.dumps({'gpu': os.environ['CUDA_VISIBLE_DEVICES']}))"
    rows = list(equal_time.side_by_side([["-c", show], ["-c", "raise SystemExit(3)"]], 1))
    assert len(rows) == 2
    assert {"failed": "-c 'raise SystemExit(3)'"} in rows and any("gpu" in row for row in rows)


PLAN_ARGS = SimpleNamespace(plan="check", seconds=1e9, text={"a": 1}, deadline=math.inf)


def line_of(cell, score, read=64):
    """A line as `arena.py` writes it."""
    return {
        "cell": list(cell), "bits_per_byte": {"english": score}, "bytes": read, "seconds": 2.0,
        "parameters": 7, "learning_rate": 0.1, "passes": 0.5, "mfu": None, "bytes_per_second": 9,
        "flops_per_byte": 3, "device": "cpu", "date": "today", "text": {"a": 1},
        "curve": [[1.0, 32, 3.0, 3.1], [2.0, 64, 2.5, None]],
    }  # fmt: skip


def test_a_plan_goes_on_from_the_lines_on_file(equal_time, tmp_path):
    arena_script = importlib.import_module("arena")
    plan, out = arena_script.PLANS["check"], tmp_path / "lines.jsonl"
    args = SimpleNamespace(**vars(PLAN_ARGS), out=out)
    seen = []
    while groups := arena_script.Arena(args).next_group():
        seen.append(groups[0])
        with out.open("a") as file:  # one run of the group, then the arena is killed
            score = 3.0 if groups[0].factor == 1 else 2.0
            file.write(json.dumps(line_of(groups[0], score)) + "\n" + '{"cut sho\n')
    assert len(seen) == len(set(seen)) == 2 * 2 + 2 + 1 + 2 + 2
    assert {cell.factor for cell in seen if cell.seconds == plan.final} == {3.0}
    assert [cell.arm for cell in seen if cell.bytes == 64] == [plan.arms[1]]
    with pytest.raises(SystemExit, match="read another text"):
        arena_script.Arena(SimpleNamespace(**vars(args) | {"text": {"b": 1}}))
    args.deadline = 0.0
    out.unlink()
    late = arena_script.Arena(args)
    assert late.next_group() == [] and len(late.left_out) == 4


def test_tables_and_curves_of_an_arena(equal_time, tmp_path):
    pytest.importorskip("matplotlib")
    arena_script, report = (importlib.import_module(name) for name in ("arena", "arena_report"))
    first = arena_script.Cell("a --model.b 1", "adamw", 1.0, 2.0)
    lines = [line_of(first, 2.4), line_of(first._replace(seed=1), 2.6)]
    lines += [line_of(first._replace(factor=3.0), None), line_of(first._replace(arm="b"), 2.5)]
    lines.append(line_of(first._replace(arm="b", bytes=64), 2.7))
    rows = report.at_equal_seconds(lines).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| a, b 1", "| b"]
    assert "0.1414 of 2" in rows[0] and "one seed" in rows[1]
    assert "2.7000" in report.at_equal_bytes(lines) and "diverged" in report.every_run(lines)
    report.draw(lines, "flops", tmp_path / "out.svg")
    assert "2.4000" in report.at_equal_bytes(lines)
    assert (tmp_path / "out.svg").read_text().count("<svg") == 1


def test_source_is_held_out_by_package(equal_time, tmp_path):
    script, site = importlib.import_module("python_source"), tmp_path / "site"
    for path, text in {
        "a/x.py": "1" * 40,
        "a/y.py": "same",
        "b.py": "same",
        "c/z.py": "3" * 9,
    }.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    found = script.write([site], tmp_path / "out", 40)
    valid = (tmp_path / "out" / "source_valid.txt").read_text()
    training = (tmp_path / "out" / "source_train.txt").read_text()
    assert (found["packages"], found["held_out"], valid) == (3, ["c"], "3" * 9)
    assert sorted(training) == sorted("1" * 40 + "same")


def test_windows_of_tokens_count_each_once(equal_time):
    table = importlib.import_module("bench_gpt2")
    rows = table.windows(np.arange(10, dtype=np.int32), 4, 99)
    assert rows.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8], [99, 9, -100, -100]]
