"""What is answered before JAX has started: help, mistakes, the version, the package's names."""

import ast
import importlib
import importlib.metadata
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bytelm
import bytelm_jax
from bytelm.files import replacing
from bytelm_jax.cli.main import COMMANDS

front = importlib.import_module("bytelm_jax.cli.main")
HEAVY = ("jax", "flax", "optax", "orbax", "grain", "scipy", "torch", "matplotlib")

PROGRAM = f"""
import contextlib, io, json, sys
from bytelm_jax.cli.main import main

def answer(argv):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code or 0
    return argv, code, said.getvalue(), [m for m in {HEAVY} if m in sys.modules]

print(json.dumps([answer(argv) for argv in json.loads(sys.argv[1])]))
"""


def answers(calls):
    """(arguments, exit code, what is said, heavy modules that are loaded) of each call in turn."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def test_help_needs_no_jax():
    calls = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    calls += [["train", "megabyte_tiny", "--help"], ["train", "blt_1b", "--help"]]
    for argv, code, output, loaded in answers(calls):
        assert (code, loaded) == (0, []), (argv, output)
        assert len(output.splitlines()) > 3 or output == f"bytelm {bytelm.__version__}\n"


def processor_seconds(compiled, *argv):
    """Of the best of three processes: the first may have to compile what it imports.

    Into the folder `compiled`, also where the environment says that bytecode is not to be written:
    there every process would compile it.
    """
    used, environment = [], {**os.environ, "PYTHONPYCACHEPREFIX": str(compiled)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *argv], capture_output=True, timeout=60, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(used)


def test_answers_take_little_processor_time(tmp_path):
    """Seconds of a processor that imports numpy in a fifth of one; a slower one has more."""
    slower = max(1.0, processor_seconds(tmp_path, "-c", "import numpy") / 0.2)
    for argv, seconds in (("--help", 0.5), ("trane", 0.5), ("train blt_1b --help", 1.0)):
        used = processor_seconds(tmp_path, "-m", "bytelm_jax", *argv.split())
        assert used < seconds * slower, (argv, used, slower)


def test_the_list_of_commands_and_their_mistakes_need_the_standard_library_alone():
    program = (
        "import sys; before = {*sys.modules}; from bytelm_jax.cli.main import main\n"
        "main(['--help']); main(['trane'])\n"
        "new = {name.partition('.')[0] for name in {*sys.modules} - before}\n"
        "print(*new - sys.stdlib_module_names)"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "bytelm_jax"


def test_a_wrong_command_line_does_not_wait_for_jax():
    calls = {
        ("trane",): "did you mean train?",
        ("train", "megabyte_tini"): "did you mean megabyte_tiny?",
        ("train", "megabyte_tiny", "--patch-sizes", "4"): "did you mean --patch-size?",
        ("train", "megabyte_tiny", "--patch-size", "3"): "must be a multiple of patch_size=3",
        ("train", "lfbyte_tiny", "--no-causal"): "model.causal=False",
        ("train", "megabyte_tiny", "--epochs", "many"): "--epochs many: must be a number",
        ("train", "megabyte_tiny", "--dry-run", "--chip", "H1"): "chip=H1: unknown",
        ("eval", "run", "--data"): "--data",
        ("eval", "run", "--data", "/nowhere"): "/nowhere: does not exist",
        ("eval", "run", "--data", "web=/x"): "data=web=/x: only `bytelm train` and `doctor` know",
        ("eval", "run", "--batch-sizes", "4"): "batch-sizes",
        ("generate", "run", "--top-p", "0"): "top_p=0.0: must be above 0",
        ("inspect", "text", "--model", "run", "--max-bytes", "0"): "must be at least 1",
        ("calibrate", "run", "--data", "x", "--windows", "-1"): "must be at least 0",
        ("draft-table", "run", "--megabytes", "0"): "--megabytes 0.0: must be above 0",
        ("draft-table", "run", "--data", "/nowhere"): "run: no model there",
        ("prepare", "/nowhere", "--out", "x"): "/nowhere: does not exist",
        ("doctor", "--fsdp", "0"): "--fsdp 0: must be at least 1",
    }
    for argv, code, output, loaded in answers(list(calls)):
        assert (code, loaded) == (2, []), (argv, output)
        assert calls[tuple(argv)] in output and output.count("\n") == 1, output


@pytest.mark.parametrize("module", ["bytelm_jax", "bytelm_jax.cli"])
def test_the_command_by_the_name_of_a_module(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"bytelm {importlib.metadata.version('bytelm')}\n"


def test_a_checkout_that_was_not_installed_knows_its_version(monkeypatch):
    right, installed = importlib.metadata.version, bytelm.__version__

    def missing(name):
        if name == "bytelm":
            raise importlib.metadata.PackageNotFoundError(name)
        return right(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert bytelm.__version__ == installed


def test_the_package_offers_what_editors_see():
    """The names under TYPE_CHECKING, those of `__all__`, and those that can be had are the same.

    `as` says that a name is offered and not only used.
    """
    tree = ast.parse(Path(bytelm_jax.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    declared = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        if node.names[0].name == "*":
            declared |= dict.fromkeys(bytelm.__all__, "bytelm")
        else:
            declared |= {alias.asname: node.module for alias in node.names}
    assert sorted(declared) == sorted(bytelm_jax.__all__)
    for name, module in declared.items():
        given = getattr(importlib.import_module(module), name)
        # A module that is called as the function in it has that function behind it.
        assert inspect.unwrap(getattr(bytelm_jax, name)) is inspect.unwrap(given)
        assert name in dir(bytelm_jax)
    with pytest.raises(AttributeError, match="no attribute 'build_modle'"):
        bytelm_jax.build_modle  # noqa: B018


def test_a_command_that_is_stopped_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    """And takes its unfinished files with it, by Ctrl-C as by SIGTERM."""

    def stopped_by(number):
        def command(argv):
            with replacing(tmp_path / "out"):
                signal.raise_signal(number)
            return 0

        return lambda name: command

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(front, "_command", stopped_by(signal.SIGINT))
    # Tests that a shell runs in the background ignore SIGINT, which is inherited.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert front.main(["eval"]) == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert capsys.readouterr().err == "bytelm eval: interrupted\n"
    monkeypatch.setattr(front, "_command", stopped_by(signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        front.main(["compress"])
    assert not any(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == before


def test_a_stop_that_falls_into_a_callback_of_the_garbage_collector_is_not_lost(monkeypatch):
    """Python prints and drops the exceptions of such callbacks; JAX registers one."""

    class Dropping:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def command(argv):
        Dropping()
        time.sleep(10)
        return 0

    monkeypatch.setattr(front, "_command", lambda name: command)
    with pytest.raises(SystemExit, match="143"):
        front.main(["compress"])
