"""What a parameter's name means: the one table of kinds of leaves.

A name is dotted: the modules from the outside in, then the kind of leaf. The JAX package names its
parameters this way; in the PyTorch twin each parameter holds the same name in `bytelm_path`.
"""

from typing import NamedTuple

from bytelm.config.base import require


class LeafKind(NamedTuple):
    """A kind of leaf."""

    torch_name: str
    """The last part of its name in a PyTorch state dict."""
    transposed: bool = False
    """Whether its last two axes, (in, out) in JAX, are swapped in PyTorch."""
    decays: bool = False
    """Whether weight decay applies to it."""
    product: bool = False
    """Whether its last two axes form a matrix that activations are multiplied by."""


LEAVES = {
    "kernel": LeafKind("weight", transposed=True, decays=True, product=True),
    "embedding": LeafKind("weight", decays=True),
    "scale": LeafKind("weight"),
    "bias": LeafKind("bias"),
    "kernels": LeafKind("kernels", decays=True, product=True),
    "taps": LeafKind("taps", decays=True),
    "gain": LeafKind("gain"),
    "coefficients": LeafKind("coefficients", decays=True),
    "gamma": LeafKind("gamma"),
    "beta": LeafKind("beta"),
}
"""Kind of leaf → its properties; `kernels` are those of experts, [E, in, out] in both packages."""


def leaf_kind(name: str) -> LeafKind:
    """The kind of the parameter called `name`; raises `ValueError` for an unknown one."""
    kind = name.rpartition(".")[2]
    require(kind in LEAVES, f"{name}: a leaf must be one of {', '.join(LEAVES)}")
    return LEAVES[kind]


def torch_name(name: str) -> str:
    """The name in a PyTorch state dict of the parameter called `name`: another last part."""
    module, dot, _ = name.rpartition(".")
    return module + dot + leaf_kind(name).torch_name


def is_norm(name: str) -> bool:
    """Whether the parameter called `name` belongs to a normalisation layer."""
    return name.split(".")[-2].endswith("norm")


def decays(name: str) -> bool:
    """Whether weight decay applies to the parameter called `name`: not to norms and biases.

    It does not apply to the gains of splines, which start at 1, or the γ and β of guided attention.
    """
    return leaf_kind(name).decays


def is_output_head(name: str) -> bool:
    """Whether the parameter called `name` belongs to the output layer, whose columns are ids."""
    return name.split(".")[-2] == "to_logits"


def is_hidden_matrix(name: str) -> bool:
    """Whether the parameter called `name` is a matrix, or a stack of them, in a hidden layer.

    That is every kernel except the output head's.
    """
    return leaf_kind(name).product and not is_output_head(name)
