"""TensorBoard's and Weights & Biases' files, read back by their own libraries."""

import importlib
import json
import os
import struct
from dataclasses import replace
from typing import Any

import pytest

from bytelm import progress, recipes, tracking
from bytelm.metrics import MetricsLog, read_metrics
from bytelm_jax.cli import main as cli
from bytelm_jax.training import display as jax_display

RECORDS = [
    {"step": 1, "loss": 2.5, "bits_per_byte": 3.6067376},
    {"step": 2, "loss": 1.5, "grad_norm": 0.25},
    {"step": 2, "validation_loss": 9.0, "validation_bits_per_byte": None},
]
MORE = [{"step": 3, "loss": 1.25}, {"step": 4, "loss": 1.0}]


def recipe(*names):
    tiny = recipes.get("megabyte_tiny")
    return replace(tiny, train=replace(tiny.train, track=names))


def logged(folder, start, records, *names):
    path = folder / "metrics.jsonl"
    log = MetricsLog(path, start, tracking.open_trackers(recipe(*names), folder, start))
    for record in records:
        log.write(record)
    log.close()
    return read_metrics(path)


def scalars(records):
    numbers = ((name, r["step"], v) for r in records for name, v in r.items() if name != "step")
    return {(name, step): v for name, step, v in numbers if v is not None}


def test_tensorboard_reads_what_the_metrics_file_says(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra track")
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )

    def read():
        events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        names = events.Tags()["scalars"]
        return {(name, e.step): e.value for name in names for e in events.Scalars(name)}

    records = logged(tmp_path, 0, RECORDS, "tensorboard")
    assert records == RECORDS
    assert read() == pytest.approx(scalars(RECORDS))
    # Killed after step 2, the run continues from a checkpoint of step 1.
    records = logged(tmp_path, 1, MORE, "tensorboard")
    assert scalars(records) == scalars([RECORDS[0], *MORE])
    assert read() == pytest.approx(scalars(records))


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, in it W&B's own protocol buffers."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    data, at, held = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            yield messages.Record.FromString(held)
            held = b""


def test_offline_weights_and_biases_hold_what_the_metrics_file_says(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra track")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    logged(tmp_path, 0, RECORDS, "wandb")
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"  # nothing is looked up or sent
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    values, config = {}, {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            step = record.history.step.num
            values |= {(k, step): json.loads(v) for k, v in items.items() if not k.startswith("_")}
        elif record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert record.run.run_id == (tmp_path / "wandb" / "id").read_text()
    assert values == scalars(RECORDS)
    assert config["model"]["architecture"] == "megabyte"


def test_a_resumed_run_keeps_its_id(tmp_path):
    first = tracking._run_id(tmp_path, 0)
    assert tracking._run_id(tmp_path, 5) == first
    assert tracking._run_id(tmp_path, 0) != first


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_before_anything_is_made(
    name, package, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    argv = ["train", "megabyte_tiny", "--track", name, "--run-dir", str(tmp_path / "run")]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"train.track={name}: the package {package} is not" in error
    assert "pip install 'bytelm[track]'" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["bytelm_jax", "bytelm_torch"])
def test_plain_progress_lines_tell_rates_and_the_time_left(package, monkeypatch, capsys):
    if package == "bytelm_jax":
        display = jax_display.Display("tiny", 0, 100)
    else:
        display = progress.ProgressLines(100)
    clock = iter([1000.0, 1020.0, 1021.0, 1060.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    record = {"bits_per_byte": 2.5, "bytes_per_second": 1_234_567.0}
    display.show(10, record)
    display.show(20, record | {"mfu": 0.123})
    display.show(21, record)
    display.show(40, record)
    assert capsys.readouterr().err.splitlines() == [
        "step 10/100  2.500 bits/byte  1,234.6 kB/s",
        "step 20/100  2.500 bits/byte  1,234.6 kB/s  MFU 12.3%  0:02:40 left",
        "step 40/100  2.500 bits/byte  1,234.6 kB/s  0:02:00 left",
    ]
