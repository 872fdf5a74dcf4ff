"""The README tells the truth: its file map, its commands, its recipes and its Python."""

import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

from bytelm import recipes
from bytelm.arguments import expand_names, take_option
from bytelm_jax.cli import main as cli
from bytelm_jax.cli.train import take_dry_run, take_processes

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PACKAGES = ("bytelm_jax", "bytelm_torch")
FILE_MAP = README.split("## File map")[1]


def test_the_file_map_names_every_folder_and_nothing_else():
    named = {
        path
        for row in FILE_MAP.splitlines()
        if row.startswith("| `")
        for path in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    assert named and all((ROOT / path).is_dir() for path in named)
    folders = {p for package in PACKAGES for p in (ROOT / package).iterdir() if p.is_dir()}
    there = {str(p.relative_to(ROOT)) for p in folders if p.name not in ("tests", "__pycache__")}
    assert there <= named, there - named


def test_the_torch_package_mirrors_layers_and_models():
    for folder in ("layers", "models"):
        ours, theirs = (
            {p.name for p in (ROOT / package / folder).glob("*.py")} for package in PACKAGES
        )
        assert ours == theirs


def commands():
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["bytelm"]:
                yield words[1:]


def test_every_command_and_option_in_the_readme_exists(capsys):
    seen = set()
    for name, *arguments in commands():
        seen.add(name)
        if name == "train":
            recipe = recipes.get(arguments[0])
            _, rest = take_option(arguments[1:], "run_dir", "save_path")
            for option in ("epochs", "init_from"):
                _, rest = take_option(rest, option)
            _, rest = take_processes(take_dry_run(rest)[1])
            expand_names(recipe, rest)
            continue
        with nullcontext() if name == "sweep" else pytest.raises(SystemExit):
            cli.main([name, "--help"])
        output = capsys.readouterr().out
        for option in (a for a in arguments if a.startswith("--")):
            assert option in output, (name, option)
    assert seen == set(cli.COMMANDS)


def test_the_recipe_table_is_right_and_the_command_lists_every_recipe(capsys):
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", README, re.MULTILINE))
    assert cli.main(["train", "--help"]) == 0
    listed = capsys.readouterr().out.split("recipes: ")[1].replace("\n", " ").split(", ")
    assert [name.strip() for name in listed] == recipes.names()
    for name, count in rows.items():
        assert f"{recipes.get(name).model.parameter_count():,}" == count


def test_the_python_in_the_readme_runs():
    first = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    names: dict = {}
    exec(first, names)
    assert names["logits"].shape == (1, 9, 512)
