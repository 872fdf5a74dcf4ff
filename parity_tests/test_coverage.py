"""What is registered is proven: no optimizer and no architecture without a parity test."""

import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bytelm.config
import bytelm_jax.models
import bytelm_jax.optimizers.build
import bytelm_torch.models
import bytelm_torch.optimizers.build
from bytelm import recipes
from bytelm.config import MODEL_CONFIGS, OPTIMIZER_CONFIGS, OptimizerConfig
from bytelm.config.base import ArchitectureConfig
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.report import compare_twins
from bytelm_jax.parity.twins import make_twin
from bytelm_torch import hf
from bytelm_torch.models import build_model
from parity_tests import test_blt_resets, test_resets, test_training
from parity_tests.cases import quick
from parity_tests.tiny_models import CONFIGS
from parity_tests.twins import random_ids, random_params


def test_every_configuration_is_registered():
    for module in pkgutil.iter_modules(bytelm.config.__path__, "bytelm.config."):
        importlib.import_module(module.name)
    missing = {
        kind.__name__ for kind in set(ArchitectureConfig.__subclasses__()) - {*MODEL_CONFIGS}
    }
    assert not missing, f"{missing}: add it to ModelConfig in bytelm/config/models.py"
    names = {kind.__name__ for kind in MODEL_CONFIGS}
    assert set(bytelm.config.models.__all__) == names, "complete __all__ of bytelm/config/models.py"
    names = {kind.__name__ for kind in (*OPTIMIZER_CONFIGS.values(), OptimizerConfig)}
    hint = "complete __all__ and OPTIMIZER_CONFIGS of bytelm/config/optimizer.py"
    assert set(bytelm.config.optimizer.__all__) == names, hint


@pytest.mark.parametrize("kind", MODEL_CONFIGS, ids=lambda kind: kind.architecture)
def test_every_architecture_is_built_has_a_recipe_and_a_parity_test(kind):
    name = kind.architecture
    models = [recipes.get(each).model for each in recipes.names()]
    models = [model for model in models if type(model) is kind]
    assert models, f"{name}: no recipe has it; add one to bytelm/recipes.py"
    small = min(models, key=lambda model: model.parameter_count())
    ours, theirs = abstract_params(small), bytelm_torch.models.build_abstract(small)
    counts = [sum(p.size for p in ours.values()), sum(p.numel() for p in theirs.parameters())]
    assert counts == [small.parameter_count()] * 2, f"{name}: parameter_count"
    assert small.flops_per_byte(64) > 0, f"{name}: flops_per_byte"
    hint = f"{name}: has no parity test; write parity_tests/test_{name}.py with a TINY_MODELS"
    assert any(type(config) is kind for config in CONFIGS.values()), hint
    resets = [*test_resets.FORMS.values(), *test_blt_resets.CONFIGS.values()]
    hint = f'{name}: add a configuration with reset_on="newline" to its TINY_MODELS'
    assert any(type(config) is kind for config in resets), hint
    assert hasattr(hf, kind.__name__.replace("Config", "ForCausalLM"))


@pytest.mark.parametrize("name", quick(CONFIGS, "in_action", "entropy"))
def test_layers_logits_loss_gradients_and_generation(name, x64):
    config = CONFIGS[name]
    params = random_params(config, "float64")
    ids = random_ids(config, 2, 19)
    ids[1, 12:] = config.vocab.pad_id  # a ragged row
    report = compare_twins(config, params, make_twin(config, params), ids, "float64")
    assert report.passed, report.text


@pytest.mark.parametrize("name", CONFIGS)
def test_ids_dtypes_dropout_and_recomputation(name):
    """What users switch on has an effect, and what cannot be right is refused."""
    config = dataclasses.replace(CONFIGS[name], dropout=0.5)
    ids = random_ids(config, 2, 19)
    bind, _ = define_model(config)
    ours, theirs = abstract_params(config), build_model(config)
    low = {k: jax.ShapeDtypeStruct(v.shape, jnp.bfloat16) for k, v in ours.items()}
    assert jax.eval_shape(lambda p: bind(p)(ids), low).dtype == jnp.float32, "LogitsLinear"
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
    program = jax.make_jaxpr(lambda p, k: bind(p).outputs(jnp.asarray(ids), k, True))(ours, keys)
    assert "random_bits" in str(program) or "threefry2x32" in str(program), "dropout_keys"
    assert "remat" in str(program) or "checkpoint" in str(program), "remat"
    beyond = np.full_like(ids, config.vocab.size)
    for model, rows in ((bind(zeros(ours)), beyond), (theirs, torch.from_numpy(beyond))):
        with pytest.raises(ValueError, match=r"^ids: "):
            model(rows)
    with torch.no_grad():
        wide = theirs.bfloat16().train()(torch.from_numpy(ids))
        assert wide.dtype == torch.float32, "LogitsLinear"
        assert not torch.equal(wide, theirs(torch.from_numpy(ids))), "dropout"


def zeros(params):
    return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in params.items()}


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
