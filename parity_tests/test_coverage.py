"""What is registered is proven: no optimizer and no architecture without a parity test."""

import pytest

import bytelm_jax.optimizers.build
import bytelm_torch.optimizers.build
from bytelm.config import MODEL_CONFIGS, OPTIMIZER_CONFIGS
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
