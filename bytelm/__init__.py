"""bytelm: byte-level language models. What both frameworks share: neither is imported here."""

from bytelm import recipes
from bytelm.config import (
    AdamWConfig,
    BLTConfig,
    ByteVocab,
    EntropyConfig,
    LFByteConfig,
    LionConfig,
    MegabyteConfig,
    MuonConfig,
    OptimizerConfig,
    QLearningAdamWConfig,
    QLearningSGDConfig,
    Recipe,
    SGDConfig,
)
from bytelm.sampling import SamplerConfig
from bytelm.tokenizer import ByteTokenizer

__all__ = [
    "AdamWConfig",
    "BLTConfig",
    "ByteTokenizer",
    "ByteVocab",
    "EntropyConfig",
    "LFByteConfig",
    "LionConfig",
    "MegabyteConfig",
    "MuonConfig",
    "OptimizerConfig",
    "QLearningAdamWConfig",
    "QLearningSGDConfig",
    "Recipe",
    "SGDConfig",
    "SamplerConfig",
    "__version__",
    "recipes",
]


def __getattr__(name: str) -> str:
    if name == "__version__":  # read from the disk, and seldom wanted
        from importlib.metadata import version

        return version("bytelm")
    raise AttributeError(f"module 'bytelm' has no attribute {name!r}")
