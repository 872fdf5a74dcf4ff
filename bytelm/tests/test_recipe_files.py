"""Recipes in files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bytelm import recipes
from bytelm.config import to_dict
from bytelm.recipe_files import find_recipe, read_recipe


def test_a_file_says_what_differs_from_a_recipe(tmp_path: Path) -> None:
    changes = {"model": {"dropout": 0.2}, "train": {"steps": 7}, "data": {"paths": ["a", "b"]}}
    (tmp_path / "mine.json").write_text(json.dumps({"base": "megabyte_tiny", **changes}))
    (tmp_path / "mine.yaml").write_text(
        "base: megabyte-tiny\nmodel: {dropout: 2e-1}\ntrain:\n  steps: 7\ndata: {paths: [a, b]}\n"
    )
    usual = recipes.get("megabyte_tiny")
    expected = replace(
        usual,
        name="mine",
        model=replace(usual.model, dropout=0.2),
        train=replace(usual.train, steps=7),
        data=replace(usual.data, paths=("a", "b")),
    )
    for name in ("mine.json", "mine.yaml"):
        assert find_recipe(str(tmp_path / name)) == expected
    tuned = {"base": "blt_tiny", "name": "other", "optimizer": {"name": "lion", "beta2": 0.95}}
    (tmp_path / "tuned.json").write_text(json.dumps(tuned))
    lion = read_recipe(tmp_path / "tuned.json")
    known = recipes.with_optimizer(recipes.get("blt_tiny"), "lion")
    assert lion == replace(known, name="other", optimizer=replace(known.optimizer, beta2=0.95))


def test_a_run_s_configuration_is_a_recipe(tmp_path: Path) -> None:
    run = replace(recipes.get("lfbyte_tiny"), origin="runs/a, sha256:0")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(run)))
    for path in (tmp_path / "config.json", tmp_path):
        assert find_recipe(str(path)) == recipes.get("lfbyte_tiny")
    assert find_recipe("blt-tiny") == recipes.get("blt_tiny")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.json", "[1]", r"a\.json: must hold an object of fields"),
        ("a.json", "{", r"a\.json: not JSON"),
        ("a.yaml", "a: [", r"a\.yaml: not YAML"),
        ("a.yaml", "base: megabyte", r"a\.yaml: recipe=megabyte: unknown; did you mean megabyte_"),
        ("a.yaml", "base: 3", r"base=3: must be the name of a recipe"),
        ("a.yaml", "{base: blt_tiny, modle: {}}", r"config\.modle: unknown field of Recipe"),
        (
            "a.yaml",
            "{base: blt_tiny, model: {architecture: lfbyte}}",
            "model.architecture=lfbyte: blt_tiny is blt; take a base that is lfbyte",
        ),
        ("a.json", '{"library": "bytelm"}', "an export, not to a run; .* holds no weights"),
    ],
)
def test_what_is_no_recipe_is_refused(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        read_recipe(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_every_recipe_has_a_line() -> None:
    lines = {each.name: each for each in recipes.summaries()}
    assert list(lines) == recipes.names()
    assert lines["megabyte_132m"].parameters == 132_278_528
    assert lines["megabyte_132m"].state_bytes == 12 * 132_278_528
    assert all(each.purpose and "`" not in each.purpose for each in lines.values()), lines
