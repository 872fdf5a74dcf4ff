"""bytelm: byte-level language models. What both frameworks share; imports neither of them."""

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

__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":  # read from disk, and rarely needed
        from importlib.metadata import version

        return version("bytelm")
    raise AttributeError(f"module 'bytelm' has no attribute {name!r}")
