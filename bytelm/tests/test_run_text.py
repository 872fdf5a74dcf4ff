"""The text of a run's data, whole and in part."""

import random
from dataclasses import replace

import pytest

from bytelm import recipes
from bytelm.data import memory_corpus
from bytelm.run_data import open_windows, spread_text, training_text


def test_a_corpus_is_read_whole_or_in_pieces_that_are_spread_over_it():
    chance = random.Random(0)
    documents = [chance.randbytes(chance.randrange(1, 90_000)) for _ in range(20)]
    corpus, whole = memory_corpus(documents), b"".join(documents)
    for most in (len(whole), 10**9):
        assert b"".join(spread_text(corpus, most)) == whole
    assert b"".join(spread_text(corpus, 0)) == b""
    for most in (1, 65_536, 65_537, 300_000, len(whole) - 1):
        text = b"".join(spread_text(corpus, most))
        assert len(text) == most and text[:1] == whole[:1]
        assert text[-30_000:] in whole
        assert most < 2**17 or whole.index(text[-30_000:]) > len(whole) * 0.75


@pytest.mark.parametrize("weights", [("a=3", "b=1"), ("a=1", "b=1")])
def test_sources_are_read_by_their_shares(weights, tmp_path):
    paths = []
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 100_000)
        paths.append(f"{name}={tmp_path / name}")
    recipe = recipes.megabyte_tiny()
    recipe = replace(recipe, data=replace(recipe.data, paths=tuple(paths), weights=weights))
    text = b"".join(training_text(open_windows(recipe), 80_000))
    share = int(weights[0][2:]) / (int(weights[0][2:]) + 1)
    assert len(text) == 80_000 and text.count(b"a") == 80_000 * share


def test_what_a_run_holds_out_is_not_in_its_training_text(tmp_path):
    (tmp_path / "text").write_bytes(b"".join(b"line %d\n" % n for n in range(5000)))
    recipe = recipes.megabyte_tiny()
    recipe = replace(recipe, data=replace(recipe.data, paths=(str(tmp_path / "text"),)))
    found = open_windows(recipe)
    (held_out,) = found.validation.values()
    trained = b"".join(training_text(found, 2**30))
    last = b"".join(spread_text(held_out.corpus, 2**30))
    assert trained + last == (tmp_path / "text").read_bytes() and last
