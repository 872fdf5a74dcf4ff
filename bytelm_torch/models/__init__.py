"""`build_model(config)`: one explicit match, no registry."""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bytelm.config import BLTConfig, EntropyConfig, LFByteConfig, MegabyteConfig, ModelConfig
from bytelm.lora import LoRA
from bytelm_torch.layers.lora import add_adapters
from bytelm_torch.models.blt import BLT
from bytelm_torch.models.entropy import EntropyModel
from bytelm_torch.models.lfbyte import LFByteTransformer
from bytelm_torch.models.megabyte import Megabyte

Model = Megabyte | LFByteTransformer | EntropyModel | BLT


def build_model(config: ModelConfig) -> Model:
    """The model that `config` describes, float32, initialised from torch's generator.

    Its parameters carry their names in the JAX twin, as `name_parameters` puts them there.

    >>> model = build_model(EntropyConfig(dim=8, layers=1, heads=1, hidden_dim=8))
    >>> model(torch.tensor([list(b"any bytes")])).shape
    torch.Size([1, 9, 260])
    """
    match config:
        case MegabyteConfig():
            model = Megabyte(config)
        case LFByteConfig():
            model = LFByteTransformer(config)
        case EntropyConfig():
            model = EntropyModel(config)
        case BLTConfig():
            model = BLT(config)
        case _:
            raise ValueError(f"config={type(config).__name__}: not a model configuration of bytelm")
    name_parameters(model)
    return model


class _SkipDraws(TorchFunctionMode):
    """Omits the random draws of initialisation.

    On the device "meta" they draw nothing, but the first of them imports torch's compiler, which
    takes five seconds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_abstract(config: ModelConfig) -> Model:
    """The model that `config` describes without values: parameters on the device "meta"."""
    with torch.device("meta"), _SkipDraws():
        return build_model(config)


def adapt(model: Any, lora: LoRA) -> None:
    """Gives `model` these adapters, drawn from torch's generator; `model.lora` says so."""
    add_adapters(model, lora)
    model.lora = lora
    name_parameters(model)


def name_parameters(model: nn.Module) -> None:
    """Writes into each parameter's `bytelm_path` its dotted name in the JAX twin.

    Copying or assigning a parameter loses it.
    """
    for name, path in parameter_paths(model).items():
        model.get_parameter(name).bytelm_path = path  # pyright: ignore[reportAttributeAccessIssue]


def parameter_paths(model: nn.Module) -> dict[str, str]:
    """Name of each parameter → its dotted name in the JAX twin.

    Its last part is the kind of leaf, one of `bytelm.leaves.LEAVES`.
    """
    paths = {}
    for prefix, module in model.named_modules():
        kind = "kernel" if isinstance(module, nn.Linear) else "scale"
        kind = "embedding" if isinstance(module, nn.Embedding) else kind
        for name, _ in module.named_parameters(prefix, recurse=False):
            stem, dot, last = name.rpartition(".")
            paths[name] = stem + dot + (kind if last == "weight" else last)
    return paths
