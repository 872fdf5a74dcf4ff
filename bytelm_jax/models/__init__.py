"""`build_model(config)` and the split of a model into a pure function and its parameters."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from bytelm.config import (
    BLTConfig,
    EntropyConfig,
    LFByteConfig,
    MegabyteConfig,
    ModelConfig,
    Recipe,
    require_number,
)
from bytelm.leaves import is_ngram_table, is_norm
from bytelm.lora import LoRA, lora_of
from bytelm_jax.layers.initializers import deferring, draw_all
from bytelm_jax.layers.lora import WithDropout, add_adapters, init_adapters
from bytelm_jax.models.blt import BLT
from bytelm_jax.models.entropy import EntropyModel
from bytelm_jax.models.lfbyte import LFByteTransformer
from bytelm_jax.models.megabyte import Megabyte

Params = dict[str, Array]
"""Parameters outside the model: dotted name → array, such as `to_logits.kernel`."""


Model = Megabyte | LFByteTransformer | EntropyModel | BLT


def build_model(config: ModelConfig, rngs: nnx.Rngs | None = None) -> Model:
    """The model that `config` describes, float32, initialised from `rngs` (default seed 0).

    >>> import jax.numpy as jnp
    >>> model = build_model(EntropyConfig(dim=8, layers=1, heads=1, hidden_dim=8))
    >>> model(jnp.array([list(b"any bytes")])).shape
    (1, 9, 260)
    """
    rngs = nnx.Rngs(0) if rngs is None else rngs
    match config:
        case MegabyteConfig():
            return Megabyte(config, rngs=rngs)
        case LFByteConfig():
            return LFByteTransformer(config, rngs=rngs)
        case EntropyConfig():
            return EntropyModel(config, rngs=rngs)
        case BLTConfig():
            return BLT(config, rngs=rngs)
        case _:
            raise ValueError(f"config={type(config).__name__}: not a model configuration of bytelm")


def split_model(model: nnx.Module) -> tuple[Callable[[Params], Any], Params]:
    """`(bind, params)`: `bind(params)` is the model with those parameters, inside or outside jit.

    `params` is a flat dictionary, a plain pytree for `jax.jit`, `jax.grad`, optax and Orbax.
    """
    graphdef, state = nnx.split(model, nnx.Param)
    return _binder(graphdef), _flat(state)


class _Keys(nnx.Rngs):
    """Yields consecutive numbers instead of keys, for draws that are made later.

    Under a trace, `nnx.Rngs` walks everything traced so far for each key that it gives: a minute
    for the 1B model's shapes.
    """

    def __init__(self, keys: Iterator[Any]):
        object.__setattr__(self, "params", lambda: next(keys))


def define_model(
    config: ModelConfig, lora: LoRA | None = None
) -> tuple[Callable[[Params], Any], Callable[[int], Params]]:
    """`(bind, init)` without allocating anything: `init(seed)` creates the parameters.

    With `lora` the model has these adapters, whose parameters stand beside the others.
    """
    same = itertools.repeat(jax.random.key(0))

    def build() -> Model:
        model = build_model(config, _Keys(same))
        if lora is not None:
            add_adapters(model, lora, _Keys(same))
        return model

    graphdef, _ = nnx.split(nnx.eval_shape(build), nnx.Param)

    def init(seed: int) -> Params:
        require_number("seed", seed)
        with deferring():
            model = build_model(config, _Keys(itertools.count()))
        params = draw_all(_flat(nnx.state(model, nnx.Param)), seed)
        if lora is None:
            return params
        return params | init_adapters(lora, {k: v.shape for k, v in params.items()}, seed)

    bind = _binder(graphdef)
    return (lambda params: WithDropout(bind(params))) if lora and lora.dropout else bind, init


def abstract_params(
    config: ModelConfig, lora: LoRA | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Names, shapes and dtypes of the parameters without allocating any."""
    return jax.eval_shape(lambda: define_model(config, lora)[1](0))


def adapters_of(recipe: Recipe) -> LoRA | None:
    """The adapters that `recipe` trains, if any; raises `ValueError` as `lora_of` does."""
    return lora_of(recipe, abstract_params(recipe.model)) if recipe.train.lora_rank else None


def cast_params(params: Params, dtype: jnp.dtype | type, tables: bool = True) -> Params:
    """The parameters in the compute dtype; norms keep theirs because they compute in float32.

    Without `tables`, tables of n-grams keep theirs, too: a model casts what it reads of them.
    """

    def keeps(name: str) -> bool:
        return is_norm(name) or (is_ngram_table(name) and not tables)

    return {name: value if keeps(name) else value.astype(dtype) for name, value in params.items()}


def _flat(state: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _binder(graphdef: nnx.GraphDef) -> Callable[[Params], Any]:
    def bind(params: Params) -> Any:
        leaves: dict[Any, Any] = {_path(name): nnx.Param(value) for name, value in params.items()}
        return nnx.merge(graphdef, nnx.from_flat_state(leaves))

    return bind


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))
