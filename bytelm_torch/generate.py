"""Generation, under the name that people import."""

from bytelm_torch.inference.generate import SamplerConfig, generate, generate_uncached, stream

__all__ = ["SamplerConfig", "generate", "generate_uncached", "stream"]
