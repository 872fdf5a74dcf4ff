"""scripts/check/gpu: what it runs, what passes, what it leaves out; a stand-in for the command."""

import importlib.machinery
import importlib.util
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "check" / "gpu"

STAND_IN = """
import json, os, pathlib, sys, time
name, *rest = sys.argv[1:]
fault = os.environ.get("FAULT", "")
with open(os.environ["CALLS"], "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
def option(wanted):
    return rest[rest.index(wanted) + 1]
if "--dry-run" in rest:
    print(json.dumps({"memory": {"parameters": 4, "optimizer_state": 8, "peak": 100}}))
elif name == "train":
    if fault == "too small":
        said = "bytelm train: model: takes 9 GiB of each device, of which JAX has 1"
        print(said, file=sys.stderr)
        sys.exit(2)
    run, steps = pathlib.Path(option("--run-dir")), int(option("--steps"))
    run.mkdir(exist_ok=True)
    with open(run / "metrics.jsonl", "a") as file:
        step = 5 if "--log-every" in rest else steps
        bits = float("nan") if fault == "nan" else 8.0
        file.write(json.dumps({"step": step, "loss": 5.0, "bits_per_byte": bits}) + "\\n")
    if steps > 7 or fault == "hangs":
        time.sleep(60)
    print(f"done: step {steps} is saved in {run}")
elif name == "eval":
    print(json.dumps({"bits_per_byte": 7.5}))
elif name == "generate":
    sys.exit("a first line\\nno kernel") if fault == "generate" else print("The end")
elif name == "export":
    out = pathlib.Path(option("--out"))
    out.mkdir()
    with open(out / "model.safetensors", "wb") as file:
        file.truncate(10**8 if fault != "short" else 1000)
"""


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Calls the script on rows; gives its status, the lines it left, and the commands it ran."""
    loader = importlib.machinery.SourceFileLoader("check_gpu", str(SCRIPT))
    spec = importlib.util.spec_from_loader("check_gpu", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    stand_in = tmp_path / "bytelm.py"
    stand_in.write_text(STAND_IN)
    text, lines, calls = (tmp_path / name for name in ("text", "lines.jsonl", "calls"))
    text.write_text("The text.")
    monkeypatch.setattr(module, "BYTELM", [sys.executable, "-S", str(stand_in)])
    monkeypatch.setenv("CALLS", str(calls))
    for name in ("XLA_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # set by the script; undone by the fixture

    def call(*rows, fault="", limit=None, large=2_000_000_000, options=()):
        monkeypatch.setenv("FAULT", fault)
        monkeypatch.setattr(module, "LARGE", large)
        probed = json.dumps({"device": "a card", "limit": limit})
        monkeypatch.setattr(module, "PROBE", f"print({probed!r})")
        argv = ["gpu", "--data", text, "--lines", lines, "--work", tmp_path, *options]
        monkeypatch.setattr(sys, "argv", [*map(str, argv), "--rows", *rows])
        calls.write_text("")
        status = module.main()
        ran = calls.read_text().splitlines()
        return status, list(map(json.loads, lines.read_text().splitlines())), ran

    return call


def test_every_command_of_every_row_once(check, tmp_path):
    row = "megabyte_tiny --sequence-length 255"
    status, lines, ran = check("blt_tiny", row, options=["--jobs", "2"])
    assert status == 0 and {line["row"] for line in lines} == {"blt_tiny", row}
    for line in lines:
        assert line["verdict"] == "passed" and line["device"] == "a card" and line["jax"]
        assert line["bits_per_byte"] == 7.5 and line["loss_bits_per_byte"] == 8
        commands = ["train", "resume", "eval", "generate", "export"]
        before = ["entropy model", "calibrate"] if line["row"] == "blt_tiny" else []
        assert list(line["seconds"]) == before + commands
    trained = [call for call in ran if call.startswith("train megabyte_tiny")]
    assert ["--sequence-length 255" in call for call in trained] == [True, True]
    assert [call.split()[-1] for call in trained] == ["5", "7"]
    assert [call.split()[1] for call in ran if call.startswith("train")].count("entropy_tiny") == 1
    assert sum("--entropy-from" in call for call in ran) == 2
    # Nothing is left of the runs, and nothing is run again.
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert check("blt_tiny", row) == (0, lines, [])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("generate", "generate: status 1: a first line | no kernel"),
        ("nan", "train: nan bits per byte"),
        ("short", "export: 1000 bytes"),
        ("hangs", "train: not done in time"),
    ],
)
def test_a_row_that_fails_says_where_and_is_run_again(check, fault, message):
    options = ["--deadline", "1" if fault == "hangs" else "60"]
    status, lines, _ = check("megabyte_tiny", fault=fault, options=options)
    assert status == 1 and len(lines) == 1
    assert lines[0]["verdict"] == "failed" and lines[0]["failure"].startswith(message)
    status, lines, ran = check("megabyte_tiny")
    assert status == 0 and ran and [line["verdict"] for line in lines] == ["failed", "passed"]


def test_a_card_that_is_too_small_has_to_refuse(check):
    options = {"limit": 10, "large": 0}
    status, lines, _ = check("megabyte_tiny", **options)
    assert status == 1 and "not refused: done: step 5" in lines[0]["failure"]
    status, lines, ran = check("megabyte_tiny", fault="too small", **options)
    assert status == 0 and lines[1]["refused"].startswith("bytelm train: model: takes 9 GiB")
    assert [call.split()[-1] for call in ran] == ["--json", "5"]


def test_a_large_row_on_a_small_disk_is_stopped_after_five_steps(check, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(20))
    status, lines, ran = check("megabyte_tiny", limit=1000, large=0)
    assert status == 0 and "0 GiB of disk needed" in lines[0]["left_out"]
    assert lines[0]["loss_bits_per_byte"] == 8 and lines[0]["dry_run_gib"]["peak"] == 0
    assert [call.split()[-1] for call in ran] == ["--json", "5"]
