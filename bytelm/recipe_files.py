"""Recipes in files: whole ones, and what differs from a recipe that has a name."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bytelm import recipes
from bytelm.config import Recipe, from_dict, require, to_dict
from bytelm.files import errors_about, one_line, read_text
from bytelm.runs import load_recipe, read_recipe_json, refuse_export


def find_recipe(named: str) -> Recipe:
    """The recipe with this name or, where `named` has a suffix or a slash, in this file or folder.

    A recipe's name wins over a file of that name. Raises `ValueError` for neither.
    """
    known = named.replace("-", "_") in recipes.names()
    return recipes.get(named) if known or not _is_path(named) else read_recipe(Path(named))


def _is_path(named: str) -> bool:
    return "/" in named or os.sep in named or bool(Path(named).suffix)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a JSON or YAML file, or from the `config.json` of a run folder.

    A file holds what `config.json` does, fields at their defaults left out, or with "base" the name
    of a recipe and what differs from it. Without a "name" it is called as the file. What a run has
    found out, its patches and the weights that it began from, does not come along. Raises
    `ValueError` for anything else.
    """
    if path.suffix not in (".json", ".yaml", ".yml"):
        return replace(load_recipe(path), patching=None, origin="")
    with errors_about(path, "give a JSON or YAML file with a recipe"):
        stored = _load(path)
        require(isinstance(stored, dict), "must hold an object of fields, such as model and train")
        refuse_export(stored, path)
        base = stored.pop("base", None)
        tree = {"name": path.stem} if base is None else {**_tree(base, stored), "name": path.stem}
        return replace(from_dict(Recipe, _merged(tree, stored)), patching=None, origin="")


def _load(path: Path) -> Any:
    if path.suffix == ".json":
        return read_recipe_json(path)
    try:
        import yaml
    except ImportError:
        raise ValueError("YAML needs PyYAML: pip install pyyaml, or write JSON") from None
    try:
        return yaml.load(read_text(path), _with_exponents(yaml))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not YAML ({one_line(error, 200)})") from None


def _with_exponents(yaml: Any) -> Any:
    """PyYAML's safe loader, to which 1e-3 is a number as in YAML 1.2 and JSON, not a text."""

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _tree(base: Any, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe `base` as a tree, under the optimizer that a file over it names."""
    is_name = isinstance(base, str) and not _is_path(base)
    require(is_name, f"base={base!r}: must be the name of a recipe, not a file")
    recipe, asked = recipes.get(base), stored.get("optimizer")
    if isinstance(asked, Mapping) and "name" in asked:
        recipe = recipes.with_optimizer(recipe, asked["name"])
    model = stored.get("model")
    wanted = model.get("architecture") if isinstance(model, Mapping) else None
    ours = recipe.model.architecture
    same = wanted in (None, ours)
    require(same, f"model.architecture={wanted}: {base} is {ours}; take a base that is {wanted}")
    return to_dict(recipe)


def _merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(tree)
    for name, value in changes.items():
        inner = both.get(name)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            value = _merged(inner, value)
        both[name] = value
    return both
