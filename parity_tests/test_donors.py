"""Token models of the Llama family as BLT's global transformer, against transformers' layers."""

import functools

import jax
import pytest
import torch

from bytelm.tolerances import GRADIENTS, LOGITS
from bytelm_jax.interop import llama
from bytelm_jax.models import abstract_params
from parity_tests.donors import FAMILIES, compare_layers, make_donor, make_exact, save_donor

pytest.importorskip(
    "transformers", minversion="5.23", reason="the reference, transformers 5.23, is not installed"
)
traced = functools.cache(abstract_params)


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Shapes are the same every time, and tracing a model takes seconds."""
    monkeypatch.setattr(llama, "abstract_params", traced)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_those_of_transformers(family, dtype, tmp_path):
    """In float64 with exact norms and rotations; in float32 as transformers has them."""
    with jax.enable_x64(dtype == "float64"):
        model = make_donor(family, dtype=getattr(torch, dtype))
        save_donor(model, tmp_path)
        reference = make_exact(model) if dtype == "float64" else model
        for what, error in compare_layers(reference, tmp_path, dtype):
            bound = GRADIENTS if "gradient" in what else LOGITS
            assert error <= bound[dtype], what
