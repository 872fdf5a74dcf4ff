"""Every command of the guides is run; of training, all that comes before the first step."""

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import bytelm_jax
from bytelm.data import Mixture, cache
from bytelm.run_data import open_windows
from bytelm.tests.test_formats import TEXTS, write_form
from bytelm_jax.cli import main as cli
from bytelm_jax.cli import run

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
    guide = (DOCS / "data.md").read_text("utf-8")
    for line in "".join(re.findall(r"```bash\n(.*?)```", guide, re.DOTALL)).splitlines():
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
