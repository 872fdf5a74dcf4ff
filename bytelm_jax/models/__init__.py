"""`build_model(config)` and the split of a model into a pure function and its parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from bytelm_jax.config import MegabyteConfig, ModelConfig
from bytelm_jax.models.megabyte import Megabyte

Params = dict[str, Array]
"""Parameters outside the model: dotted name → array, such as `to_logits.kernel`."""


def build_model(config: ModelConfig, rngs: nnx.Rngs | None = None) -> Megabyte:
    """The model that `config` describes, float32, initialised from `rngs` (default seed 0)."""
    rngs = nnx.Rngs(0) if rngs is None else rngs
    match config:
        case MegabyteConfig():
            return Megabyte(config, rngs=rngs)
        case _:
            raise ValueError(f"config={type(config).__name__}: not a model configuration of bytelm")


def split_model(model: nnx.Module) -> tuple[Callable[[Params], Any], Params]:
    """`(bind, params)`: `bind(params)` is the model with those parameters, inside or outside jit.

    `params` is a flat dictionary, a plain pytree for `jax.jit`, `jax.grad`, optax and Orbax.
    """
    graphdef, state = nnx.split(model, nnx.Param)

    def bind(params: Params) -> Any:
        leaves = {_path(name): nnx.Param(value) for name, value in params.items()}
        return nnx.merge(graphdef, nnx.State.from_flat_path(leaves))

    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    return bind, flat


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of the parameters without allocating any."""
    return jax.eval_shape(lambda: split_model(build_model(config))[1])


def cast_params(params: Params, dtype: jnp.dtype | type) -> Params:
    """The parameters in the compute dtype; norms stay as they are, being computed in float32."""
    return {name: value if is_norm(name) else value.astype(dtype) for name, value in params.items()}


def is_norm(name: str) -> bool:
    """Whether the parameter called `name` belongs to a normalisation layer."""
    return name.split(".")[-2].endswith("norm")


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
