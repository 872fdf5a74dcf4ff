"""Annotations are enforced in every test, those of a function inside another at each definition."""

from typing import Any, cast

import numpy as np
import pytest
from jaxtyping import Float, TypeCheckError, jaxtyped

from bytelm_jax.layers.norm import LayerNorm
from bytelm_jax.models import define_model
from parity_tests.shapes import checked
from parity_tests.twins import MEGABYTES


def adder(number):
    @jaxtyped(typechecker=checked)
    def add(x: Float[np.ndarray, "B D"], y: type(number) = number) -> Float[np.ndarray, "B D"]:
        return x + y if number else x[0]

    return add


def test_each_definition_is_checked_and_runs_its_own_body():
    x = np.zeros((2, 3))
    for number in (1, 2.0, 3, 4.0):
        add = adder(number)
        np.testing.assert_array_equal(add(x), x + number)
        for wrong in ((np.zeros(3),), (x.astype(int),), (x, "1")):
            with pytest.raises(TypeCheckError):
                add(*cast(Any, wrong))
    with pytest.raises(TypeCheckError):
        adder(0)(x)  # what comes back has one axis


def test_our_packages_are_checked():
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="seed"):
            define_model(MEGABYTES["paper"])[1](cast(Any, "0"))
        with pytest.raises(TypeCheckError, match="x"):
            LayerNorm(4)(cast(Any, np.zeros(4, int)))
