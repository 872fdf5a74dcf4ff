"""Muon on kernels: optax's orthogonalised momentum, scaled to the length of AdamW's updates.

Jordan et al. 2024; the scale is that of Liu et al. 2025. `bytelm_torch/optimizers/muon.py` has the
same formulas.
"""

import math

import jax
import optax
from optax.contrib import MuonDimensionNumbers


def scale_by_muon(
    beta: float, ns_steps: int, consistent_rms: float, epsilon: float
) -> optax.GradientTransformation:
    """Bias-corrected Nesterov momentum, orthogonalised over the last two axes of each leaf.

    A leaf with more axes is a stack of matrices. The result is scaled by `consistent_rms` ·
    √max(in, out), so that its root mean square is about that of AdamW's updates, and AdamW's
    learning rate and weight decay fit.
    """

    def last_axes(updates: optax.Updates) -> optax.Updates:
        return jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), updates)

    def match_rms(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        return jax.tree.map(lambda u: consistent_rms * math.sqrt(max(u.shape[-2:])) * u, updates)

    orthogonal = optax.contrib.scale_by_muon(
        ns_steps=ns_steps, beta=beta, eps=epsilon, weight_dimension_numbers=last_axes
    )
    return optax.chain(orthogonal, optax.stateless(match_rms))
