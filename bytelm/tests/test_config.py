"""Configurations: JSON both ways, one-line refusals."""

import json
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from bytelm import recipes
from bytelm.config import (
    MODEL_CONFIGS,
    OPTIMIZER_CONFIGS,
    AdamWConfig,
    BLTConfig,
    ByteVocab,
    DataConfig,
    LionConfig,
    MegabyteConfig,
    MuonConfig,
    OptimizerConfig,
    PatchingContract,
    QLearningAdamWConfig,
    QLearningConfig,
    QLearningSGDConfig,
    Recipe,
    SGDConfig,
    TrainConfig,
    change_optimizer,
    from_dict,
    model_from_dict,
    to_dict,
)
from bytelm_jax.models import abstract_params

ROOT = Path(__file__).parent.parent.parent


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


def test_recipes_of_400m_are_of_one_size_outside_of_ngram_tables():
    sizes = {}
    for name in recipes.names():
        model = recipes.get(name).model
        tables = 0
        if isinstance(model, BLTConfig):
            tables = model.ngram_tables * model.ngram_rows * model.local_dim
        if "400m" in name:
            sizes[name] = model.parameter_count() - tables
    assert len(sizes) == 6
    assert max(sizes.values()) <= 1.01 * min(sizes.values())


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
        (ByteVocab, "size", 256, "256 bytes, pad_id, bos_id and eos_id need at least 259"),
        (ByteVocab, "pad_id", 65, "vocab.pad_id=65: choose an id from"),
        (ByteVocab, "pad_id", 258, "must differ"),
        (AdamWConfig, "learning_rate", 0.0, "learning_rate=0.0: must be above 0"),
        (AdamWConfig, "final_fraction", 2.0, "must be between 0 and 1"),
        (AdamWConfig, "decay_steps", 5, "decay_steps=5: has no effect on schedule=cosine; leave"),
        (DataConfig, "sequence_length", 0, "sequence_length=0: must be at least 1"),
        (DataConfig, "paths", ("a", ""), r"paths=\('a', ''\): an empty path names no file"),
        (TrainConfig, "steps", 0, "steps=0: must be at least 1"),
        (TrainConfig, "accumulation_steps", 5, "must be a multiple of accumulation_steps=5"),
    ],
)
def test_values_that_cannot_work_are_refused(kind, field, value, says):
    with pytest.raises(ValueError, match=says) as caught:
        replace(kind(), **{field: value})
    assert "\n" not in str(caught.value)


NUMBERS = [
    *(kind() for kind in MODEL_CONFIGS),
    *(kind() for kind in OPTIMIZER_CONFIGS.values()),
    QLearningConfig(),
    PatchingContract(
        patcher="byte", threshold=0.0, entropy_model="", sampled_bytes=1, histogram=(1,)
    ),
]


@pytest.mark.parametrize("config", NUMBERS, ids=lambda config: type(config).__name__)
def test_no_number_is_infinite_or_past_float32(config):
    names = [name for name, value in to_dict(config).items() if isinstance(value, float)]
    assert names, "has no float field; give it one, such as init_std"
    for name in names:
        for bad in (float("nan"), float("inf"), float("-inf"), 1e39):
            with pytest.raises(ValueError, match=rf"^{name}=\S+: must be a finite value, at most"):
                replace(config, **{name: bad})


INTEGERS = [*(kind() for kind in MODEL_CONFIGS), *(kind() for kind in OPTIMIZER_CONFIGS.values())]
INTEGERS += [QLearningConfig(), DataConfig(), TrainConfig(), ByteVocab()]


@pytest.mark.parametrize("config", INTEGERS, ids=lambda config: type(config).__name__)
def test_integers_past_int32_and_seeds_past_32_bits_are_refused(config):
    for field in fields(config):
        value = getattr(config, field.name)
        several = isinstance(value, tuple) and "int" in str(field.type)
        if type(value) is not int and not several:
            continue
        is_seed = field.name.endswith("seed")
        most = "choose one from 0 to 4294967295" if is_seed else "must be at most 2147483647"
        for bad in (2**32, 2**63, 2**70, *([-1] if is_seed else [])):
            with pytest.raises(ValueError, match=rf"{field.name}={bad}: {most}$"):
                replace(config, **{field.name: (bad,) if several else bad})
        if is_seed:
            replace(config, **{field.name: 2**32 - 1})


@pytest.mark.parametrize("name", ["megabyte_tiny", "transformer_tiny"])
def test_the_first_steps_of_a_tiny_recipe_are_small_beside_its_weights(name):
    """Without a norm after the last layer, steps of a seventh overshot to 100 bits per byte."""
    recipe = recipes.get(name)
    assert isinstance(recipe.model, MegabyteConfig)
    assert recipe.optimizer.learning_rate <= 0.1 * recipe.model.init_std


def test_an_integer_past_every_float_is_refused():
    with pytest.raises(ValueError, match=r"^config.learning_rate: must be a finite value, at "):
        from_dict(OptimizerConfig, {"learning_rate": 10**400})


MOST = dict.fromkeys(OPTIMIZER_CONFIGS, 200.0) | {"sgd": 380.0}


@pytest.mark.parametrize(("name", "most"), MOST.items())
def test_a_decay_under_which_weights_grow_is_refused(name, most):
    kind = OPTIMIZER_CONFIGS[name]
    kind(learning_rate=0.01, weight_decay=0.99 * most)
    for bad in (1.01 * most, 1e30):
        with pytest.raises(ValueError, match=r"^weight_decay=.*: times learning_rate=0.01 it must"):
            kind(learning_rate=0.01, weight_decay=bad)


def test_older_files_call_the_patcher_word_space():
    for patcher in ("space", "word", "fixed"):
        config = BLTConfig(patcher=patcher)
        written = to_dict(config)
        assert model_from_dict(written) == config
        del written["patcher_version"]
        older = "word" if patcher == "space" else patcher
        assert model_from_dict(written) == BLTConfig(patcher=older)
    with pytest.raises(ValueError, match=r"model.patcher_version=3: choose 1 or 2, or install"):
        model_from_dict(written | {"patcher_version": 3})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"modle": {}}, "config.modle: unknown field of Recipe"),
        ({"x" * 5000: {}}, "^config.x{892}…$"),
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


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("adamw", "beta1", 0.8),
        ("sgd", "momentum", 0.3),
        ("q_learning_adamw", "beta2", 0.9),
        ("q_learning_adamw", "controller", QLearningConfig(interval=3)),
        ("q_learning_sgd", "entropy_threshold", 0.3),
    ],
)
def test_an_optimizer_takes_its_own_fields(name, field, value):
    config = OPTIMIZER_CONFIGS[name](**{field: value})
    written = json.loads(json.dumps(to_dict(config)))
    assert next(iter(written)) == "name" and len(written) == 1 + len(fields(config))
    assert from_dict(OptimizerConfig, written) == config


def test_muon_checks_the_rate_of_its_adamw():
    assert MuonConfig().adam_rate == MuonConfig().learning_rate
    for rate, says in ((0.0, "adam_learning_rate=0.0: must be above"), (21.0, "weight_decay=0.1:")):
        with pytest.raises(ValueError, match=f"^{says}"):
            MuonConfig(adam_learning_rate=rate)


def test_a_momentum_out_of_the_agent_s_reach_is_refused():
    with pytest.raises(ValueError, match=r"^momentum=0.3: must lie within .* min_momentum=0.5"):
        QLearningSGDConfig(momentum=0.3)
    with pytest.raises(ValueError, match=r"^beta1=0.999: must lie within .* max_momentum=0.995$"):
        QLearningAdamWConfig(beta1=0.999)


FLAT = {
    **{"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "momentum": 0.9, "entropy_threshold": 0.0},
    **{"noise_scale": 0.0, "centralize": True, "controller": to_dict(QLearningConfig())},
}
"""What older files hold beside the shared fields, whatever the optimizer."""


@pytest.mark.parametrize("kind", [AdamWConfig, SGDConfig, QLearningSGDConfig, QLearningAdamWConfig])
def test_the_older_form_with_the_fields_of_all_optimizers_is_read(kind):
    assert from_dict(OptimizerConfig, {**FLAT, **to_dict(kind(learning_rate=0.01))}) == kind(
        learning_rate=0.01
    )
    assert from_dict(OptimizerConfig, FLAT) == AdamWConfig()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "adamm"}, "config.name='adamm': choose one of adamw, sgd, q_learning_sgd"),
        ({"name": ["sgd"]}, r"config.name=\['sgd'\]: choose one of"),
        ({"momentun": 0.8}, "config.momentun: unknown field of AdamWConfig"),
        (
            {"momentum": 0.8},
            "config.momentum=0.8: has no effect on adamw; leave it out or choose optimizer.name "
            "sgd or q_learning_sgd$",
        ),
        ({"noise_scale": 0.1}, "choose optimizer.name q_learning_sgd$"),
        ({"centralize": False}, "centralize=False: has no effect on adamw"),
        ({"controller": {"interval": 3}}, "controller.interval=3: has no effect on adamw"),
        ({"controller": 3}, "controller=3: has no effect on adamw"),
        ({"name": "sgd", "beta1": 0.8}, "beta1=0.8: has no effect on sgd"),
    ],
)
def test_fields_of_another_optimizer_are_refused_by_name(change, says):
    with pytest.raises(ValueError, match=says) as caught:
        from_dict(OptimizerConfig, {**FLAT, **change})
    assert "\n" not in str(caught.value)
    # Of optimizers that came later there are no files in the older form.
    with pytest.raises(ValueError, match=r"config.momentum=0.9: has no effect on lion"):
        from_dict(OptimizerConfig, {"name": "lion", "momentum": 0.9})


def test_another_optimizer_takes_the_shared_fields_and_what_was_changed():
    steered = change_optimizer(AdamWConfig(learning_rate=3e-3, beta1=0.8), "q_learning_adamw")
    assert steered == QLearningAdamWConfig(learning_rate=3e-3, beta1=0.8)
    config = AdamWConfig(warmup_steps=7, weight_decay=0.0)
    assert change_optimizer(config, "sgd") == SGDConfig(warmup_steps=7, weight_decay=0.0)
    for name in OPTIMIZER_CONFIGS:
        assert change_optimizer(AdamWConfig(), name) == OPTIMIZER_CONFIGS[name]()
    assert change_optimizer(config, "adamw") is config
    lion = change_optimizer(AdamWConfig(learning_rate=3e-3), "lion")
    assert lion == LionConfig(learning_rate=3e-4, weight_decay=1.0)
    assert change_optimizer(lion, "adamw") == AdamWConfig(learning_rate=3e-3)
    with pytest.raises(ValueError, match=r"optimizer.beta2=0.9: has no effect on sgd"):
        change_optimizer(AdamWConfig(beta2=0.9), "sgd")
    with pytest.raises(ValueError, match=r"optimizer.name='lbfgs': choose one of adamw"):
        change_optimizer(config, "lbfgs")
    with pytest.raises(TypeError, match="use one of its subclasses"):
        OptimizerConfig()


def test_a_recipe_takes_the_rate_that_was_measured_for_it():
    measured = recipes.with_optimizer(recipes.get("blt_tiny"), "lion").optimizer
    assert measured == LionConfig(learning_rate=9e-4, weight_decay=0.333333333333, warmup_steps=40)  # fmt: skip  # noqa: E501
    usual = recipes.with_optimizer(recipes.get("blt_132m"), "lion").optimizer
    assert usual == change_optimizer(recipes.get("blt_132m").optimizer, "lion")
    known = {(n, r) for n, rates in recipes._RATES.items() for r in rates}
    assert known <= {(n, r) for n in OPTIMIZER_CONFIGS for r in recipes.names()}


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        MegabyteConfig().patch_size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_executed_work_is_that_of_a_full_patch_budget():
    model, length = recipes.get("blt_tiny").model, 256
    assert isinstance(model, BLTConfig)
    mean = length / model.bytes_per_patch
    assert model.budget(length) > 1.5 * mean
    more = model.executed_flops_per_byte(length) / model.flops_per_byte(length)
    assert 1.2 < more < 1.3
    full = replace(model, bytes_per_patch=length / model.budget(length))
    assert model.executed_flops_per_byte(length) == full.flops_per_byte(length)
    plain = recipes.get("megabyte_tiny").model
    assert plain.executed_flops_per_byte(length) == plain.flops_per_byte(length)
