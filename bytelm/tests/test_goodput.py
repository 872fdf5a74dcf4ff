"""Where the wall time of a run goes, across restarts; and the steps that a trace is asked of."""

import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from bytelm.config import TrainConfig
from bytelm.goodput import FIELDS, KINDS, WallClock
from bytelm.metrics import MetricsLog, Throughput, comparable
from bytelm.runs import open_run, traced_steps


@pytest.fixture
def sleep(monkeypatch):
    """Lets time pass, which is exact here."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    return pass_time


def seconds(record):
    return {k.partition("/")[2]: v for k, v in record.items() if "/" in k and v}


def a_run(sleep, clock=None):
    """4 seconds of start, 3 of compiling, 6 of steps, 2 of waiting for data, 5 of evaluation."""
    clock = clock or WallClock()
    sleep(4)
    for idle in (False, True, False):
        batch = next(clock.batches(iter("x"), lambda idle=idle: sleep(1) or idle))
        assert batch == "x"
        sleep(1)
        if idle:
            clock.count_as("compile")
            sleep(1)
    with clock.phase("evaluation"):
        sleep(5)
    return clock


def test_every_second_is_of_one_kind(sleep):
    record = a_run(sleep).record()
    assert tuple(record) == FIELDS
    # Waiting that the devices did not notice is part of the steps.
    kinds = {"start": 4, "data": 1, "compile": 1, "steps": 5, "evaluation": 5}
    assert seconds(record) == kinds
    assert record["wall_seconds"] == 16 == sum(kinds.values())
    assert record["goodput"] == pytest.approx(5 / 16, abs=1e-4)


def test_the_line_names_what_took_the_rest(sleep):
    clock = a_run(sleep)
    assert clock.line(0.4321) == (
        "goodput 31.2%: 5.0 s of steps in 16.0 s, at an MFU of 43.2%; the rest: "
        "evaluation 5.0 s, start 4.0 s, compile 1.0 s, data 1.0 s"
    )
    assert WallClock().line(None) == "goodput 0.0%: 0.0 s of steps in 0.0 s"


def test_the_end_of_a_context_is_counted_alone(sleep):
    @contextmanager
    def slow():
        yield
        sleep(3)

    clock = WallClock()
    with clock.leaving(slow(), "compile"):
        sleep(2)
    sleep(1)
    assert seconds(clock.record()) == {"start": 3, "compile": 3}


def written(folder, records):
    log = MetricsLog(folder / "metrics.jsonl", 0)
    for record in records:
        log.write(record)
    log.close()


def counts(step, **kinds):
    each = {f"wall_seconds/{kind}": float(kinds.get(kind, 0)) for kind in KINDS}
    return {"step": step, "loss": 1.0, **each}


def resumed(folder, step):
    log, clock = MetricsLog(folder / "metrics.jsonl", step), WallClock()
    clock.resume(log.records, log.last, step)
    log.close()
    return seconds(clock.record())


def test_a_restart_keeps_the_count_and_names_the_lost_steps(sleep, tmp_path):
    lines = [counts(10, start=4, steps=10), counts(20, start=4, steps=22, data=1)]
    written(tmp_path, [*lines, counts(30, start=4, steps=34, data=3)])
    assert resumed(tmp_path, 20) == {"start": 4, "steps": 22, "data": 3, "lost": 12}
    # The lines of the lost steps are gone now, and nothing is lost twice.
    assert resumed(tmp_path, 20) == {"start": 4, "steps": 22, "data": 1}


def test_steps_between_lines_are_lost_in_proportion(sleep, tmp_path):
    written(tmp_path, [counts(10, steps=10), counts(20, steps=20)])
    assert resumed(tmp_path, 14) == {"steps": 14, "lost": 6}


def test_everything_is_lost_without_a_checkpoint(sleep, tmp_path):
    written(tmp_path, [counts(10, start=2, steps=10)])
    assert resumed(tmp_path, 0) == {"start": 2, "lost": 10}


def test_runs_from_before_there_was_a_count_begin_one(sleep, tmp_path):
    written(tmp_path, [{"step": 10, "loss": 1.0}, {"step": 20, "wall_seconds/steps": None}])
    assert resumed(tmp_path, 10) == {}


def test_what_two_runs_of_one_training_have_alike():
    lines = [{"step": 1, "loss": 2.0, "mfu": 0.1, "goodput": 0.5}, counts(1) | {"loss": 3.0}]
    end = {"step": 1, "goodput": 0.5, "wall_seconds": 3.0}
    assert comparable([*lines, end]) == [{"step": 1, "loss": 2.0}, {"step": 1, "loss": 3.0}]


def test_the_mean_mfu_is_that_of_all_readings(sleep):
    rates = Throughput(2e12, 2, "TPU v5 lite")  # 197e12 operations a second
    assert rates.mean_mfu is None
    for count, pause in ((100, 1.0), (300, 3.0)):
        rates.add(count)
        sleep(pause)
        rates.read()
        sleep(1)
        rates.restart()
    assert rates.mean_mfu == pytest.approx(400 * 2e12 / (4 * 2 * 197e12))
    assert Throughput(1.0, 1, "cpu").mean_mfu is None


@pytest.mark.parametrize("text", ["5", "0:3", "5:4", "a:b", "1:2:3", ":", "-1:2", "1:" + "9" * 50])
def test_a_wrong_range_of_steps_is_refused(text):
    with pytest.raises(ValueError, match=r"^profile_steps=.*: write FIRST:LAST, two steps from 1"):
        TrainConfig(profile_steps=text)


def test_steps_past_the_end_and_stores_are_refused():
    with pytest.raises(ValueError, match="profile_steps=10:15: the run ends at step 12"):
        TrainConfig(profile_steps="10:15", steps=12)
    with pytest.raises(ValueError, match=r"train\.profile_steps=1:2: writes files beside the run"):
        open_run(Path("gs://bucket/run"), traced="1:2")


def test_a_run_that_is_past_some_steps_says_so():
    said, run = [], TrainConfig(profile_steps="10:15")
    assert traced_steps(run, 0, said.append) == range(10, 16) and not said
    assert traced_steps(run, 12, said.append) == range(13, 16)
    assert "traces only from step 13 on" in said.pop()
    assert not traced_steps(run, 15, said.append) and "traces nothing" in said.pop()
    assert not traced_steps(TrainConfig(), 15, said.append) and not said
