"""Mixture of adaptive-linear experts: all of them, weighted, or the best few for each position.

Sparse dispatch sorts (position, expert) pairs by expert and runs each expert separately. There is
no capacity limit, so no position is ever dropped. A run is cut into tiles of equal size, the last
one padded: matrix libraries choose their order of summation by the number of rows, so that with
products of whole runs the routing of later bytes or other rows would change the last digits of a
position.

Axes: B batch, T positions, N = B·T, M = N·k pairs, D width, A adaptation width, R rank, E experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm_torch.layers.adaptive import AdaptiveWeights, adaptive_linear
from bytelm_torch.layers.norm import LayerNorm

_TILE = 64


class Routing(NamedTuple):
    """How one layer spread each row over its experts."""

    balance: Float[Tensor, " B"]
    """E Σ_e load_e · mean gate_e (Fedus et al. 2021, arXiv 2101.03961, section 2.2): 1 if even."""
    load: Float[Tensor, "B E"]
    """Each expert's share of the row's pairs; sums to 1."""


class ExpertLinear(nn.Module):
    """E linear layers side by side: `kernels` [E, I, O] and `bias` [E, O], in both packages."""

    def __init__(
        self, experts: int, inputs: int, outputs: int, init_std: float, bias: float | None
    ):
        super().__init__()
        self.kernels = nn.Parameter(torch.empty(experts, inputs, outputs))
        nn.init.normal_(self.kernels, std=init_std)
        filled = None if bias is None else torch.full((experts, outputs), bias)
        self.bias = None if filled is None else nn.Parameter(filled)


class AdaptiveExperts(nn.Module):
    """E adaptive linear layers D → D, stacked; `rank=0` is the full form."""

    def __init__(self, experts: int, dim: int, adapt_dim: int, rank: int, init_std: float):
        super().__init__()
        self.rank = rank
        self.base = ExpertLinear(experts, dim, dim, init_std, 0.0)
        if rank:
            self.adapt = ExpertLinear(experts, adapt_dim, rank, init_std, 1.0)
            self.down = ExpertLinear(experts, dim, rank, init_std, None)
            self.up = ExpertLinear(experts, rank, dim, 0.0, None)
        else:
            self.adapt = ExpertLinear(experts, adapt_dim, dim * dim, 0.0, 0.0)

    def dense(
        self,
        x: Float[Tensor, "B T D"],
        a: Float[Tensor, "B S A"],
        gates: Float[Tensor, "B T E"],
    ) -> Float[Tensor, "B T D"]:
        """Σ_e gates_e · expert_e(x): every expert sees every position. S is T or 1."""
        total = x.new_zeros(x.shape, dtype=gates.dtype)
        for expert, gate in enumerate(gates.unbind(-1)):
            total = total + gate[..., None] * adaptive_linear(self._weights(expert), x, a)
        return total.to(x.dtype)

    def sparse(
        self,
        x: Float[Tensor, "N D"],
        a: Float[Tensor, "N A"],
        chosen: Int[Tensor, "N k"],
        gates: Float[Tensor, "N k"],
    ) -> Float[Tensor, "N D"]:
        """Σ_j gates_j · expert_{chosen_j}(x), each expert on its own positions only."""
        expert = chosen.flatten()
        order = torch.argsort(expert, stable=True)
        runs = order.split(torch.bincount(expert, minlength=self.base.kernels.shape[0]).tolist())
        outputs = [self._run(i, x, a, run // chosen.shape[1]) for i, run in enumerate(runs)]
        pairs = torch.cat(outputs)[torch.argsort(order)].reshape(*chosen.shape, x.shape[1])
        return (gates[..., None] * pairs).sum(dim=1).to(x.dtype)

    def _run(self, expert: int, x: Tensor, a: Tensor, rows: Tensor) -> Tensor:
        """The expert's output [m, D] for the given rows, tile by tile."""
        if not len(rows):
            return x[:0]
        weights, spare = self._weights(expert), -len(rows) % _TILE
        tiles = F.pad(rows, (0, spare)).split(_TILE)  # padded with row 0, and cut off again
        outputs = [adaptive_linear(weights, x[tile][None], a[tile][None])[0] for tile in tiles]
        return torch.cat(outputs)[: len(rows)]

    def _weights(self, expert: int) -> AdaptiveWeights:
        base, adapt = self.base, self.adapt
        assert base.bias is not None and adapt.bias is not None
        return AdaptiveWeights(
            base.kernels[expert],
            base.bias[expert],
            adapt.kernels[expert],
            adapt.bias[expert],
            self.down.kernels[expert] if self.rank else None,
            self.up.kernels[expert] if self.rank else None,
        )


class MixtureOfExperts(nn.Module):
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
    ):
        super().__init__()
        self.top_k = top_k
        self.norm = LayerNorm(dim) if norm else None
        self.gate = nn.Linear(adapt_dim, experts)
        nn.init.normal_(self.gate.weight, std=init_std)
        nn.init.zeros_(self.gate.bias)
        self.experts = AdaptiveExperts(experts, dim, adapt_dim, rank, init_std)

    def forward(
        self, x: Float[Tensor, "B T D"], a: Float[Tensor, "B S A"]
    ) -> tuple[Float[Tensor, "B T D"], Routing]:
        x = x if self.norm is None else self.norm(x)
        probabilities = self.probabilities(a, x.shape[1])
        if not self.top_k:
            return self.experts.dense(x, a, probabilities), _routing(probabilities, probabilities)
        chosen, gates, share = choose_experts(probabilities, self.top_k)
        a = a.expand(*x.shape[:2], -1)
        mixed = self.experts.sparse(*(values.flatten(0, 1) for values in (x, a, chosen, gates)))
        return mixed.reshape(x.shape), _routing(probabilities, share)

    def probabilities(self, a: Float[Tensor, "B S A"], length: int) -> Float[Tensor, "B T E"]:
        """The gates at `length` positions."""
        wide = torch.promote_types(a.dtype, torch.float32)
        logits = F.linear(a.to(wide), self.gate.weight.to(wide), self.gate.bias.to(wide))
        return logits.softmax(dim=-1).expand(-1, length, -1)


def choose_experts(
    probabilities: Float[Tensor, "B T E"], top_k: int
) -> tuple[Int[Tensor, "B T k"], Float[Tensor, "B T k"], Float[Tensor, "B T E"]]:
    """(experts by decreasing gate, their normalised gates, each expert's share of the pairs)."""
    # A stable sort, because topk leaves the order of equal gates undefined.
    order = torch.argsort(probabilities, dim=-1, descending=True, stable=True)
    chosen = order[..., :top_k]
    hot = F.one_hot(chosen, probabilities.shape[-1]).to(probabilities.dtype)
    gates = probabilities.gather(-1, chosen)
    return chosen, gates / gates.sum(dim=-1, keepdim=True), hot.mean(dim=2)


def _routing(probabilities: Tensor, share: Tensor) -> Routing:
    length = max(probabilities.shape[1], 1)
    load = share.detach().sum(dim=1) / length
    gate = probabilities.sum(dim=1) / length
    return Routing(probabilities.shape[-1] * (load * gate).sum(dim=-1), load)
