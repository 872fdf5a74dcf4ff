"""A model as `bytelm.harness` asks for it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from bytelm.harness import Place
from bytelm_jax.inference.compiled import CompiledModelKey, split_cached
from bytelm_jax.inference.generate import generate
from bytelm_jax.training.loss import token_nats


def harness_place(model: Any) -> Place:
    """Scores and continues texts with `model`, on one device."""
    structure, params = split_cached(model)
    score = _score(structure)

    def scored(
        ids: Int32[np.ndarray, "B T"],
    ) -> tuple[Float[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
        nats, best = jax.device_get(score(params, ids))
        return nats, best

    return Place(model.config, scored, functools.partial(generate, model))


@functools.lru_cache(maxsize=8)
def _score(structure: CompiledModelKey) -> Callable[..., tuple[Array, Array]]:
    @jax.jit
    def score(params: list[Array], ids: Array) -> tuple[Array, Array]:
        logits = structure.model(params)(ids)
        return token_nats(logits, ids), jnp.argmax(logits, axis=-1) == ids

    return score
