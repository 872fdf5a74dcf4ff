"""What a parameter's name means: the one table of kinds of leaves.

A name is dotted: the modules from the outside in, then the kind of leaf. The JAX package names its
parameters this way; in the PyTorch twin each parameter holds the same name in `bytelm_path`.
"""

from collections.abc import Collection
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


ADAPTERS = ("lora_A", "lora_B")
"""The two products of a layer's low-rank adapter, whose leaves are kernels; as in peft."""


def is_adapter(name: str) -> bool:
    """Whether the parameter called `name` belongs to a low-rank adapter."""
    return name.rpartition(".")[0].rpartition(".")[2] in ADAPTERS


def linear_problem(module: str, names: Collection[str]) -> str | None:
    """Why `module` is no plain linear layer, whose result is x W + b; None if it is one.

    `names` are those of all of the model's parameters. Adaptive layers and gates compute with the
    kernels of their parts, and logits are not rounded.
    """
    parent, _, last = module.rpartition(".")
    if f"{module}.kernel" not in names:
        kinds = {"kernels": "holds experts", "embedding": "is an embedding", "scale": "is a norm"}
        found = (what for kind, what in kinds.items() if f"{module}.{kind}" in names)
        return next(found, "is no linear layer")
    if is_output_head(f"{module}.kernel"):
        return "is the output layer"
    if any(f"{parent}.adapt.{kind}" in names for kind in ("kernel", "kernels")):
        return "is part of an adaptive linear layer"
    if last == "gate" and any(name.startswith(f"{parent}.experts.") for name in names):
        return "is the gate of experts"
    return None


def is_norm(name: str) -> bool:
    """Whether the parameter called `name` belongs to a normalisation layer."""
    return name.split(".")[-2].endswith("norm")


def is_ngram_table(name: str) -> bool:
    """Whether the parameter called `name` is a table of n-grams, of which a step reads few rows."""
    return name.endswith("ngrams.embedding")


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
