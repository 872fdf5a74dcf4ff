"""Recipes as `bytelm train` makes them: of given weights, and with fields set."""

from collections.abc import Sequence

from bytelm.arguments import as_options, parse_recipe
from bytelm.config import ModelConfig, Recipe, TrainConfig


def begun_from(path: str, model: ModelConfig) -> Recipe:
    """The recipe of a run whose model and weights are those of `path`."""
    return Recipe(name="begun", model=model, train=TrainConfig(init_from=path))


def with_changes(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with fields set as on a command line; raises `UsageError` for what it lacks."""
    return parse_recipe(recipe, as_options(changes), "changes", "")
