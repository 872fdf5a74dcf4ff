"""Options that decide which other options there are, options that take lists, empty values."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bytelm import recipes
from bytelm.arguments import UsageError, expand_names, parse_call, parse_recipe
from bytelm.config import OPTIMIZER_CONFIGS, BLTConfig, SGDConfig
from bytelm_jax.cli import main as cli
from parity_tests.starts import with_changes


def test_the_optimizer_decides_which_fields_there_are():
    recipe, bare = recipes.get("megabyte_tiny"), ["--momentum", ".8"]
    for option in ("--optimizer", "--optimizer.name", "--name"):
        assert expand_names(recipe, [*bare, option, "sgd"]) == ["--optimizer.momentum", ".8"]
        optimizer = parse_recipe(recipe, [*bare, f"{option}=sgd"], "train", "").optimizer
        assert optimizer == SGDConfig(learning_rate=0.3, warmup_steps=40, momentum=0.8)
    for name in ("interval", "controller.interval", "optimizer.controller.interval"):
        says = f"--{name}: has no effect on sgd; choose --optimizer q_learning_sgd or"
        with pytest.raises(UsageError, match=says):
            expand_names(recipe, ["--optimizer", "sgd", f"--{name}=3"])
    with pytest.raises(UsageError, match="--momentum: has no effect on adamw; choose --optimizer"):
        parse_recipe(recipe, bare, "train", "")
    with pytest.raises(ValueError, match=r"optimizer.name='sdg': choose one of adamw, sgd"):
        expand_names(recipe, ["--optimizer", "sdg"])


def test_fields_are_set_as_in_a_file_too():
    recipe = recipes.get("megabyte_tiny")
    changes = ["train.remat=true", "data.append_eos=false", "data.warmup_lengths=[2, 4]"]
    changes += ["data.text_field=a b", "optimizer.name=sgd", "data.paths=[]"]
    changed = with_changes(recipe, [*changes, "--train.seed", "3", "optimizer.momentum=.8"])
    assert changed.train.remat and not changed.data.append_eos and changed.train.seed == 3
    assert changed.data.warmup_lengths == (2, 4) and changed.data.text_field == "a b"
    assert changed.optimizer == SGDConfig(learning_rate=0.3, warmup_steps=40, momentum=0.8)
    assert with_changes(replace(recipe, name="x"), []).name == "x"
    for change, says in {
        "train.steps=many": "invalid literal",
        "train.step=3": "--train.step: no such field; did you mean --train.steps",
        f"train.steps={'9' * 5000}": "train.steps",
    }.items():
        with pytest.raises(ValueError, match=says):
            with_changes(recipe, [change])


def test_a_field_of_another_architecture_is_named_as_such():
    says = "^--patcher: has no effect on megabyte; it is a field of blt$"
    with pytest.raises(UsageError, match=says):
        expand_names(recipes.get("megabyte_tiny"), ["--patcher", "space"])


def parsed(*argv):
    """The data, the warm-up lengths, the trackers and the n-grams that the options ask for."""
    recipe = parse_recipe(recipes.get("blt_tiny"), argv, "train", "")
    data, model = recipe.data, recipe.model
    assert isinstance(model, BLTConfig)
    return data.paths, data.warmup_lengths, recipe.train.track, model.ngram_sizes


def test_mentions_of_a_list_option_add_up():
    usual = ((), (), (), (3, 4, 5, 6, 7, 8))
    assert parsed("--data", "a", "--data.paths=b", "--steps", "3", "--paths", "c", "d") == (
        ("a", "b", "c", "d"),
        *usual[1:],
    )
    given = ["--track", "wandb", "--ngram-sizes=3", "--warmup_lengths", "16", "--track=tensorboard"]
    trackers = ("wandb", "tensorboard")
    assert parsed(*given, "--warmup-lengths", "32") == ((), (16, 32), trackers, (3,))
    assert parsed("--no-ngram-sizes") == (*usual[:3], ())
    assert parsed("--data", "-") == (("-",), *usual[1:])  # standard input
    seen = []

    def command(run: Path, /, data: tuple[Path, ...], check: tuple[Path, ...] = ()) -> int:
        seen.append((run, data, check))
        return 0

    parse_call(command, ["x", "--data", "a", "--check", "c", "--data", "b", "-1"], "command")
    assert seen == [(Path("x"), (Path("a"), Path("b"), Path("-1")), (Path("c"),))]


@pytest.mark.parametrize("option", ["data", "track", "warmup-lengths", "ngram_sizes"])
def test_a_list_option_needs_values(option):
    for rest in ([], ["--steps", "3"], [f"--{option}", "1"]):
        with pytest.raises(UsageError, match=r"^--\S+: needs a value$"):
            parsed(f"--{option}", *rest)
    for argv in ([f"--{option}="], [f"--{option}", ""], [f"--{option}", "1", ""]):
        with pytest.raises(UsageError, match=r"^--\S+: needs a value, not an empty one$"):
            parsed(*argv)


EMPTY = {
    "eval run --data": "--data: needs a value",
    "eval run --data ''": "--data: needs a value, not an empty one",
    "eval run --data a ''": "--data: needs a value, not an empty one",
    "eval '' --data a": "RUNS: is empty",
    "calibrate run --data a --check": "--check: needs a value",
    "calibrate run --data a --check=": "--check: needs a value, not an empty one",
    "export run --out ''": "--out: is empty",
    "import source --out=": "--out: needs a value, not an empty one",
    "inspect text --model ''": "--model: is empty",
    "parity run --data ''": "--data: needs a value, not an empty one",
    "plot ''": "RUN: is empty",
    "prepare '' --out x": "PATHS: is empty",
    "prepare a '' --out x": "PATHS: is empty",
    "serve ''": "RUN: is empty",
    "doctor --run-dir ''": "--run-dir: is empty",
    "doctor --data": "--data: needs a value",
    "train megabyte_tiny --run-dir ''": "--run-dir: needs a value",
}


@pytest.mark.parametrize("line", EMPTY)
def test_an_empty_path_is_not_the_working_directory(line, capsys):
    assert cli.main([x.strip("'") for x in re.split(" ", line)]) == 2
    error = capsys.readouterr().err
    assert error == f"bytelm {line.split()[0]}: {EMPTY[line]}\n"


@pytest.mark.parametrize(
    ("line", "says"),
    {
        "eval x --strid 3": "--strid: no such option; did you mean --stride?",
        "recipes --nothing-like-it": "--nothing-like-it: no such option; see --help",
        "compress -- -x": "--: no such option; a file whose name begins with a hyphen is given as "
        "./-NAME",
        "recipes more": "more: not expected here; see --help",
        "train megabyte_tiny more": "more: not expected here; see --help",
        "eval x": "--data: is required; see --help",
        "eval x --data y --dtype f32": "--dtype f32: choose one of float32, bfloat16, float64",
    }.items(),
)
def test_what_is_not_understood_is_named(line, says, capsys):
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().err == f"bytelm {line.split()[0]}: {says}\n"


@pytest.mark.parametrize("name", ["bytropix_tiny", "megabyte_tiny", "lfbyte_tiny", "entropy_tiny"])
def test_help_has_a_sentence_for_every_option_and_folds_what_has_no_effect(
    name, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "80")
    text = ""
    for optimizer in OPTIMIZER_CONFIGS if name == "megabyte_tiny" else ("adamw",):
        with pytest.raises(SystemExit):
            cli.main(["train", name, "--optimizer", optimizer, "--help"])
        text = capsys.readouterr().out
        assert all(len(line) <= 80 for line in text.splitlines())
        boxes = text[text.index("╭") :].splitlines()
        said = [line.strip("│ ") for line in boxes if line.startswith("│")]
        bare = [a for a, b in pairwise(said) if a[:2] == "--" and b[:1] == "("]
        prose = ["" if x[:1] != "│" or x[2] in "-─" else x[2:78].rstrip() for x in boxes]
        full = [len(f"{a} {b.split()[0]}") > 76 for a, b in pairwise(prose) if a and b]
        assert not bare and sum(line.startswith("--") for line in said) > 60
        assert all(full)  # tyro ends a line before one of a docstring that begins with no letter
    assert ("model.entropy options: no effect" in text) == (name == "bytropix_tiny")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("blt_tiny --patcher space --model.entropy.dim 96", "--model.entropy.dim: has no effect"),
        (
            "blt_tiny --patcher fixed --threshold 2",
            "--model.threshold: has no effect with",
        ),
        ("megabyte_tiny --reset-room 2", "--model.reset-room: has no effect"),
        ("lfbyte_tiny --adaptation full --rank 4", "with --model.adaptation=full; leave it out"),
    ],
)
def test_a_field_of_the_model_without_an_effect_is_refused(line, says, capsys):
    assert cli.main(["train", *line.split()]) == 2
    assert says in capsys.readouterr().err
