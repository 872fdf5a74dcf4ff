"""Linear layers with a low-rank adapter (LoRA, Hu et al. 2021; `bytelm/lora.py`).

R is the rank of an adapter.
"""

import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from bytelm.lora import LoRA, adapter_leaves
from bytelm_jax.layers.dropout import dropout, fold_rows

_SITE = 1 << 16
"""Beyond the numbers of all other dropout sites of a model."""

_keys: ContextVar[Key[Array, " B"] | None] = ContextVar("_keys", default=None)


class LoRALinear(nnx.Linear):
    """A linear layer and its adapter: x W + b + scale · dropout(x) A B.

    Rows of the batch lead the axes of the input, which has B · n of them.
    """

    def __init__(self, base: nnx.Linear, lora: LoRA, site: int, *, rngs: nnx.Rngs):
        inputs, outputs = base.in_features, base.out_features
        super().__init__(inputs, outputs, use_bias=base.use_bias, rngs=rngs)
        self.lora_A = nnx.Linear(inputs, lora.rank, use_bias=False, rngs=rngs)
        self.lora_B = nnx.Linear(lora.rank, outputs, use_bias=False, rngs=rngs)
        self.scale, self.rate, self.site = lora.scale, lora.dropout, site

    def __call__(
        self, inputs: Float[Array, "*batch D"], out_sharding: None = None
    ) -> Float[Array, "*batch _"]:
        seen = _dropped(inputs, self.rate, fold_rows(_keys.get(), self.site))
        return super().__call__(inputs) + self.scale * self.lora_B(self.lora_A(seen))


def _dropped(x: Array, rate: float, keys: Array | None) -> Array:
    if keys is None:
        return x
    by_row = x.reshape(keys.shape[0], -1, x.shape[-1])  # however many axes a row has: the same bits
    return dropout(by_row, rate, keys).reshape(x.shape)


class WithDropout:
    """A model whose adapters drop inputs in `outputs`, by the keys of the rows."""

    def __init__(self, model: Any):
        self._model = model

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """As the model: without dropout."""
        return self._model(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def outputs(self, ids: Any, dropout_keys: Any = None, remat: bool = False) -> Any:
        """As the model, whose layers would each have to pass on the keys of theirs otherwise."""
        with _dropping(fold_rows(dropout_keys, _SITE)):
            return self._model.outputs(ids, dropout_keys, remat)


@contextmanager
def _dropping(keys: Array | None) -> Iterator[None]:
    token = _keys.set(keys)
    try:
        yield
    finally:
        _keys.reset(token)


def add_adapters(model: nnx.Module, lora: LoRA, rngs: nnx.Rngs) -> None:
    """Replaces the layers that `lora` names; the parameters of the result are still to be set."""
    for site, name in enumerate(lora.layers):
        *path, last = name.split(".")
        parent: Any = model
        for part in path:
            parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
        setattr(parent, last, LoRALinear(getattr(parent, last), lora, site, rngs=rngs))


def init_adapters(lora: LoRA, shapes: Mapping[str, tuple[int, ...]], seed: Any) -> dict[str, Array]:
    """A uniform in ±in^-0.5 (Kaiming's with a = √5, as peft's) and B zero, in float32.

    `shapes` are those of the layers' kernels, by name.
    """
    root = jax.random.fold_in(jax.random.key(seed), _SITE)
    result, groups = dict[str, Array](), defaultdict[int, list[str]](list)
    for layer in lora.layers:
        inputs, outputs = shapes[f"{layer}.kernel"]
        first, second = adapter_leaves(layer)
        result[second] = jnp.zeros((lora.rank, outputs), jnp.float32)
        groups[inputs].append(first)
    for inputs, names in groups.items():  # equal shapes together: few programs to compile
        numbers = jnp.asarray([zlib.crc32(name.encode()) for name in names], jnp.uint32)
        keys = jax.vmap(lambda number: jax.random.fold_in(root, number))(numbers)
        bound, shape = inputs**-0.5, (inputs, lora.rank)
        draw = lambda key: jax.random.uniform(key, shape, jnp.float32, -bound, bound)  # noqa: E731, B023
        result |= dict(zip(names, jax.vmap(draw)(keys), strict=True))
    return result


def merge(params: Mapping[str, Array], lora: LoRA) -> dict[str, Array]:
    """The parameters of the plain model that computes the same: W + scale · A B, no adapters."""
    merged = {name: value for name, value in params.items() if name not in set(lora.leaves)}
    for layer in lora.layers:
        first, second = (params[name] for name in adapter_leaves(layer))
        product = jnp.matmul(first, second, precision="highest")
        kernel = merged[f"{layer}.kernel"]
        merged[f"{layer}.kernel"] = kernel + (lora.scale * product).astype(kernel.dtype)
    return merged
