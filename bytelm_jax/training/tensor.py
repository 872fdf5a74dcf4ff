"""Which axis of each parameter is cut between the devices that share the layers of one copy.

Megatron's cut (Shoeybi et al. 2019, arXiv 1909.08053): of two linear layers in a row the first is
cut by its outputs and the second by its inputs, so that what lies between them, heads of attention
or hidden features, is computed in parts and a half-layer needs one sum over the devices.
"""

from typing import NamedTuple


class Cut(NamedTuple):
    """A row of the table."""

    module: str
    """The last part of the module's name; "" stands for any other."""
    leaf: str
    """The kind of leaf."""
    axis: int | None
    """The axis that is cut; None: the array is whole on every device."""


_OUTPUTS, _INPUTS, _ROWS = 1, 0, 0

CUTS = (
    # Attention of all families, and cross-attention: by heads.
    Cut("to_q", "kernel", _OUTPUTS),
    Cut("to_k", "kernel", _OUTPUTS),
    Cut("to_v", "kernel", _OUTPUTS),
    Cut("to_out", "kernel", _INPUTS),
    Cut("to_q", "bias", 0),
    Cut("to_k", "bias", 0),
    Cut("to_v", "bias", 0),
    Cut("to_out", "bias", None),
    # γ and β of guided attention (Bytropix), one for each head.
    Cut("attention", "gamma", 0),
    Cut("attention", "beta", 0),
    # The one key and value head of MEGABYTE is computed by every device for its own query heads.
    Cut("to_kv", "kernel", None),
    # Feed-forward layers of all families: by hidden features.
    Cut("up", "kernel", _OUTPUTS),
    Cut("up", "bias", 0),
    Cut("gate", "kernel", _OUTPUTS),
    Cut("spline", "coefficients", 0),
    Cut("spline", "gain", 0),
    Cut("down", "kernel", _INPUTS),
    Cut("down", "bias", None),
    # Tables: by rows. One whose rows do not divide is whole, and so are learned positions, which
    # are read in order.
    Cut("ngrams", "embedding", _ROWS),
    Cut("embed", "embedding", _ROWS),
    Cut("global_embed", "embedding", _ROWS),
    Cut("local_embed", "embedding", _ROWS),
    Cut("global_position", "embedding", None),
    # Between the stacks, and the output layer, whose ids are few.
    Cut("global_to_local", "kernel", None),
    Cut("global_to_local", "bias", None),
    Cut("embed_to_local", "kernel", None),
    Cut("embed_to_local", "bias", None),
    Cut("to_global", "kernel", None),
    Cut("to_queries", "kernel", None),
    Cut("to_memory", "kernel", None),
    Cut("to_logits", "kernel", None),
    Cut("to_logits", "bias", None),
    # Norms see whole rows.
    Cut("", "scale", None),
    Cut("", "bias", None),
)
"""MEGABYTE, the plain transformer, BLT, Bytropix and the entropy model have these leaves alone."""

_BY_NAME = {(cut.module, cut.leaf): cut.axis for cut in CUTS}

WHOLE = "patcher."
"""The frozen entropy model of BLT: its entropies decide on patches, which no rounding may move."""


def tensor_axis(name: str, shape: tuple[int, ...], parts: int) -> int | None:
    """The axis along which the parameter `name` is cut into `parts`; None if it is whole.

    Raises `KeyError` for a leaf that the table does not know, which would otherwise be computed in
    a way that nobody has looked at.
    """
    if name.startswith(WHOLE):
        return None
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    known = (last, leaf) in _BY_NAME
    norm = last.endswith("norm") and ("", leaf) in _BY_NAME
    if not known and not norm:
        raise KeyError(f"{name}: the table of cuts does not know it")
    axis = _BY_NAME[last if known else "", leaf]
    return axis if axis is not None and shape[axis] % parts == 0 else None
