"""bytelm in PyTorch: the twin of `bytelm_jax`, needing no JAX. The public names, nothing else."""

from bytelm_torch.checkpoint import from_pretrained, save_pretrained
from bytelm_torch.config import ByteVocab, MegabyteConfig
from bytelm_torch.models import build_model

__all__ = ["ByteVocab", "MegabyteConfig", "build_model", "from_pretrained", "save_pretrained"]
