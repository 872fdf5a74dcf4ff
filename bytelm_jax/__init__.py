"""bytelm: byte-level language models, trained in JAX and proven equal in PyTorch."""

from bytelm import recipes
from bytelm.config import BLTConfig, ByteVocab, LFByteConfig, MegabyteConfig, Recipe
from bytelm_jax.models import build_model

__all__ = [
    "BLTConfig",
    "ByteVocab",
    "LFByteConfig",
    "MegabyteConfig",
    "Recipe",
    "build_model",
    "recipes",
]
