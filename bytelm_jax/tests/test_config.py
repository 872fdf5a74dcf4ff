"""Configurations: the same text in both packages, JSON both ways, one-line refusals."""

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from bytelm_jax import recipes
from bytelm_jax.config import (
    ByteVocab,
    DataConfig,
    MegabyteConfig,
    OptimizerConfig,
    Recipe,
    TrainConfig,
    from_dict,
    to_dict,
)
from bytelm_jax.models import abstract_params

ROOT = Path(__file__).parent.parent.parent


def body(path):
    """The text after the docstring, with the package's own name taken out."""
    text = path.read_text("utf-8")
    return text.split('"""', 2)[2].replace("bytelm_jax", "bytelm").replace("bytelm_torch", "bytelm")


def test_both_packages_hold_the_same_text():
    ours = sorted((ROOT / "bytelm_jax").glob("config*.py"))
    assert ROOT / "bytelm_jax" / "config.py" in ours
    for path in [*ours, ROOT / "bytelm_jax" / "tokenizer.py"]:
        assert body(path) == body(ROOT / "bytelm_torch" / path.name), path.name


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_survives_json_and_its_size_is_the_formula(name):
    recipe = recipes.get(name)
    assert recipe.name == name
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe)))) == recipe
    shapes = abstract_params(recipe.model)
    assert sum(leaf.size for leaf in shapes.values()) == recipe.model.parameter_count()
    assert recipe.data.sequence_length <= getattr(recipe.model, "max_length", 1 << 30)
    documented = getattr(recipes, name).__doc__
    assert f"{recipe.model.parameter_count():,}" in documented or name.endswith("tiny")


def test_recipes_are_found_by_name():
    assert recipes.get("megabyte-tiny") == recipes.megabyte_tiny()
    with pytest.raises(ValueError, match="did you mean transformer_tiny"):
        recipes.get("transformer_tinny")
    with pytest.raises(ValueError, match="choose one of megabyte_tiny"):
        recipes.get("zzz")


@pytest.mark.parametrize(
    ("kind", "field", "value", "says"),
    [
        (MegabyteConfig, "patch_size", 0, "patch_size=0: must be at least 1"),
        (MegabyteConfig, "dropout", 1.0, "dropout=1.0: must be at least 0 and below 1"),
        (MegabyteConfig, "max_length", 2047, "multiple of patch_size=8"),
        (MegabyteConfig, "local_heads", 999, "local_heads=999: must be at most the width 256"),
        (ByteVocab, "size", 255, "256 bytes need at least 256"),
        (ByteVocab, "pad_id", 65, "vocab.pad_id=65: choose an id from"),
        (ByteVocab, "pad_id", 258, "must differ"),
        (OptimizerConfig, "learning_rate", 0.0, "learning_rate=0.0: must be above 0"),
        (OptimizerConfig, "final_fraction", 2.0, "must be between 0 and 1"),
        (DataConfig, "sequence_length", 0, "sequence_length=0: must be at least 1"),
        (TrainConfig, "steps", 0, "steps=0: must be at least 1"),
        (TrainConfig, "accumulation_steps", 5, "must be a multiple of accumulation_steps=5"),
    ],
)
def test_values_that_cannot_work_are_refused(kind, field, value, says):
    with pytest.raises(ValueError, match=says) as caught:
        replace(kind(), **{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modle": {}}, "config.modle: unknown field of Recipe"),
        ({"model": {"architecture": "gpt"}}, "config.model.architecture='gpt': choose one of"),
        ({"model": {"architecture": "megabyte", "patch_size": "8"}}, "patch_size='8': must be of"),
        ({"train": {"steps": True}}, "config.train.steps=True: must be of type int"),
        ({"train": {"parallel": "pmap"}}, "config.train.parallel='pmap': choose one of jit"),
        ({"data": {"paths": "x"}}, "config.data.paths='x': must be a list"),
        ({"name": None}, "config.name=None: must be of type str"),
    ],
)
def test_json_that_does_not_fit_is_refused(change, says):
    good = to_dict(recipes.megabyte_tiny())
    with pytest.raises(ValueError, match=says):
        from_dict(Recipe, good | change)


def test_a_missing_field_is_refused():
    good = to_dict(recipes.megabyte_tiny())
    del good["model"]
    with pytest.raises(ValueError, match="model"):
        from_dict(Recipe, good)


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        MegabyteConfig().patch_size = 3  # pyright: ignore[reportAttributeAccessIssue]
