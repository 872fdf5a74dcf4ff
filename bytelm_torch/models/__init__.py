"""`build_model(config)`: one explicit match, no registry."""

from bytelm_torch.config import (
    BLTConfig,
    EntropyConfig,
    LFByteConfig,
    MegabyteConfig,
    ModelConfig,
)
from bytelm_torch.models.blt import BLT
from bytelm_torch.models.entropy import EntropyModel
from bytelm_torch.models.lfbyte import LFByteTransformer
from bytelm_torch.models.megabyte import Megabyte

Model = Megabyte | LFByteTransformer | EntropyModel | BLT


def build_model(config: ModelConfig) -> Model:
    """The model that `config` describes, float32, initialised from torch's generator."""
    match config:
        case MegabyteConfig():
            return Megabyte(config)
        case LFByteConfig():
            return LFByteTransformer(config)
        case EntropyConfig():
            return EntropyModel(config)
        case BLTConfig():
            return BLT(config)
        case _:
            raise ValueError(f"config={type(config).__name__}: not a model configuration of bytelm")


def is_norm(name: str) -> bool:
    """Whether the parameter called `name` belongs to a normalisation layer."""
    return name.split(".")[-2].endswith("norm")
