"""Models taken apart once: what changes is seen, what does not is not walked through again."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bytelm_jax.inference import compiled as structure
from bytelm_jax.inference.compiled import split_cached
from bytelm_jax.models.interface import pack, unpack


class Pair(nnx.Module):
    def __init__(self, factor: int = 2):
        self.factor = factor
        self.parts = nnx.List([nnx.Param(jnp.zeros(2)), nnx.Param(jnp.ones(3))])

    def __call__(self) -> jax.Array:
        return self.factor * sum((part[...].sum() for part in self.parts), jnp.zeros(()))


def test_arrays_are_read_again_and_the_model_is_not_walked_through_again(monkeypatch):
    model = Pair()
    first, params = split_cached(model)
    monkeypatch.setattr(structure, "_parts_of", None)  # calling it would raise TypeError
    model.parts[1][...] = jnp.full(3, 5.0)
    again, changed = split_cached(model)
    assert again is first
    assert [part.tolist() for part in params] == [[0, 0], [1, 1, 1]]
    assert [part.tolist() for part in changed] == [[0, 0], [5, 5, 5]]
    assert first.model(changed)() == 30


def test_equal_models_have_one_structure_and_others_another():
    (first, _), (same, _), (other, _) = (split_cached(model) for model in (Pair(), Pair(), Pair(3)))
    assert first is same
    assert first != other


def test_a_changed_module_is_noticed():
    model = Pair()
    before, _ = split_cached(model)
    model.factor = 7
    after, params = split_cached(model)
    assert after != before and after.model(params)() == 21
    model.parts[0] = nnx.Param(jnp.full(2, 4.0))
    structure_of_new, params = split_cached(model)
    assert structure_of_new.model(params)() == 77


def test_models_are_not_kept_alive():
    model = Pair()
    split_cached(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_packed_caches_come_back_and_may_be_sliced_along_the_leading_axes():
    source = np.random.default_rng(0)
    shapes = ((2, 5, 3, 4), (2, 5, 1, 6))
    tree = tuple((source.normal(size=a), source.normal(size=b)) for a, b in (shapes, shapes[::-1]))
    tree = jax.tree.map(jnp.asarray, tree)
    packed = pack(tree, 2)
    assert packed.shape == (2, 5, 2 * (12 + 6))
    third = jax.tree.map(lambda x: x[:, 3], tree)
    for actual, expected in ((unpack(packed, tree), tree), (unpack(packed[:, 3], third), third)):
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(e))
