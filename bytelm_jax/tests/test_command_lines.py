"""Command lines: what help says, how names of fields are found, and what is refused from them."""

import importlib
import re
import shlex
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from bytelm import recipes
from bytelm.arguments import UsageError, expand_names, take_option
from bytelm.config import BLTConfig
from bytelm.run_data import open_windows
from bytelm.runs import Outcome
from bytelm_jax.cli import completion
from bytelm_jax.cli import main as cli
from bytelm_jax.cli import model as commands
from bytelm_jax.cli import run as commands_run
from bytelm_jax.tests.test_cli import refused
from bytelm_jax.training import processes


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(b"some words on each line\n" * 1000)
    return path


def test_every_command_has_help_with_an_example(capsys):
    for name in cli.COMMANDS:
        with nullcontext() if name in ("train", "sweep") else pytest.raises(SystemExit):
            assert cli.main([name, "--help"]) == 0
        output = capsys.readouterr().out
        assert f"Example: bytelm {name}" in output
    assert cli.main(["--help"]) == 0
    assert set(cli.COMMANDS) <= set(capsys.readouterr().out.split())
    modules = (
        importlib.import_module(f"bytelm_jax.cli.{m}") for m in {"model", *cli._MODULES.values()}
    )
    names = [name for module in modules for name in vars(module)]
    functions = {name.removesuffix("_command") for name in names if name.endswith("_command")}
    assert functions == {name.replace("-", "_") for name in cli.COMMANDS}


@pytest.mark.parametrize(
    ("words", "found"),
    {
        "bytelm e": "eval export",
        "bytelm train blt_t": "blt_tiny",
        "bytelm train blt_tiny --optimizer q": "q_learning_sgd q_learning_adamw",
        "bytelm train blt_tiny --sched": "--schedule",
        "bytelm eval runs --dtype f": "float32 float64",
        "bytelm eval runs --ra": "--raw",
        "bytelm eval ru": "",  # the shell's own completion of file names
    }.items(),
)
def test_the_tab_key_completes_a_command_line(words, found, completion_script):
    last = len(words.split()) - 1
    line = f"COMP_WORDS=({shlex.join(words.split())}) COMP_CWORD={last}; _bytelm"
    script = f'{completion_script}\n{line}; echo "${{COMPREPLY[@]}}"'
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert shell.stdout.strip() == found


@pytest.fixture(scope="module")
def completion_script():
    return completion.script("bash")


def test_completion_knows_every_option_and_shell(capsys):
    assert cli.main(["train", "--help"]) == 0
    named = set(re.findall(r"--[a-z]\w*(?:[-.]\w+)*", capsys.readouterr().out))
    known = completion.options_of("train").keys()
    assert {name.replace("_", "-") for name in named} - {"--save-path", "--help"} <= known | {
        "--optimizer.name", "--train.batch-size", "--optimizer.learning-rate",
        "--data.sequence-length",
    }  # fmt: skip
    for shell in completion.SHELLS:
        assert cli.main(["--print-completion", shell]) == 0
        assert "megabyte_in_action_132m" in capsys.readouterr().out
    assert cli.main(["--print-completion", "tcsh"]) == 2
    says = "bytelm: --print-completion tcsh: choose one of bash, zsh, fish\n"
    assert capsys.readouterr().err == says


def test_fields_are_found_by_their_bare_names():
    recipe = recipes.get("megabyte_tiny")
    assert expand_names(recipe, ["--steps", "3", "--lr-x=1"][:2]) == ["--train.steps", "3"]
    assert expand_names(recipe, ["--checkpoint_every=5"]) == ["--train.checkpoint-every=5"]
    assert expand_names(recipe, ["--no-remat"]) == ["--train.no-remat"]
    assert expand_names(recipe, ["--data", "a", "b"]) == ["--data.paths", "a", "b"]
    assert expand_names(recipe, ["--vocab.size", "9"]) == ["--model.vocab.size", "9"]
    assert expand_names(recipe, ["--reset_on=document"]) == ["--model.reset-on=document"]
    both = ["--model.entropy.reset-on=newline", "--model.reset-on=newline"]
    assert expand_names(recipes.get("blt_tiny"), ["--reset-on", "newline"]) == both
    with pytest.raises(UsageError, match="--nam: no such field"):
        expand_names(recipe, ["--nam", "x"])


def test_common_names_stand_for_our_fields():
    recipe = recipes.get("lfbyte")
    assert expand_names(recipe, ["--seq_len", "256"]) == ["--data.sequence-length", "256"]
    assert expand_names(recipe, ["--lr=3e-4"]) == ["--optimizer.learning-rate=3e-4"]
    for argv, says in {
        ("--seq_len", "8", "--sequence-length", "8"): "--seq_len: means --data.sequence-length",
        ("--learning-rate", "1", "--lr", "1"): "--lr: means --optimizer.learning-rate",
        ("--no-lr",): "--lr: means",
        ("--seqlen", "8"): "did you mean --seq-len",
    }.items():
        with pytest.raises(UsageError, match=says):
            expand_names(recipe, argv)
    names = ("run_dir", "save_path")
    assert take_option(["--a", "1", "--save-path=x", "b"], *names) == ("x", ["--a", "1", "b"])
    assert take_option(["--a", "1"], *names) == (None, ["--a", "1"])
    with pytest.raises(UsageError, match="--save_path and --run-dir: mean the same"):
        take_option(["--save_path", "a", "--run-dir", "b"], *names)
    for argv in (["--run-dir"], ["--run-dir", "--steps", "3"], ["--run-dir="]):
        with pytest.raises(UsageError, match="--run-dir: needs a value"):
            take_option(argv, *names)


LFBYTE = (
    "--distributed --epochs 10 --batch_size 8 --accumulation_steps 4 --seq_len 256 --embed_dim 512 "
    "--num_layers 8 --adapt_dim 512 --num_experts 4 --lr 3e-4 --max_grad_norm 1.0 --dropout 0.1 "
    "--save_path ./checkpoints"
)


def test_a_usual_training_command_means_what_it_says(text, monkeypatch, capsys):
    asked = []

    def remember(recipe, run_dir, locked):
        asked.append((recipe, run_dir))
        return Outcome(recipe.train.steps, False)

    joined = []
    monkeypatch.setattr(commands_run, "train", remember)
    monkeypatch.setattr(processes, "join", lambda *where: joined.append(where))
    start = ["train", "lfbyte", "--data", str(text)]
    assert cli.main([*start, *LFBYTE.split()]) == 0
    recipe, run_dir = asked[0]
    assert joined == [("", 0, None)]
    assert run_dir == Path("checkpoints")
    assert recipe.model == recipes.get("lfbyte").model
    assert (recipe.train.batch_size, recipe.train.accumulation_steps) == (8, 4)
    assert (recipe.train.devices, recipe.data.sequence_length) == (0, 256)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.max_grad_norm) == (3e-4, 1.0)
    windows = len(open_windows(recipe)[0])
    assert 8 * (recipe.train.steps - 1) < 10 * windows <= 8 * recipe.train.steps
    asked.clear()
    capsys.readouterr()
    for change, says in {
        ("--epochs", "2", "--steps", "3"): "--epochs: sets --train.steps",
        ("--epochs", "0"): "--epochs 0: must be a number above 0",
        ("--epochs", "many"): "--epochs many: must be a number above 0",
    }.items():
        assert says in refused(capsys, *start, *change)
    assert not asked
    assert cli.main(["train", "--help"]) == 0
    output = capsys.readouterr().out
    assert all(f"--{name}" in output for name in ("seq_len", "lr", "save_path", "epochs"))


def test_a_model_that_sees_its_bytes_is_not_trained_on_them(text, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["train", "lfbyte_tiny", "--no-causal", "--data", text, "--run-dir", run]
    assert "model.causal=False: this model sees the bytes" in refused(capsys, *argv)
    assert not run.exists()


def test_resets_asked_for_reach_the_entropy_model():
    for name in ("blt_tiny", "entropy_tiny", "lfbyte_tiny"):
        model = commands.with_resets(recipes.get(name), "newline").model
        assert model.reset_on == "newline"
        assert not isinstance(model, BLTConfig) or model.entropy.reset_on == "newline"


def test_resets_behind_documents_need_their_ends(tmp_path, capsys):
    argv = ["train", "lfbyte_tiny", "--reset-on", "document", "--no-append-eos"]
    assert cli.main([*argv, "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "model.reset_on=document: needs data.append_eos=True" in error and error.count("\n") == 1
    recipe = recipes.megabyte_tiny()
    recipe = replace(recipe, data=replace(recipe.data, append_eos=False))
    with pytest.raises(ValueError, match="needs data"):
        commands.with_resets(recipe, "document")
    assert not (tmp_path / "run").exists()
