"""A recipe that starts from given weights, as `bytelm train --init-from` makes it."""

from bytelm.config import ModelConfig, Recipe, TrainConfig


def begun_from(path: str, model: ModelConfig) -> Recipe:
    """The recipe of a run whose model and weights are those of `path`."""
    return Recipe(name="begun", model=model, train=TrainConfig(init_from=path))
