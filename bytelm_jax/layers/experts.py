"""Mixture of adaptive-linear experts: all of them, weighted, or the best few for each position.

Sparse dispatch sorts (position, expert) pairs by expert and multiplies each run by its expert's
matrix (`grouped_matmul`). There is no capacity limit, so no position is ever dropped, and neither
later bytes nor other rows affect a position through the routing.

Axes: B batch, T positions, N = B·T, M = N·k pairs, D width, A adaptation width, R rank, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bytelm_jax.kernels.adaptation import adapted_product
from bytelm_jax.kernels.grouped_matmul import (
    grouped_bias,
    grouped_matmul,
    make_groups,
    mix,
    spread,
)
from bytelm_jax.kernels.low_precision import linears_at_once
from bytelm_jax.kernels.rows import on_each_device
from bytelm_jax.layers.adaptive import AdaptiveWeights, adaptive_linear, full_adaptation
from bytelm_jax.layers.initializers import normal
from bytelm_jax.layers.norm import LayerNorm


class Routing(NamedTuple):
    """How one layer spread each row over its experts."""

    balance: Float[Array, " B"]
    """E Σ_e load_e · mean gate_e (Fedus et al. 2021, arXiv 2101.03961, section 2.2): 1 if even."""
    load: Float[Array, "B E"]
    """Each expert's share of the row's pairs; sums to 1."""


class ExpertLinear(nnx.Module):
    """E linear layers side by side: `kernels` [E, I, O] and `bias` [E, O], in both packages."""

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        kernel_init: jax.nn.initializers.Initializer,
        bias: float | None,
        *,
        rngs: nnx.Rngs,
    ):
        self.kernels = nnx.Param(
            kernel_init(rngs.params(), (experts, inputs, outputs), jnp.float32)
        )
        filled = None if bias is None else jnp.full((experts, outputs), bias, jnp.float32)
        self.bias = None if filled is None else nnx.Param(filled)


class AdaptiveExperts(nnx.Module):
    """E adaptive linear layers D → D, stacked; `rank=0` is the full form."""

    def __init__(
        self,
        experts: int,
        dim: int,
        adapt_dim: int,
        rank: int,
        init_std: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.rank = rank
        noise, zeros = normal(init_std), nnx.initializers.zeros
        self.base = ExpertLinear(experts, dim, dim, noise, 0.0, rngs=rngs)
        if rank:
            self.adapt = ExpertLinear(experts, adapt_dim, rank, noise, 1.0, rngs=rngs)
            self.down = ExpertLinear(experts, dim, rank, noise, None, rngs=rngs)
            self.up = ExpertLinear(experts, rank, dim, zeros, None, rngs=rngs)
        else:
            self.adapt = ExpertLinear(experts, adapt_dim, dim * dim, zeros, 0.0, rngs=rngs)

    def dense(
        self,
        x: Float[Array, "B T D"],
        a: Float[Array, "B S A"],
        gates: Float[Array, "B T E"],
    ) -> Float[Array, "B T D"]:
        """Σ_e gates_e · expert_e(x): every expert sees every position. S is T or 1."""
        outputs = jax.vmap(adaptive_linear, in_axes=(0, None, None))(self._weights(), x, a)
        weighted = jnp.moveaxis(gates, -1, 0)[..., None] * outputs
        return weighted.sum(axis=0).astype(x.dtype)

    def sparse(
        self,
        x: Float[Array, "N D"],
        a: Float[Array, "N A"],
        chosen: Int[Array, "N k"],
        gates: Float[Array, "N k"],
    ) -> Float[Array, "N D"]:
        """Σ_j gates_j · expert_{chosen_j}(x), each expert on its own positions only.

        Positions are sorted on the device that they stand on: nothing is transferred, and a
        device's work does not grow with the number of devices.
        """
        return on_each_device(_dispatch, self._weights(), x, a, chosen, gates)

    def _weights(self) -> AdaptiveWeights:
        base, adapt = self.base, self.adapt
        assert base.bias is not None and adapt.bias is not None
        return AdaptiveWeights(
            base.kernels[...],
            base.bias[...],
            adapt.kernels[...],
            adapt.bias[...],
            self.down.kernels[...] if self.rank else None,
            self.up.kernels[...] if self.rank else None,
        )


def _dispatch(
    weights: AdaptiveWeights, x: Array, a: Array, chosen: Array, gates: Array
) -> Float[Array, "N D"]:
    """The result of `AdaptiveExperts.sparse` for the positions of one device."""
    groups = make_groups(chosen.reshape(-1), weights.base.shape[0])

    def product(values: Array, kernels: Array) -> Array:
        return grouped_matmul(values, kernels, groups)

    inputs, contexts = (spread(values, chosen.shape[1], groups) for values in (x, a))
    if weights.down is not None and weights.up is not None:
        scale = product(contexts, weights.adapt) + grouped_bias(weights.adapt_bias, groups)
        kernels = (weights.base, weights.down, weights.up)
        outputs = adapted_product(inputs, scale, *kernels, product)
    else:
        outputs = full_adaptation(weights, inputs, contexts, product)
    return mix(outputs, weights.bias, gates, chosen, groups)


class MixtureOfExperts(nnx.Module):
    """Norm → experts, mixed by gate = softmax(Linear(a)) in at least float32.

    `top_k=0`: all experts, weighted by the gate. Otherwise the `top_k` experts with the largest
    gates (ties by number), weighted by these gates divided by their sum.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        top_k: int,
        adapt_dim: int,
        rank: int,
        norm: bool,
        init_std: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.top_k = top_k
        self.norm = LayerNorm(dim) if norm else None
        self.gate = nnx.Linear(adapt_dim, experts, kernel_init=normal(init_std), rngs=rngs)
        self.experts = AdaptiveExperts(experts, dim, adapt_dim, rank, init_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        a: Float[Array, "B S A"],
        logits: Float[Array, "B S E"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """`logits` are those of the gate, where they are known already."""
        x = x if self.norm is None else self.norm(x)
        probabilities = self.probabilities(a, x.shape[1], logits)
        if not self.top_k:
            return self.experts.dense(x, a, probabilities), _routing(probabilities, probabilities)
        chosen, gates, share = choose_experts(probabilities, self.top_k)
        a = jnp.broadcast_to(a, (*x.shape[:2], a.shape[-1]))
        mixed = self.experts.sparse(*(_positions(values) for values in (x, a, chosen, gates)))
        return mixed.reshape(x.shape), _routing(probabilities, share)

    def probabilities(
        self,
        a: Float[Array, "B S A"],
        length: int,
        logits: Float[Array, "B S E"] | None = None,
    ) -> Float[Array, "B T E"]:
        """The gates at `length` positions; `logits` as in `__call__`."""
        if logits is None:
            (logits,) = linears_at_once(a, self.gate)
        gate = jax.nn.softmax(logits, axis=-1)
        return jnp.broadcast_to(gate, (a.shape[0], length, gate.shape[-1]))


def _positions(values: Array) -> Array:
    """[B, T, F] → [N, F]; reshaping with −1 would be ambiguous for T = 0."""
    return values.reshape(values.shape[0] * values.shape[1], values.shape[2])


def choose_experts(
    probabilities: Float[Array, "B T E"], top_k: int
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], Float[Array, "B T E"]]:
    """(experts by decreasing gate, their normalised gates, each expert's share of the pairs).

    Of equal gates the expert with the smaller number comes first.
    """
    # Few of few: sorting all of them, as `jax.lax.top_k` does on a GPU, would take longer.
    left, found = jax.lax.stop_gradient(probabilities), []
    for _ in range(top_k):
        found.append(jnp.argmax(left, axis=-1))
        taken = jnp.arange(left.shape[-1])[None, None, :] == found[-1][..., None]
        left = jnp.where(taken, -jnp.inf, left)
    chosen = jnp.stack(found, axis=-1)
    hot = jax.nn.one_hot(chosen, probabilities.shape[-1], dtype=probabilities.dtype)
    gates = jnp.sum(hot * probabilities[:, :, None], axis=-1)
    return chosen, gates / gates.sum(axis=-1, keepdims=True), hot.mean(axis=2)


def _routing(probabilities: Array, share: Array) -> Routing:
    length = max(probabilities.shape[1], 1)
    load = jax.lax.stop_gradient(share).sum(axis=1) / length
    gate = probabilities.sum(axis=1) / length
    return Routing(probabilities.shape[-1] * (load * gate).sum(axis=-1), load)
