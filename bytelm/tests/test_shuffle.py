"""The order of windows within an epoch: each exactly once, and grain's for older runs."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bytelm import recipes
from bytelm.config import ByteVocab, to_dict
from bytelm.data import Windows, memory_corpus, shuffle
from bytelm.data.shuffle import skips_last_row
from bytelm.runs import keep_rules, prepare_run_dir, save_recipe
from bytelm_jax.training.batches import training_batches

VOCAB = ByteVocab()


@pytest.mark.parametrize("count", [1, 2, 17, 65537])
def test_an_epoch_of_the_exact_order_visits_every_row_once(count: int) -> None:
    """Of 65,537 rows, 4^8 + 1, grain's order leaves out the last one."""
    # Under another name the module escapes the checks of shapes, which take it twenty times longer.
    spec = importlib.util.spec_from_file_location("unchecked", shuffle.__file__)
    assert spec and spec.loader
    unchecked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unchecked)
    shuffled_index = unchecked.shuffled_index
    exact = [shuffled_index(position, count, 3) for position in range(count)]
    assert sorted(exact) == list(range(count))
    grain = [shuffled_index(position, count, 3, "grain") for position in range(count)]
    assert skips_last_row(count) == (count == 65537) == (grain != exact)
    if skips_last_row(count):
        assert set(grain) == set(range(count - 1)) and len(set(grain)) == count - 1
        windows = Windows(memory_corpus(np.arange(count, dtype="<u4").tobytes()), VOCAB, 4, False)
        for start, order, expected in ((16383, "exact", exact), (16383, "grain", grain)):
            ids = next(training_batches(windows, 4, 3, start, order=order)).ids
            found = ids.astype(np.uint8).view("<u4").ravel().tolist()
            assert found == expected[4 * start : 4 * start + 4]


def test_a_run_begun_before_there_was_a_choice_keeps_its_order(tmp_path: Path) -> None:
    recipe = recipes.megabyte_tiny()
    assert recipe.data.order == "exact" and keep_rules(tmp_path, recipe) == recipe
    written = to_dict(recipe)
    del written["data"]["order"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    old = keep_rules(tmp_path, recipe)
    assert old == replace(recipe, data=replace(recipe.data, order="grain"))
    prepare_run_dir(tmp_path, old)


def test_a_run_begun_before_there_was_a_choice_keeps_its_patches(tmp_path: Path) -> None:
    recipe = recipes.blt_132m()
    assert to_dict(recipe.model)["patcher"] == "space"
    written = to_dict(recipe)
    del written["data"]["order"], written["model"]["patcher_version"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    old = keep_rules(tmp_path, recipe)
    assert old.model == replace(recipe.model, patcher="word")
    prepare_run_dir(tmp_path, old)
    save_recipe(tmp_path, old)
    assert keep_rules(tmp_path, recipe) == old
