"""`build_model(config)`: one explicit match, no registry."""

from bytelm_torch.config import MegabyteConfig, ModelConfig
from bytelm_torch.models.megabyte import Megabyte


def build_model(config: ModelConfig) -> Megabyte:
    """The model that `config` describes, float32, initialised from torch's generator."""
    match config:
        case MegabyteConfig():
            return Megabyte(config)
        case _:
            raise ValueError(f"config={type(config).__name__}: not a model configuration of bytelm")
