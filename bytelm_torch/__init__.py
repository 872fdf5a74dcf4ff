"""bytelm in PyTorch: the twin of `bytelm_jax`, needing no JAX. The public names, nothing else."""

from bytelm.config import BLTConfig, ByteVocab, LFByteConfig, MegabyteConfig
from bytelm_torch.interop.export import from_pretrained, save_pretrained
from bytelm_torch.models import build_model
from bytelm_torch.optimizers.q_learning import EnhancedSGD

__all__ = [
    "BLTConfig",
    "ByteVocab",
    "EnhancedSGD",
    "LFByteConfig",
    "MegabyteConfig",
    "build_model",
    "from_pretrained",
    "save_pretrained",
]
