"""README, guides and CONTRIBUTING tell the truth: file map, commands, links, recipes, Python."""

import io
import re
import shlex
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest

from bytelm import recipes
from bytelm.arguments import as_options, expand_names, take_flag, take_option
from bytelm_jax.cli import main as cli
from bytelm_jax.cli.train import take_dry_run, take_processes

ROOT = Path(__file__).parent.parent.parent
PAGES = {path.relative_to(ROOT): path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")}
PAGES |= {Path(name): (ROOT / name).read_text("utf-8") for name in ("README.md", "CONTRIBUTING.md")}
README = PAGES[Path("README.md")]
PACKAGES = ("bytelm_jax", "bytelm_torch")
FILE_MAP = PAGES[Path("CONTRIBUTING.md")].split("## File map")[1].split("\n## ")[0]
TRAINERS = (["bytelm", "train"], ["-m", "bytelm_torch.train"])
IMAGINED = ("gru_tiny",)
"""Recipes that a guide adds."""


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


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120 and len(README.split()) <= 2000


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands():
    """(page, words) of every command in a bash block or cell; a pipe's parts are commands too."""
    for page, text in PAGES.items():
        cells = [cell for cell in code(text, "{code-cell}") if cell.startswith("%%bash\n")]
        blocks = code(text, "bash") + [cell.removeprefix("%%bash\n") for cell in cells]
        for line in "".join(blocks).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "|" in words:
                yield page, words[: words.index("|")]
                words = words[words.index("|") + 1 :]
            yield page, words


def after(words: list[str], start: list[str]) -> list[str] | None:
    """The words that follow `start`, wherever it stands."""
    for at in range(len(words) - len(start) + 1):
        if words[at : at + len(start)] == start:
            return words[at + len(start) :]
    return None


def recipe_named(name: str):
    """The recipe of that name; files, runs and what a guide adds are like `megabyte_tiny`."""
    imagined = name in IMAGINED or "/" in name or name.endswith((".json", ".yaml"))
    return recipes.get("megabyte_tiny" if imagined else name)


def check_training(arguments: list[str]) -> None:
    """Raises `ValueError` unless the recipe and every option of a trainer's line exist."""
    rest = as_options(arguments)
    branch, rest = take_option(rest, "branch_from")
    recipe = recipe_named("megabyte_tiny" if branch else rest.pop(0))
    for option in ("run_dir", "save_path", "epochs", "init_from", "train.init_from"):
        _, rest = take_option(rest, option)
    for flag in ("no-lock", "compile"):
        _, rest = take_flag(rest, flag)
    _, rest = take_processes(take_dry_run(rest)[1])
    expand_names(recipe, rest)


@cache
def help_of(name: str) -> str:
    """What `bytelm NAME --help` prints."""
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        cli.main([name, "--help"])
    return printed.getvalue()


def test_every_command_and_option_in_the_guides_exists():
    seen = set()
    for page, words in commands():
        trained = next((rest for start in TRAINERS if (rest := after(words, start))), None)
        if trained and trained[0] not in ("-h", "--help"):
            check_training(trained)
        if words[:1] != ["bytelm"] or words[1] in ("--version", "--print-completion"):
            continue
        name, *arguments = words[1:]
        arguments = arguments[: [*arguments, "--"].index("--")]  # another program's follow
        assert name in cli.COMMANDS, (page, words)
        seen.add(name)
        options = [each.partition("=")[0] for each in arguments if each.startswith("--")]
        if name == "sweep":
            own = ("--vary", "--random", "--seed", "--out")
            expand_names(recipe_named(arguments[0]), [o for o in options if o not in own])
        elif name != "train":
            unknown = [option for option in options if option not in help_of(name)]
            assert not unknown, (page, name, unknown)
    assert seen == set(cli.COMMANDS), "a command is shown nowhere"


def test_every_link_leads_somewhere():
    def anchors(text: str) -> set[str]:
        text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            if ":" in path:
                continue
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), (page, link)
            if anchor:
                assert anchor in anchors(target.read_text("utf-8")), (page, link)


def test_every_page_is_in_the_table_of_contents():
    index = PAGES[Path("docs/index.md")]
    listed = {name for block in code(index, "{toctree}") for name in block.split()}
    assert {path.stem for path in PAGES if path.parent.name == "docs"} <= listed | {"index"}


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_the_recipe_tables_are_right_and_complete(page):
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", PAGES[Path(page)], re.MULTILINE))
    assert rows.keys() == set(recipes.names())
    for name, count in rows.items():
        assert f"{recipes.get(name).model.parameter_count():,}" == count


def test_the_command_lists_every_recipe(capsys):
    assert cli.main(["train", "--help"]) == 0
    listed = capsys.readouterr().out.split("recipes: ")[1].replace("\n", " ").split(", ")
    assert [name.strip() for name in listed] == recipes.names()


def test_the_python_in_the_readme_runs_and_that_of_the_guides_compiles():
    for page, text in PAGES.items():
        cells = [cell for cell in code(text, "{code-cell}") if not cell.startswith("%%")]
        for block in code(text, "python") + cells:
            compile(block, str(page), "exec")
    [first] = code(README, "python")
    names: dict = {}
    exec(first, names)
    assert names["logits"].shape == (1, 9, 512)
