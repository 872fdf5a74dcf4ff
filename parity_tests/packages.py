"""Both packages as those who serve their models see them, and a tiny MEGABYTE of each."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bytelm.config import MegabyteConfig
from bytelm_jax.inference import generate as jax_generation
from bytelm_jax.inference import slots as jax_slots
from bytelm_jax.models import abstract_params, define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_torch.inference import generate as torch_generation
from bytelm_torch.inference import slots as torch_slots


class Package(NamedTuple):
    """One of the two."""

    engine: Callable[[Any, int, int], Any]
    module: Any
    generation: Any


PACKAGES = {
    "jax": Package(jax_slots.JaxSlots, jax_slots, jax_generation),
    "torch": Package(torch_slots.TorchSlots, torch_slots, torch_generation),
}
MODEL = MegabyteConfig(
    patch_size=4, global_dim=8, local_dim=16, global_heads=2, local_heads=2, global_layers=1,
    local_layers=1, max_length=128,
)  # fmt: skip


@functools.cache
def model_of(package, config):
    """The model of a package; the same parameters in both."""
    source = np.random.default_rng(0)
    params = {
        name: jnp.asarray(source.normal(0, 0.3, leaf.shape), leaf.dtype)
        for name, leaf in abstract_params(config).items()
    }
    return define_model(config)[0](params) if package == "jax" else make_twin(config, params)
