"""The command line's options that decide which other options there are."""

import pytest

from bytelm import recipes
from bytelm.config import SGDConfig
from bytelm_jax.cli.arguments import UsageError, expand_names, parse_recipe


def test_the_optimizer_decides_which_fields_there_are():
    recipe, bare = recipes.get("megabyte_tiny"), ["--momentum", ".8"]
    for option in ("--optimizer", "--optimizer.name", "--name"):
        assert expand_names(recipe, [*bare, option, "sgd"]) == ["--optimizer.momentum", ".8"]
        optimizer = parse_recipe(recipe, [*bare, f"{option}=sgd"], "train", "").optimizer
        assert optimizer == SGDConfig(learning_rate=3e-3, warmup_steps=40, momentum=0.8)
    for name in ("interval", "controller.interval", "optimizer.controller.interval"):
        says = f"--{name}: has no effect on sgd; choose --optimizer q_learning_sgd or"
        with pytest.raises(UsageError, match=says):
            expand_names(recipe, ["--optimizer", "sgd", f"--{name}=3"])
    with pytest.raises(UsageError, match="--momentum: has no effect on adamw; choose --optimizer"):
        parse_recipe(recipe, bare, "train", "")
    with pytest.raises(ValueError, match=r"optimizer.name='sdg': choose one of adamw, sgd"):
        expand_names(recipe, ["--optimizer", "sdg"])
