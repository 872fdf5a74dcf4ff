"""What is registered is proven: no optimizer and no architecture without a parity test."""

import typing

import pytest

import bytelm_jax.models
import bytelm_jax.optimizers.build
import bytelm_torch.models
import bytelm_torch.optimizers.build
from bytelm import recipes
from bytelm.config import MODEL_CONFIGS, OPTIMIZER_CONFIGS, ModelConfig
from bytelm_torch.interop.transformers import _CLASSES as hf_classes
from parity_tests import test_blt, test_lfbyte, test_training, twins

MODELS = {
    "megabyte": twins.MEGABYTES,
    "entropy": test_blt.CONFIGS,
    "blt": test_blt.CONFIGS,
    "lfbyte": test_lfbyte.FORMS,
}
"""Architecture → the configurations that its tests of logits and gradients run through."""


@pytest.mark.parametrize("kind", MODEL_CONFIGS, ids=lambda kind: kind.architecture)
def test_every_architecture_has_a_parity_test(kind):
    name = kind.architecture
    assert name in MODELS, f"{name}: has no parity test; write one, then name its table here"
    assert any(type(config) is kind for config in MODELS[name].values())


@pytest.mark.parametrize("kind", MODEL_CONFIGS, ids=lambda kind: kind.architecture)
def test_every_architecture_is_registered_wherever_it_has_to_be(kind):
    name = kind.architecture
    assert kind in typing.get_args(ModelConfig), f"{name}: add it to ModelConfig"
    models = [recipes.get(each).model for each in recipes.names()]
    models = [model for model in models if type(model) is kind]
    assert models, f"{name}: no recipe has it; add one to bytelm/recipes.py"
    small = min(models, key=lambda model: model.parameter_count())
    theirs = bytelm_torch.models.build_abstract(small)  # an error where build_model has no case
    assert len(bytelm_jax.models.abstract_params(small)) == len(theirs.state_dict())
    known = {each.config_class.native for each in hf_classes}
    assert kind in known, f"{name}: has no class in bytelm_torch/interop/transformers.py"


@pytest.mark.parametrize("name", OPTIMIZER_CONFIGS)
def test_every_optimizer_has_builders_and_a_parity_test(name):
    for build in (bytelm_jax.optimizers.build, bytelm_torch.optimizers.build):
        assert name in build.BUILDERS, f"{name}: {build.__name__} has no builder"
    hint = f"{name}: has no parity test; add it to OPTIMIZERS and PARITY of test_training.py"
    assert name in test_training.OPTIMIZERS, hint
    assert name in {row[1] for row in test_training.PARITY if row[2] == 200}, hint
    assert test_training.OPTIMIZERS[name].name == name


def test_nothing_is_built_that_is_not_registered():
    for build in (bytelm_jax.optimizers.build, bytelm_torch.optimizers.build):
        assert list(build.BUILDERS) == list(OPTIMIZER_CONFIGS)
    assert MODELS.keys() == {kind.architecture for kind in MODEL_CONFIGS}
