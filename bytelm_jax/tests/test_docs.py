"""Every command of two guides is run; of the guide to data, up to the first step of training.

`scripts/docs --execute` runs those of the other pages.
"""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bytelm_jax
import bytelm_torch
import bytelm_torch.train
from bytelm import recipes
from bytelm.config import Recipe
from bytelm.data import Mixture, cache
from bytelm.run_data import open_windows
from bytelm.tests.test_formats import TEXTS, write_form
from bytelm_jax.cli import main as cli
from bytelm_jax.cli import run

pytestmark = pytest.mark.usefixtures("compiled_once")
DOCS = Path(bytelm_jax.__file__).parents[1] / "docs"
FORMS = {
    "books.jsonl": "x.jsonl",
    "books.json": "list.json",
    "books.jsonl.gz": "x.jsonl.gz",
    "books.jsonl.xz": "x.jsonl.xz",
    "books.jsonl.bz2": "x.jsonl.bz2",
    "books.jsonl.zst": "x.jsonl.zst",
    "books.parquet": "x.parquet",
    "books.arrow": "file.arrow",
    "books-dataset": "data set",
    "books.tar": "x.tar",
    "books.array_record": "x.array_record",
}


def blocks(guide: str, language: str) -> str:
    """All code of a language in a guide."""
    text = (DOCS / guide).read_text("utf-8")
    return "".join(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))


def write_files(folder: Path) -> None:
    """The files that the guide's commands name."""
    for name, form in FORMS.items():
        write_form(form, folder).rename(folder / name)
    (folder / "books.txt").write_text("".join(TEXTS), "utf-8")
    shutil.copy(write_form("x.json.gz", folder), folder / "books.txt.gz")
    lines = (folder / "books.jsonl").read_text("utf-8")
    (folder / "articles.jsonl").write_text(lines.replace('"text"', '"body"'), "utf-8")
    for name in ("library", "shards"):
        (folder / name).mkdir()
        for part in ("1", "2"):
            shutil.copy(folder / "books.jsonl", folder / name / f"{part}.jsonl")
    question = {"prompt": "1 + 1 = ", "completion": "2"}
    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    for name, record in (("questions", question), ("chats", {"messages": messages})):
        (folder / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 60)
    (folder / "books.list").write_text("books.txt\nbooks.jsonl\n")


def test_every_command_of_the_guide_to_data(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_files(Path())
    trained = []

    def up_to_the_first_step(recipe, *_):
        windows, held_out, _ = open_windows(recipe)
        train = windows.sources.values() if isinstance(windows, Mixture) else [windows]
        size = sum(part.corpus.total_bytes for part in [*train, *held_out.values()])
        special = recipe.data.raw or recipe.data.valid
        trained.append((() if special else recipe.data.paths, size))
        return 0

    monkeypatch.setattr(run, "run", up_to_the_first_step)
    for line in blocks("data.md", "bash").splitlines():
        words = shlex.split(line)
        if words[0] == "cat":
            cache.prepared_input.cache_clear()
            piped = io.TextIOWrapper(io.BytesIO(Path(words[1]).read_bytes()))
            monkeypatch.setattr(sys, "stdin", piped)
            words = words[3:]
        assert words[0] == "bytelm" and cli.main(words[1:]) == 0, line
    seen = dict(trained)
    size = len("".join(TEXTS).encode())
    assert {seen[(name,)] for name in ("books.txt", *FORMS, "articles.jsonl", "-")} == {size}
    assert {seen[(name,)] for name in ("library", "shards/*.jsonl", "@books.list")} == {2 * size}


@pytest.fixture
def small_megabyte(monkeypatch):
    """`megabyte_tiny` is smaller still, and takes two steps."""
    small = recipes.megabyte_tiny()
    sizes = {"global_dim": 8, "local_dim": 8, "global_layers": 1, "local_layers": 1}
    small = replace(
        small,
        model=replace(small.model, max_length=1024, global_heads=1, local_heads=1, **sizes),
        data=replace(small.data, sequence_length=16),
        train=replace(small.train, steps=2, batch_size=2, devices=1),
    )

    def megabyte_tiny() -> Recipe:
        return small

    monkeypatch.setattr(recipes, "megabyte_tiny", megabyte_tiny)


def run_line(line: str) -> int:
    """Runs a line of a guide; its exit code. Our own commands run in this process."""
    words = shlex.split(line)
    if words[:3] == ["python", "-m", "bytelm_torch.train"]:
        return bytelm_torch.train.main(words[3:])
    if words[0] == "bytelm":
        return cli.main(words[1:])
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(DOCS.parent)}
    return subprocess.run(line, shell=True, env=environment, timeout=300).returncode


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft 0.21
def test_every_command_of_the_guide_to_fine_tuning(tmp_path, monkeypatch, capsys, small_megabyte):
    """All of each command, with a smaller model and two steps."""
    monkeypatch.chdir(tmp_path)
    for name, text in {"english": "some words of a text ", "greek": "λόγοι ενός κειμένου "}.items():
        (tmp_path / f"{name}.txt").write_text(text * 99, "utf-8")
    for line in blocks("fine-tuning.md", "bash").splitlines():
        assert run_line(line) == 0, (line, capsys.readouterr().err)
    names: dict[str, Any] = {}
    exec(blocks("fine-tuning.md", "python"), names)
    with torch.inference_mode():
        ids = torch.tensor([[97, 98, 99]])
        merged = names["hf"].from_native(bytelm_torch.from_pretrained("exports/lora"))
        torch.testing.assert_close(names["model"](ids).logits, merged.eval()(ids).logits)
